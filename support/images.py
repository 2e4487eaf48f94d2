"""Image files to arrays, and the data sets that are kept in files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from support.cache import cached
from support.command import InputError

VOID = 255  # no class here: neither trained on nor counted
INVALID = 254  # in a table of label values: a value that no label file of the data set may hold
Image.MAX_IMAGE_PIXELS = 2**29  # Pillow warns of a larger image, and refuses one of twice as many
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")  # that are read; for some others Pillow would start programs


def open_image(path):
    """Pillow's image of a file, turned as its EXIF says, and how the file codes a pixel ("L;4": grey of four bits).
    Raises InputError if it cannot be read as one of FORMATS."""
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise FileNotFoundError("no such file")
        with Image.open(path, formats=FORMATS) as image:
            coding = image.tile[0][3] if image.tile else image.mode
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
            return image, coding
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can meet any of them
        raise InputError(f"{path}: cannot be read as an image ({error})") from None


def read_image(path):
    """uint8 RGB (H, W, 3) of an image file of 8 bits in any mode, or of a grey PNG of 16 bits. Raises InputError."""
    image, _ = open_image(path)
    if image.format == "TIFF" and max(image.tag_v2.get(258, (1,))) > 8:  # BitsPerSample
        raise InputError(f"{path}: has more than 8 bits per channel, in an unknown range; save it with 8 bits")
    image = image.convert("RGBA") if image.mode == "P" else image  # RGB could not take P's transparency
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB")))


def read_label(path, table):
    """uint8 (H, W): the classes that `table`, uint8 (256,), gives to the values in a label file. Raises InputError."""
    image, coding = open_image(path)
    if image.format != "PNG" or image.mode != "P" and coding != "L":  # fewer bits of grey are scaled when read
        what = f"{image.format} {coding if isinstance(coding, str) else image.mode}"
        raise InputError(f"{path}: a label must be an 8-bit grey or palette PNG of class indices, not {what}")
    values = np.asarray(image)
    label = np.frombuffer(bytearray(values).translate(table), np.uint8).reshape(values.shape)
    if (label == INVALID).any():
        value, allowed = values[label == INVALID][0], np.flatnonzero(table != INVALID)[[0, -2]]
        raise InputError(f"{path}: holds the value {value}; labels are {allowed[0]} to {allowed[1]}, and 255 for void")
    return torch.from_numpy(label)


@dataclass
class Files(Dataset):
    """One split of a data set that is kept in files, found by layouts.py. Item i is (image uint8 RGB (H, W, 3), label
    uint8 (H, W)), the label None where the split has none. An item that cannot be read raises InputError.

    files       (image path, label path or None) of each item
    classes     their names
    palette     their RGB colours
    table       uint8 (256,): the class of each value in a label file, VOID or INVALID
    tree        saved label maps repeat the images' subfolders below this folder; None: they all go into one folder
    submission  the value of each class in label maps for the test server; None: the class itself
    name, split, cache    of data.open_data, which sets them
    """

    files: list
    classes: Sequence
    palette: Sequence
    table: np.ndarray
    tree: Path | None = None
    submission: Sequence | None = None
    name: str = ""
    split: str = ""
    cache: str | None = None

    @property
    def labelled(self):
        return self.files[0][1] is not None

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        image_path, label_path = self.files[i]
        image = self.read(read_image, image_path)
        if label_path is None:
            return image, None
        label = self.read(read_label, label_path, self.table)
        if image.shape[:2] != label.shape:
            (h, w), (label_h, label_w) = image.shape[:2], label.shape
            raise InputError(f"{label_path}: is {label_w}x{label_h}, but its image {image_path} is {w}x{h}")
        return image, label

    def read(self, decode, *arguments):
        return cached(self.cache, decode, *arguments) if self.cache else decode(*arguments)
