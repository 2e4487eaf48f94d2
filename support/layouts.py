"""Where each data set keeps its files, and what its label values mean.

    folder      images/{train,val,...}/**/*.{jpg,jpeg,png}, annotations/{train,val,...}/**/*.png, classes.txt
    ade20k      images/{training,validation}/*.jpg, annotations/{training,validation}/*.png
    cityscapes  leftImg8bit/{train,val,test}/*/*_leftImg8bit.png, gtFine/{train,val,test}/*/*_gtFine_labelIds.png
    voc12aug    JPEGImages/*.jpg, SegmentationClass{,Aug}/*.png, ImageSets/Segmentation/{train,aug,val}.txt

Each function takes the root and a split and returns

    files             list of (image path, label path, or None where the split has no labels)
    classes, palette  names and RGB colours
    table             uint8 (256,): the class of each value in a label file, VOID or INVALID
"""

import os
from pathlib import Path

import numpy as np

from support import classes

VOID = 255  # no class here: neither trained on nor counted
INVALID = 254  # a value that no label file of the data set may hold


CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)  # label id of each of the 19 train ids


class InputError(Exception):
    """The input is at fault, not the program: commands show the message alone and exit with status 2."""


def find_root(root, marker, parents=(), name=None):
    """The folder that holds `marker`: root itself or root/parent. If none does, says the layout of data set `name`."""
    for folder in (root, *(root / parent for parent in parents)):
        if (folder / marker).is_dir():
            return folder
    layout = next((line.split(maxsplit=1)[1] for line in __doc__.splitlines() if f"    {name} " in line), f"{marker}/")
    raise InputError(f"{root}: there is no {marker}/ in it; it must be the folder (--data-root) that holds {layout}")


def match(images, image_ends, labels, label_ends):
    """(image, label) paths whose names below the two folders are equal up to their endings, in sorted order.
    Labels are None where their folder does not exist, as in the test splits of some data sets."""

    def index(folder, ends):
        found = {}
        paths = (Path(place, file) for place, _, files in os.walk(folder, followlinks=True) for file in files)
        for path in sorted(path for path in paths if not path.name.startswith(".")):
            name = path.relative_to(folder).as_posix()
            end = next((end for end in ends if name.lower().endswith(end.lower())), None)
            if end and found.setdefault(name[: -len(end)], path) != path:
                raise InputError(f"{path}: has the same name as {found[name[: -len(end)]].name}; which of them counts?")
        return found

    found, labelled = index(images, image_ends), index(labels, label_ends)
    if not labels.is_dir():
        return [(path, None) for path in found.values()]
    missing = [name for name in found if name not in labelled]
    if missing:
        others = f", nor have {len(missing) - 1} other images" if missing[1:] else ""
        raise InputError(f"{found[missing[0]]}: has no label {labels / missing[0]}{label_ends[0]}{others}")
    return [(path, labelled[name]) for name, path in found.items()]


def read_names(path, hint=""):
    """The lines of a text file that lists names."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
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


def folder(root, split):
    root = find_root(root, "images", name="folder")
    hint = "; it must name the classes, one a line, in the order of labels"
    names = [name.strip() for name in read_names(root / "classes.txt", hint)]
    if not 1 <= len(names) <= INVALID:
        raise InputError(f"{root / 'classes.txt'}: names {len(names)} classes; there may be 1 to {INVALID}")
    for line, name in enumerate(names, 1):
        if not name.strip() or name in names[: line - 1]:
            raise InputError(
                f"{root / 'classes.txt'}: line {line} is {'a second ' + name if name.strip() else 'empty'}"
            )
    files = match(root / "images" / split, (".jpg", ".jpeg", ".png"), root / "annotations" / split, (".png",))
    return files, names, classes.bit_colours(len(names) + 1)[1:], identity(len(names))


def ade20k(root, split):
    root = find_root(root, "images", ("ADEChallengeData2016",), "ade20k")
    split = {"train": "training", "val": "validation"}.get(split, split)
    files = match(root / "images" / split, (".jpg",), root / "annotations" / split, (".png",))
    return files, classes.ADE20K, classes.ADE20K_PALETTE, label_table({0: VOID} | {i + 1: i for i in range(150)})


def cityscapes(root, split):
    root = find_root(root, "leftImg8bit", name="cityscapes")
    images, labels = root / "leftImg8bit" / split, root / "gtFine" / split
    train_ids = not any(labels.glob("*/*_gtFine_labelIds.png")) and any(labels.glob("*/*_gtFine_labelTrainIds.png"))
    end = "_gtFine_labelTrainIds.png" if train_ids else "_gtFine_labelIds.png"
    ids = {value: i for i, value in enumerate(CITYSCAPES_IDS)}
    table = identity(19) if train_ids else label_table(ids, other=VOID)
    return match(images, ("_leftImg8bit.png",), labels, (end,)), classes.CITYSCAPES, classes.CITYSCAPES_PALETTE, table


def voc12aug(root, split):
    """Trains on VOC's train.txt and what SBD adds to it (aug.txt less VOC's train and val images): 10,582 in all."""
    root = find_root(root, "JPEGImages", ("VOCdevkit/VOC2012", "VOC2012"), "voc12aug")

    def names(which):
        hint = "; make it with: python data.py voc-aug" if which == "aug" else ""
        return [line.strip() for line in read_names(root / "ImageSets" / "Segmentation" / f"{which}.txt", hint) if line]

    labels = {name: root / "SegmentationClass" / f"{name}.png" for name in names(split)}
    if split == "train":
        extra = set(names("aug")) - set(names("train")) - set(names("val"))
        labels |= {name: root / "SegmentationClassAug" / f"{name}.png" for name in sorted(extra)}
    files = [(root / "JPEGImages" / f"{name}.jpg", None if split == "test" else path) for name, path in labels.items()]
    for path in (path for pair in files for path in pair if path):
        if not path.is_file():
            raise InputError(f"{path}: missing, though it is listed for split {split!r}")
    return files, classes.VOC, classes.bit_colours(21), identity(21)


LAYOUTS = {
    "cityscapes": cityscapes,
    "cityscapes769": cityscapes,
    "ade20k": ade20k,
    "voc12aug": voc12aug,
    "folder": folder,
}
