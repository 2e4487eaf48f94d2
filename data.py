"""The data sets as pairs of image and label, and the transforms of training.

Images are uint8 RGB (H, W, 3), labels uint8 (H, W): the class, or 255 (VOID) where there is none. Sizes are (height,
width), but a scale is (long side, short side), as the published recipes name it.
"""

import contextlib
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from support import context
from support import scenes as shapes
from support.layouts import INVALID, LAYOUTS, VOID, InputError

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
DRAWN = {"shapes": shapes, "context": context}  # the embedded data sets: modules that draw their scenes


# --------------------------------------------------------------------------------------------------------- data sets


def open_image(path, read):
    """read(file) of an image file that Pillow opens."""
    try:
        with Image.open(path) as file:
            return read(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as an image ({error})") from None


def read_image(path):
    """uint8 RGB (H, W, 3) of an image file in any mode, turned as its EXIF orientation says."""

    def upright(file):
        ImageOps.exif_transpose(file, in_place=True)
        file.load()
        return file

    image = open_image(path, upright)
    if image.mode == "P":  # its transparency would not go into RGB
        image = image.convert("RGBA")
    if image.mode.startswith("I"):  # 16 bits
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode != "RGB":  # or convert would copy it
        image = image.convert("RGB")
    return torch.from_numpy(np.array(image))


def read_label(path, table):
    """uint8 (H, W): the classes that `table` gives to the values in a label file."""
    kind, mode, values = open_image(path, lambda file: (file.format, file.mode, np.asarray(file)))
    if kind != "PNG" or mode not in ("L", "P"):
        raise InputError(
            f"{path}: a label must be an 8-bit grey or palette PNG of class indices; this is {kind} {mode}"
        )
    label = np.frombuffer(bytearray(values).translate(table), np.uint8).reshape(values.shape)
    if (label == INVALID).any():
        value, allowed = values[label == INVALID][0], np.flatnonzero(table != INVALID)[[0, -2]]
        raise InputError(f"{path}: holds the value {value}; labels are {allowed[0]} to {allowed[1]}, and 255 for void")
    return torch.from_numpy(label)


class SegmentationData(Dataset):
    """One split of a data set. Item i is (image, label) as the module says; label is None where the split has none.

    classes, palette    names and RGB colours
    files               (image path, label path or None) of each item; drawn scenes have names only
    ratios              between which the training's random resizing draws
    cache               a folder for decoded images, mapped into memory
    """

    def __init__(self, name, root, split, cache=None):
        self.name, self.split, self.cache = name, split, cache
        # A crop out of an enlarged scene of `context` would lack the sky, and its labels would have no reason.
        self.ratios = (1, 1) if name == "context" else (0.5, 2)
        if name in DRAWN:
            self.classes, self.palette = DRAWN[name].CLASSES, DRAWN[name].PALETTE
            self.files = [(Path(f"{split}{i:05}"), None) for i in range(DRAWN[name].COUNTS.get(split, 0))]
        else:
            root = Path(root or f"data/{name.removesuffix('769')}").expanduser()
            self.files, self.classes, self.palette, self.table = LAYOUTS[name](root, split)
        if not self.files:
            raise InputError(f"{root or name}: there are no images in the split {split!r}")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        if self.name in DRAWN:
            return tuple(torch.from_numpy(array) for array in DRAWN[self.name].draw(self.split, i))
        image_path, label_path = self.files[i]
        image = self.read(image_path, read_image)
        if label_path is None:
            return image, None
        label = self.read(label_path, read_label, self.table)
        if image.shape[:2] != label.shape:
            (h, w), (label_h, label_w) = image.shape[:2], label.shape
            raise InputError(f"{label_path}: is {label_w}x{label_h}, but its image {image_path} is {w}x{h}")
        return image, label

    def read(self, path, decode, *arguments):
        """decode(path, *arguments), or what the cache has kept of it; a file that changes is read anew."""
        if not self.cache:
            return decode(path, *arguments)
        state = path.stat()
        key = hashlib.sha256(f"{self.name} {path.resolve()} {state.st_mtime_ns} {state.st_size}".encode()).hexdigest()
        kept = Path(self.cache, f"{key}.npy")
        if not kept.exists():
            array, partial = decode(path, *arguments).numpy(), kept.with_suffix(f".{os.getpid()}.partial")
            try:
                kept.parent.mkdir(parents=True, exist_ok=True)
                with open(partial, "wb") as file:
                    np.save(file, array)
                os.replace(partial, kept)
            except OSError as error:
                with contextlib.suppress(OSError):
                    partial.unlink()
                raise InputError(
                    f"--cache {self.cache}: cannot be written to ({error}); it must be a folder with room for all "
                    "images, decoded"
                ) from None
        try:
            return torch.from_numpy(np.load(kept, mmap_mode="c"))
        except (EOFError, ValueError):
            raise InputError(f"{kept}: is damaged; delete it, it is made again") from None


# -------------------------------------------------------------------------------------------------------- transforms


def keep_ratio(size, scale):
    """The (height, width) of an image enlarged or shrunk as far as a scale (long side, short side) admits."""
    factor = min(max(scale) / max(size), min(scale) / min(size))
    return tuple(max(int(side * factor + 0.5), 1) for side in size)


def resize(image, size, window=None):
    """Bilinear with half-pixel centres and no antialiasing, as OpenCV's INTER_LINEAR, to within one grey level.

    image uint8 (H, W, 3), on the CPU -> uint8 (*size, 3), or only its window (top, left, height, width); of the image's
    own size it is the image itself.
    """
    if not window and size == image.shape[:2]:
        return image
    window = top, left, h, w = window or (0, 0, *size)
    top, bottom, rows, upside_down = from_corner(top, h, image.shape[0], size[0])
    left, right, columns, mirrored = from_corner(left, w, image.shape[1], size[1])
    if bottom * right > 3 * h * w:  # too much to make beside the window
        return sample(image, size, window)
    flips = [0] * upside_down + [1] * mirrored
    source = image[rows, columns].flip(flips).permute(2, 0, 1)[None]
    # F.interpolate's kernel; but there the scale follows from the two sizes, here it is that of the whole image.
    scale = size[0] / image.shape[0], size[1] / image.shape[1]
    out = torch.ops.aten.upsample_bilinear2d(source, [bottom, right], False, *scale)
    return out[0, :, top : top + h, left : left + w].permute(1, 2, 0).flip(flips)


def from_corner(first, count, old, new):
    """`count` pixels, from `first` on, of a side of `new` resized from `old`, as seen from the nearer end, since the
    kernel resizes from the first pixel on: first, stop, the slice of old pixels that it needs, whether mirrored."""
    mirrored = 2 * first > new - count
    first = new - count - first if mirrored else first
    stop = first + count
    used = min(stop * old // new + 2, old)
    stop += stop == 1  # with a single pixel the kernel for plain processors errs
    stop += stop == used  # from and to equal sizes the kernel copies, whatever the scale
    return first, stop, slice(old - used, old) if mirrored else slice(used), mirrored


def sample(image, size, window):
    """`resize` for a window far from the corners: slower for each pixel, but nothing beside the window is made."""
    top, left, h, w = window
    rows, y = source_of(top, h, image.shape[0], size[0])
    columns, x = source_of(left, w, image.shape[1], size[1])
    grid = torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=-1)
    source = image[rows, columns].permute(2, 0, 1)[None].float()
    out = F.grid_sample(source, grid[None], padding_mode="border", align_corners=True)
    return torch.from_numpy(out[0].round_().numpy().astype(np.uint8)).permute(1, 2, 0)  # Tensor.byte() is slow


def source_of(first, count, old, new):
    """Where `count` pixels, from `first` on, of a side of `new` lie on the side of `old` from which it is resized: the
    slice of old pixels around them, and their places in it, -1 at its first pixel's centre to 1 at its last's."""
    place = ((torch.arange(first, first + count, dtype=torch.float64) + 0.5) * (old / new) - 0.5).clamp(0, old - 1)
    start, stop = int(place[0]), min(int(place[-1]) + 2, old)
    return slice(start, stop), ((place - start) * (2 / max(stop - start - 1, 1)) - 1).float()


class TrainData(Dataset):
    """Random crops of a data set, ready to be stacked.

    Item (position, i) is image i as the sample at a position in the run. All its randomness comes from (seed,
    position), so that it does not depend on which worker makes it, nor on what was made before.
    """

    def __init__(self, data, crop, scale, seed):
        self.data, self.crop, self.scale, self.seed = data, crop, scale, seed

    def __getitem__(self, key):
        position, i = key
        rng = np.random.default_rng((self.seed, position))
        image, label = self.data[i]
        ratio = rng.uniform(*self.data.ratios)
        size = keep_ratio(label.shape, [int(side * ratio) or 1 for side in self.scale or label.shape])
        # The label is resized to the nearest pixel on the image's own grid, and the crop is chosen on it; the image is
        # resized after that, no more of it than the crop needs.
        rows, columns = nearest(label.shape[0], size[0]), nearest(label.shape[1], size[1])
        for _ in range(11):
            top, left = (int(rng.integers(max(side - c, 0) + 1)) for side, c in zip(size, self.crop, strict=True))
            below, right = top + self.crop[0], left + self.crop[1]
            crop = torch.from_numpy(label.numpy().take(rows[top:below], 0).take(columns[left:right], 1))
            counts = torch.bincount(crop.flatten(), minlength=256)[:VOID]
            if counts.count_nonzero() > 1 and counts.max() < 0.75 * counts.sum():
                break
        image = resize(image, size, (top, left, *crop.shape)).permute(2, 0, 1)
        if rng.random() < 0.5:
            image, crop = image.flip(2), crop.flip(1)
        bottom, right = self.crop[0] - crop.shape[0], self.crop[1] - crop.shape[1]
        return {
            "image": F.pad(image, (0, right, 0, bottom)),
            "label": F.pad(crop, (0, right, 0, bottom), value=VOID),
            "size": torch.tensor(crop.shape),
            "colour": draw_colour(rng),
            "file": str(self.data.files[i][0]),
        }


def nearest(old, new):
    """int64 (new,): the pixel out of `old` nearest to each of `new`, on the grid of `resize`."""
    return ((np.arange(new) + 0.5) * (old / new)).astype(int).clip(max=old - 1)


def draw_colour(rng):
    """Photometric distortion of one sample: brightness, contrast, saturation, hue in turns, contrast once more. Each is
    neutral with probability 1/2; contrast comes either before or after saturation and hue."""

    def maybe(value, neutral):
        return value if rng.random() < 0.5 else neutral

    contrast, early = maybe(rng.uniform(0.5, 1.5), 1), rng.random() < 0.5
    brightness, saturation = maybe(rng.uniform(-32, 32), 0), maybe(rng.uniform(0.5, 1.5), 1)
    hue = maybe(rng.integers(-18, 18) / 180, 0)
    values = [brightness, contrast if early else 1, saturation, hue, 1 if early else contrast]
    return torch.tensor(values, dtype=torch.float32)


def distort(images, colour):
    """Photometric distortion of float images (N, 3, H, W) in 0..255, on their device, by `draw_colour`'s (N, 5)."""
    brightness, contrast, saturation, hue, late_contrast = colour[:, :, None, None, None].unbind(1)
    x = (images + brightness).clamp(0, 255).floor()
    x = (x * contrast).clamp(0, 255).floor()
    # Hue h in 0..6, chroma and value; then back (https://en.wikipedia.org/wiki/HSL_and_HSV, "HSV to RGB alternative").
    value, chroma = x.amax(1, True), x.amax(1, True) - x.amin(1, True)
    red, green, blue = (x / chroma.clamp(min=1)).split(1, dim=1)
    h = torch.where(x[:, 1:2] == value, 2 + blue - red, 4 + red - green)
    h = torch.where(x[:, 0:1] == value, green - blue, h)
    k = (h + 6 * hue + torch.tensor([5, 3, 1], device=x.device)[:, None, None]) % 6
    x = value - torch.minimum(chroma * saturation, value) * torch.minimum(k, 4 - k).clamp(0, 1)
    return (x.round() * late_contrast).clamp(0, 255).floor()


def normalise(images):
    """Images (N, 3, H, W) in 0..255 by the ImageNet means and deviations, as float32."""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
    return (images - mean) / std


def to_device(batch, device):
    """What is best done for the whole batch: a stack of TrainData's samples to normalised images (N, 3, H, W), 0 where
    they are padded, and labels int64 (N, H, W)."""
    batch = {name: value.to(device, non_blocking=True) for name, value in batch.items() if name != "file"}
    images = normalise(distort(batch["image"].float(), batch["colour"]))
    (height, width), (h, w) = images.shape[2:], batch["size"][:, :, None].unbind(1)
    rows, columns = torch.arange(height, device=device) < h, torch.arange(width, device=device) < w
    return images * (rows[:, None, :, None] & columns[:, None, None, :]), batch["label"].long()


class Batches:
    """Sampler of the batches of (position, index) for iterations start..stop of one process among `world`.

    Position p of the run shows image permutation(seed, p // length)[p % length]: the order depends neither on where the
    run was interrupted nor, given batch * world, on the number of processes.
    """

    def __init__(self, length, batch, seed, start, stop, rank=0, world=1):
        self.length, self.batch, self.seed = length, batch, seed
        self.iterations, self.rank, self.world = range(start, stop), rank, world

    def __len__(self):
        return len(self.iterations)

    def __iter__(self):
        epoch, order = None, None
        for iteration in self.iterations:
            first = (iteration * self.world + self.rank) * self.batch
            keys = []
            for position in range(first, first + self.batch):
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
                keys.append((position, int(order[position % self.length])))
            yield keys


if __name__ == "__main__":
    from support.command import run
    from tools import check_data as data_tools

    run(data_tools.main)
