"""Image files to arrays, the data sets that are kept in files, the cache of decoded images; resizing, normalising."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from support.command import InputError
from support.files import write_file

VOID = 255  # no class here: neither trained on nor counted
INVALID = 254  # in a table of label values: a value that no label file of the data set may hold
Image.MAX_IMAGE_PIXELS = 2**29  # Pillow warns of a larger image, and refuses one of twice as many
MEAN = (123.675, 116.28, 103.53)  # of ImageNet, in RGB
STD = (58.395, 57.12, 57.375)
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")  # that are read; for some others Pillow would start programs
CACHE_VERSION = 3  # of the arrays in a cache: one more whenever a file is decoded to something else than before


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
        raise InputError(f"{path}: cannot be read as {', '.join(FORMATS)} ({error})") from None


def read_image(path):
    """uint8 RGB (H, W, 3) of an image file of 8 bits a channel, in any mode. Raises InputError."""
    image, coding = open_image(path)
    tiff_bits = max(image.tag_v2.get(258, (1,))) if image.format == "TIFF" else 1  # BitsPerSample
    if tiff_bits > 8 or image.mode[0] in "IF" or image.format == "PNG" and ";16" in str(coding):
        remedy = "save it with 8 bits: value * 255 / the largest value that the camera gives"
        raise InputError(f"{path}: has more than 8 bits a channel, and does not say of which range; {remedy}")
    image = image.convert("RGBA") if image.mode == "P" else image  # RGB could not take P's transparency
    return torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB")))


def read_label(path, table):
    """uint8 (H, W): the classes that `table`, uint8 (256,), gives to the values in a label file. Raises InputError."""
    image, coding = open_image(path)
    if image.format != "PNG" or image.mode != "P" and coding != "L":  # fewer bits of grey are scaled when read
        advice = f"not {image.format} {coding}; python -m tools.convert_masks makes one"
        raise InputError(f"{path}: a label must be an 8-bit grey or palette PNG of class indices, {advice}")
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
        image = cached(self.cache, read_image, image_path)
        if label_path is None:
            return image, None
        label = cached(self.cache, read_label, label_path, self.table)
        if image.shape[:2] != label.shape:
            (h, w), (label_h, label_w) = image.shape[:2], label.shape
            raise InputError(f"{label_path}: is {label_w}x{label_h}, but its image {image_path} is {w}x{h}")
        return image, label


def cached(folder, decode, path, *arguments):
    """decode(path, *arguments), or the array that the folder of --cache keeps of it, mapped into memory; None keeps
    nothing. A file that has changed is decoded again. Raises InputError if the folder cannot be written to, or holds a
    damaged file."""
    if folder is None:
        return decode(path, *arguments)
    state = path.stat()
    text = f" {state.st_mtime_ns} {state.st_size} {CACHE_VERSION}"
    key = hashlib.sha256(os.fsencode(os.path.realpath(path)) + text.encode())
    for argument in arguments:  # a label's table
        key.update(argument)
    kept = Path(folder, f"{key.hexdigest()}.npy")
    if not kept.exists():
        array = decode(path, *arguments).numpy()
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_file(kept, lambda file: np.save(file, array), sync=False)  # what a crash loses is made again
        except (InputError, OSError) as error:
            raise InputError(f"--cache {folder}: must be a folder with room for decoded images ({error})") from None
    try:
        return torch.from_numpy(np.load(kept, mmap_mode="c"))
    except Exception:  # a damaged file can meet any of them
        raise InputError(f"{kept}: is damaged; delete it, it is made again") from None


def resize(image, size, window=None):
    """Bilinear with half-pixel centres and no antialiasing, as OpenCV's INTER_LINEAR, to within one grey level.

    image uint8 (H, W, 3), on the CPU -> uint8 (*size, 3), or only its window (top, left, height, width), which is the
    same as a crop of the whole. An image of this size already is returned itself.
    """
    if not window and size == image.shape[:2]:
        return image
    top, left, h, w = window or (0, 0, *size)
    # F.interpolate's kernel for uint8 starts at the first pixel; with scales given it may stop where the window ends.
    bottom, right = max(top + h, 2), max(left + w, 2)  # a result of one pixel is wrong on some processors
    asked = [bottom + (bottom == image.shape[0]), right + (right == image.shape[1])]  # an equal size is only copied
    scales = size[0] / image.shape[0], size[1] / image.shape[1]
    out = torch.ops.aten.upsample_bilinear2d(image.permute(2, 0, 1)[None], asked, False, *scales)
    return out[0, :, top : top + h, left : left + w].permute(1, 2, 0)


def window_starts(side, window, stride):
    """Where sliding windows begin along a side, in pixels: on the grid of the stride, the last one shifted back inside.
    A side shorter than the window has one, at 0."""
    steps = max(side - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride, side - window), 0) for i in range(steps)]


def normalise(images):
    """Images (N, 3, H, W) in 0..255, less the ImageNet means, over the deviations: float32."""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
    return (images - mean) / std
