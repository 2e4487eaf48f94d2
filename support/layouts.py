"""Where each data set keeps its files, and what its label values mean.

    folder      images/{train,val,...}/**/*.{jpg,png,...}, annotations/{train,val,...}/**/*.png, classes.txt
    ade20k      images/{training,validation}/*.jpg, annotations/{training,validation}/*.png
    cityscapes  {leftImg8bit,gtFine}/{train,val,test}/*/*_{leftImg8bit,gtFine_labelIds,gtFine_labelTrainIds}.png
    voc12aug    JPEGImages/*.jpg, SegmentationClass{,Aug}/*.png, ImageSets/Segmentation/{train,aug,val}.txt

Each of the four functions takes the data set's root (None: its name below data/) and the split's name, and returns
images.Files. It raises InputError where files are missing or cannot be told apart. find_images needs no labels.
"""

import glob
import os
import sys
import unicodedata
from pathlib import Path

import numpy as np

from support.classes import bit_colours, names_and_colours
from support.command import InputError
from support.files import is_inside, refuse_output_folder
from support.images import INVALID, VOID, Files

IMAGE_ENDS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)  # label id of each of the 19 train ids


def find_root(root, name, marker, parents=()):
    """The folder that holds `marker`: root or root/parent. Raises InputError if none does."""
    root = Path(os.path.expanduser(root or f"data/{name}"))
    for folder in (root, *(root / parent for parent in parents)):
        if (folder / marker).is_dir():
            return folder
    what = "images/, annotations/ and classes.txt" if name == "folder" else f"it (python -m tools.download {name})"
    raise InputError(f"{root}: there is no {marker}/ in it; --data-root names the folder that holds {what}")


def files_below(folder, visited):
    """Yields the files below a folder, sorted, without hidden ones. Links are followed, but no folder in the set
    `visited` is read again."""
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
        name = unicodedata.normalize("NFC", path.relative_to(folder).as_posix())  # macOS writes accents otherwise
        end = next((end for end in ends if name.lower().endswith(end.lower())), None)
        if end is None:
            others.append(path)
        elif found.setdefault(name[: -len(end)], path) != path:
            raise InputError(f"{path}: has the same name as {found[name[: -len(end)]].name}; keep one of them")
    return found, others


def note_unused(files, why):
    """Says on stderr which files are not used."""
    if files:
        others = f" and {len(files) - 1} more" if files[1:] else ""
        print(f"note: not used: {files[0]}{others}; {why}", file=sys.stderr)


def pair_files(images, image_ends, labels, label_ends):
    """(image, label) paths whose names below the two folders are equal up to their endings, in sorted order; says which
    files are not used. Labels are None where their folder does not exist, as in the test splits of some data sets.
    Raises InputError where an image has no label, or two files have one name."""
    found, others = files_by_name(images, image_ends)
    labelled, no_labels = files_by_name(labels, label_ends)
    note_unused(others, f"images end in {', '.join(image_ends)}")
    if not labels.is_dir():
        return [(path, None) for path in found.values()]
    missing = [name for name in found if name not in labelled]
    if missing:
        wanted = labels / f"{missing[0]}{label_ends[0]}"
        shown = ", ".join(missing[1:6]) + " ..." * (len(missing) > 6)
        others = f" (nor have {len(missing) - 1} more: {shown})" if missing[1:] else ""
        beside = [path for path in no_labels if path.with_suffix("") == wanted.with_suffix("")]
        advice = "add it, or remove the image"
        if beside:
            advice = f"{beside[0]} is not {label_ends[0]}: python -m tools.convert_masks makes one"
        raise InputError(f"{found[missing[0]]}: has no label {wanted}{others}; {advice}")
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


def label_table(values, void=()):
    """uint8 (256,): the class of a label value: i for values[i], VOID for 255 and those in `void`, else INVALID."""
    table = np.full(256, INVALID, np.uint8)
    table[[VOID, *void]] = VOID
    table[list(values)] = range(len(values))
    return table


def folder(root, split):
    root = find_root(root, "folder", "images")
    hint = "; it must name the classes, one a line; the first is class 0"
    names = read_lines(root / "classes.txt", hint)
    if not 2 <= len(names) <= INVALID:
        raise InputError(f"{root}/classes.txt: names {len(names)} classes, not 2 to {INVALID}; name the background")
    for line, name in enumerate(names, 1):
        if not name or name in names[: line - 1]:
            raise InputError(f"{root / 'classes.txt'}: line {line} is {'a second ' + name if name else 'empty'}")
    images = root / "images" / split
    files = pair_files(images, IMAGE_ENDS, root / "annotations" / split, (".png",))
    return Files(files, names, bit_colours(len(names) + 1)[1:], label_table(range(len(names))), tree=images)


def ade20k(root, split):
    root = find_root(root, "ade20k", "images", ("ADEChallengeData2016",))
    split = {"train": "training", "val": "validation"}.get(split, split)
    files = pair_files(root / "images" / split, (".jpg",), root / "annotations" / split, (".png",))
    values = range(1, 151)
    return Files(files, *names_and_colours("ade20k"), label_table(values, void=[0]), submission=values)


def cityscapes(root, split):
    root = find_root(root, "cityscapes", "leftImg8bit")
    images, labels = root / "leftImg8bit" / split, root / "gtFine" / split
    if any(labels.glob("*/*_gtFine_labelTrainIds.png")) and not any(labels.glob("*/*_gtFine_labelIds.png")):
        end, table = "_gtFine_labelTrainIds.png", label_table(range(19))
    else:
        end, table = "_gtFine_labelIds.png", label_table(CITYSCAPES_IDS, void=range(256))
    files = pair_files(images, ("_leftImg8bit.png",), labels, (end,))
    return Files(files, *names_and_colours("cityscapes"), table, submission=CITYSCAPES_IDS)


def voc12aug(root, split):
    """Trains on VOC's train.txt and what SBD adds to it (aug.txt less VOC's train and val images): 10,582 in all."""
    root = find_root(root, "voc12aug", "JPEGImages", ("VOCdevkit/VOC2012", "VOC2012"))
    lists = root / "ImageSets" / "Segmentation"
    names = [name for name in read_lines(lists / f"{split}.txt") if name]
    labels = {name: root / "SegmentationClass" / f"{name}.png" for name in names}
    if split == "train":
        extra = set(read_lines(lists / "aug.txt", "; make it with: python -m tools.download voc12aug"))
        extra -= {"", *names, *read_lines(lists / "val.txt")}
        labels |= {name: root / "SegmentationClassAug" / f"{name}.png" for name in sorted(extra)}
    files = [(root / "JPEGImages" / f"{name}.jpg", None if split == "test" else path) for name, path in labels.items()]
    for path in (path for pair in files for path in pair if path):
        if not path.is_file():
            raise InputError(f"{path}: missing, though it is listed for split {split!r}")
    return Files(files, *names_and_colours("voc12aug"), label_table(range(21)))


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
            images = [path for path in files if path.suffix.lower() in IMAGE_ENDS]
            pairs = [(str(path.relative_to(given).with_suffix("")), path) for path in images]
            others = [path for path in files if path.suffix.lower() not in IMAGE_ENDS]
            note_unused(others, f"images end in {', '.join(IMAGE_ENDS)}")
        else:
            paths = [given] if given.exists() else map(Path, sorted(glob.glob(argument, recursive=True)))
            pairs = [(path.stem, path) for path in paths if not path.is_dir()]
        if not pairs:
            raise InputError(f"{argument}: there are no images there")
        for name, path in pairs:
            if is_inside(path.parent, out):
                left_out.append(path)
            elif (other := found.setdefault(name, path)) != path:
                raise InputError(f"{path}: its results would overwrite those of {other}; name one of them alone")
    if not found:
        refuse_output_folder(out, left_out)
    note_unused(left_out, f"in the output folder {out}")
    return found
