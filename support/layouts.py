"""Where each data set keeps its files, and what its label values mean.

    folder      images/{train,val,...}/**/*.{jpg,jpeg,png}, annotations/{train,val,...}/**/*.png, classes.txt
    ade20k      images/{training,validation}/*.jpg, annotations/{training,validation}/*.png
    cityscapes  leftImg8bit/{train,val,test}/*/*_leftImg8bit.png, gtFine/{train,val,test}/*/*_gtFine_labelIds.png
    voc12aug    JPEGImages/*.jpg, SegmentationClass{,Aug}/*.png, ImageSets/Segmentation/{train,aug,val}.txt

Each of the four functions takes the data set's root (None: its name below data/) and the split's name, and returns
images.Files. It raises InputError where files are missing or cannot be told apart.
"""

import glob
import os
import sys
from pathlib import Path

import numpy as np

from support import classes
from support.command import InputError
from support.files import is_inside, refuse_output_folder
from support.images import INVALID, VOID, Files

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")  # of images without labels
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)  # label id of each of the 19 train ids


def find_root(root, name, marker, parents=()):
    """The folder that holds `marker`: root or root/parent. If none does, InputError tells the layout of `name`."""
    root = Path(os.path.expanduser(root or f"data/{name}"))
    for folder in (root, *(root / parent for parent in parents)):
        if (folder / marker).is_dir():
            return folder
    layout = next((line.split(maxsplit=1)[1] for line in __doc__.splitlines() if f"    {name} " in line), None)
    what = f"folder (--data-root) that holds {layout}" if layout else f"folder that holds {marker}/"
    raise InputError(f"{root}: there is no {marker}/ in it; it must be the {what}")


def files_below(folder, visited):
    """Yields the files below a folder, sorted, without hidden ones. Links are followed, but no folder is read twice:
    `visited` is the set of those that have been."""
    visited.add(os.path.realpath(folder))
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            yield path
        elif os.path.realpath(path) not in visited:
            yield from files_below(path, visited)


def files_by_name(folder, ends):
    """{path below `folder` without its ending: path} of the files with one of the endings `ends`, sorted; and a list
    of the other files. Both are empty if there is no such folder."""
    found, others = {}, []
    for path in files_below(folder, set()) if folder.is_dir() else ():
        name = path.relative_to(folder).as_posix()
        end = next((end for end in ends if name.lower().endswith(end.lower())), None)
        if end is None:
            others.append(path)
        elif found.setdefault(name[: -len(end)], path) != path:
            raise InputError(f"{path}: has the same name as {found[name[: -len(end)]].name}; which of them counts?")
    return found, others


def note_unused(files, why):
    """Says on stderr which files are not used."""
    if files:
        others = f" and {len(files) - 1} others" if files[1:] else ""
        print(f"note: not used: {files[0]}{others}; {why}", file=sys.stderr)


def match(images, image_ends, labels, label_ends):
    """(image, label) paths whose names below the two folders are equal up to their endings, in sorted order.

    Labels are None where their folder does not exist, as in the test splits of some data sets. Raises InputError where
    an image has no label, or two files have one name. Says which files of the images' folder are not used, and which
    labels.
    """
    found, others = files_by_name(images, image_ends)
    labelled, _ = files_by_name(labels, label_ends)
    note_unused(others, f"images end in {', '.join(image_ends)}")
    if not labels.is_dir():
        return [(path, None) for path in found.values()]
    missing = [name for name in found if name not in labelled]
    if missing:
        others = f", nor have {len(missing) - 1} other images" if missing[1:] else ""
        raise InputError(f"{found[missing[0]]}: has no label {labels / missing[0]}{label_ends[0]}{others}")
    note_unused([path for name, path in labelled.items() if name not in found], f"there is no such image in {images}")
    return [(path, labelled[name]) for name, path in found.items()]


def read_lines(path, hint=""):
    """The lines of a text file, stripped. Raises InputError; `hint` says what to do if the file is missing."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise InputError(f"{path}: missing{hint}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not text in UTF-8 ({error})") from None


def label_table(mapping, other=INVALID):
    """uint8 (256,): the class of each value in a label file; 255 stays void."""
    table = np.full(256, other, np.uint8)
    table[VOID] = VOID
    table[list(mapping)] = list(mapping.values())
    return table


def identity(count):
    """The table of label files that hold the classes themselves."""
    return label_table({i: i for i in range(count)})


# ---------------------------------------------------------------------------------------------------- the data sets


def folder(root, split):
    root = find_root(root, "folder", "images")
    hint = "; it must name the classes, one a line, in the order of labels"
    names = read_lines(root / "classes.txt", hint)
    if not 1 <= len(names) <= INVALID:
        raise InputError(f"{root / 'classes.txt'}: names {len(names)} classes; there may be 1 to {INVALID}")
    for line, name in enumerate(names, 1):
        if not name or name in names[: line - 1]:
            raise InputError(f"{root / 'classes.txt'}: line {line} is {'a second ' + name if name else 'empty'}")
    images = root / "images" / split
    files = match(images, (".jpg", ".jpeg", ".png"), root / "annotations" / split, (".png",))
    return Files(files, names, classes.bit_colours(len(names) + 1)[1:], identity(len(names)), tree=images)


def ade20k(root, split):
    root = find_root(root, "ade20k", "images", ("ADEChallengeData2016",))
    split = {"train": "training", "val": "validation"}.get(split, split)
    files = match(root / "images" / split, (".jpg",), root / "annotations" / split, (".png",))
    table = label_table({0: VOID} | {i + 1: i for i in range(150)})
    return Files(files, classes.ADE20K, classes.ADE20K_PALETTE, table, submission=range(1, 151))


def cityscapes(root, split):
    root = find_root(root, "cityscapes", "leftImg8bit")
    images, labels = root / "leftImg8bit" / split, root / "gtFine" / split
    if any(labels.glob("*/*_gtFine_labelTrainIds.png")) and not any(labels.glob("*/*_gtFine_labelIds.png")):
        end, table = "_gtFine_labelTrainIds.png", identity(19)
    else:
        end, table = "_gtFine_labelIds.png", label_table({v: i for i, v in enumerate(CITYSCAPES_IDS)}, other=VOID)
    files = match(images, ("_leftImg8bit.png",), labels, (end,))
    return Files(files, classes.CITYSCAPES, classes.CITYSCAPES_PALETTE, table, submission=CITYSCAPES_IDS)


def voc12aug(root, split):
    """Trains on VOC's train.txt and what SBD adds to it (aug.txt less VOC's train and val images): 10,582 in all."""
    root = find_root(root, "voc12aug", "JPEGImages", ("VOCdevkit/VOC2012", "VOC2012"))
    lists = root / "ImageSets" / "Segmentation"
    names = [name for name in read_lines(lists / f"{split}.txt") if name]
    labels = {name: root / "SegmentationClass" / f"{name}.png" for name in names}
    if split == "train":
        extra = set(read_lines(lists / "aug.txt", "; make it with: python -m tools.voc_aug SBD"))
        extra -= {"", *names, *read_lines(lists / "val.txt")}
        labels |= {name: root / "SegmentationClassAug" / f"{name}.png" for name in sorted(extra)}
    files = [(root / "JPEGImages" / f"{name}.jpg", None if split == "test" else path) for name, path in labels.items()]
    for path in (path for pair in files for path in pair if path):
        if not path.is_file():
            raise InputError(f"{path}: missing, though it is listed for split {split!r}")
    return Files(files, classes.VOC, classes.bit_colours(21), identity(21))


# ----------------------------------------------------------------------------------------- images without a data set


def find_images(arguments, out):
    """{name: path} of the images that files, folders and patterns name; below a folder the name has its subfolders.

    out  the folder that the command writes to: what lies in it is left out, with a note

    Raises InputError where there are no images, where all of them lie in `out`, and where the results of two would have
    one name.
    """
    found, left_out = {}, []
    for argument in arguments:
        given = Path(argument)
        if given.is_dir():
            files = list(files_below(given, set()))
            names = {path: path.relative_to(given).with_suffix("") for path in files if path.suffix.lower() in ENDINGS}
            note_unused([path for path in files if path not in names], f"images end in {', '.join(ENDINGS)}")
        else:
            paths = [given] if given.exists() else map(Path, sorted(glob.glob(argument, recursive=True)))
            names = {path: path.stem for path in paths if not path.is_dir()}
        if not names:
            raise InputError(f"{argument}: there are no images there")
        for path, name in names.items():
            if is_inside(path.parent, out):
                left_out.append(path)
            elif (other := found.setdefault(str(name), path)) != path:
                raise InputError(f"{path}: its results would overwrite those of {other}; name one of them alone")
    if not found:
        refuse_output_folder(out, left_out)
    note_unused(left_out, f"in the output folder {out}")
    return found
