"""From a data set to the batches of a run. The augmentation, in the recipe's order, and where it is done:

    keep-ratio resize, random crop, flip, padding          TrainData, for each sample, on the CPU
    photometric distortion, normalisation, padding to 0    distort_and_normalise, for the whole batch, on its device

Images are uint8 RGB (H, W, 3), labels uint8 (H, W): the class, or 255 (VOID). A scale is (long side, short side).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from support.command import InputError
from support.images import VOID, normalise, resize
from support.processes import from_rank_0, worker_options
from support.settings import PRESETS


def open_data(name, root, split, cache=None):
    """One split of the data set of the preset `name`, an images.Files or scenes.Scenes: item i is (image, label).

    root is its folder, or None for the usual one; cache a folder for decoded images, or None. Rank 0 looks for the
    files, for all. Raises InputError if files are missing, or the split has no images.
    """
    data = from_rank_0(PRESETS[name].data, root, split)
    data.name, data.split, data.cache = name, split, cache
    if not data.files:
        raise InputError(f"{root or name}: the split {split!r} has no images; README.md shows where they belong")
    return data


class TrainData(Dataset):
    """Random crops of a data set, ready to be stacked.

    Item (position, i) is a sample of image i, number `position` of the run. All its randomness comes from (seed,
    position), so a sample depends neither on the worker that makes it nor on earlier samples.

    crop    (height, width)
    scale   (long, short): the size that the random ratio multiplies; None: each image's own
    ratios  the range of the random ratio
    """

    def __init__(self, data, crop, scale, seed, ratios):
        self.data, self.seed = data, seed
        self.crop, self.scale, self.ratios = crop, scale, ratios

    def __getitem__(self, key):
        position, i = key
        rng = np.random.default_rng((self.seed, position))
        image, label = self.data[i]
        ratio = rng.uniform(*self.ratios)
        size = keep_ratio(label.shape, [int(side * ratio) or 1 for side in self.scale or label.shape])
        window, label = random_crop(label, size, self.crop, rng)
        image = resize(image, size, window).permute(2, 0, 1)                    # (3, h, w), no larger than the crop
        if rng.random() < 0.5:
            image, label = image.flip(2), label.flip(1)
        padding = (0, self.crop[1] - window[3], 0, self.crop[0] - window[2])    # at the right and the bottom
        return {
            "image": F.pad(image, padding),                                     # uint8 (3, *crop)
            "label": F.pad(label, padding, value=VOID),                         # uint8 (*crop)
            "size": torch.tensor(window[2:]),                                   # int64 (2,): without the padding
            "colour": draw_colour(rng),                                         # float32 (5,)
        }


def keep_ratio(size, scale):
    """The (height, width) of an image scaled to the largest size that fits into a scale (long side, short side)."""
    factor = min(max(scale) / max(size), min(scale) / min(size))
    return tuple(max(int(side * factor + 0.5), 1) for side in size)


def random_crop(label, size, crop, rng):
    """A window (top, left, height, width) of the image resized to `size`, no larger than `crop`; and the label there,
    resized to the nearest pixel. The window is drawn again, up to 10 times, while its valid pixels show fewer than two
    classes, or 75% or more of them one class."""
    rows, columns = nearest_pixels(label.shape[0], size[0]), nearest_pixels(label.shape[1], size[1])
    for _ in range(11):
        top = int(rng.integers(max(size[0] - crop[0], 0) + 1))
        left = int(rng.integers(max(size[1] - crop[1], 0) + 1))
        part = label.numpy().take(rows[top : top + crop[0]], 0).take(columns[left : left + crop[1]], 1)
        counts = torch.bincount(torch.from_numpy(part).flatten(), minlength=256)[:VOID]
        if counts.count_nonzero() > 1 and counts.max() < 0.75 * counts.sum():
            break
    return (top, left, *part.shape), torch.from_numpy(part)


def nearest_pixels(old, new):
    """int64 (new,): for each pixel of a resized side, the nearest of its `old` pixels, on the grid of `resize`."""
    return ((np.arange(new) + 0.5) * (old / new)).astype(int).clip(max=old - 1)


def draw_colour(rng):
    """The photometric distortion of a sample, float32 (5,): brightness (in grey levels), contrast, saturation, hue (in
    turns), contrast. Each is neutral with probability 1/2; contrast comes either before or after saturation and hue."""

    def maybe(value, neutral):
        return value if rng.random() < 0.5 else neutral

    contrast = maybe(rng.uniform(0.5, 1.5), 1)
    early = rng.random() < 0.5
    brightness = maybe(rng.uniform(-32, 32), 0)
    saturation = maybe(rng.uniform(0.5, 1.5), 1)
    hue = maybe(rng.integers(-18, 18) / 180, 0)
    values = [brightness, contrast if early else 1, saturation, hue, 1 if early else contrast]
    return torch.tensor(values, dtype=torch.float32)


def distort_and_normalise(batch, device):
    """A batch of TrainData's samples, on the device: images float32 (N, 3, H, W), their colours distorted, normalised,
    zero in the padding; and labels int64 (N, H, W)."""
    batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    images = normalise(distort(batch["image"].float(), batch["colour"]))
    (height, width), (h, w) = images.shape[2:], batch["size"][:, :, None].unbind(1)
    rows, columns = torch.arange(height, device=device) < h, torch.arange(width, device=device) < w
    return images * (rows[:, None, :, None] & columns[:, None, None, :]), batch["label"].long()


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


def training_loader(data, settings, iteration, rank, world, pin_memory):
    """An iterator over the batches of process `rank` of `world`, from an iteration on: TrainData's samples, stacked."""
    samples = TrainData(data, settings.crop_size, settings.scale, settings.seed, settings.ratios)
    start, stop = iteration * settings.accumulate, settings.iters * settings.accumulate
    keys = batch_keys(len(data), settings.batch_size, settings.seed, start, stop, rank, world)
    return iter(DataLoader(samples, batch_sampler=keys, pin_memory=pin_memory, **worker_options(settings.workers)))


def batch_keys(length, batch_size, seed, start, stop, rank=0, world=1):
    """Yields TrainData's keys (position, index) for the batches start..stop of one process among `world`, as lists.

    Position p of the run shows image permutation(seed, p // length)[p % length]: the order depends neither on where the
    run was interrupted nor, given batch_size * world, on the number of processes.
    """
    epoch, order = None, None
    for batch in range(start, stop):
        first = (batch * world + rank) * batch_size
        keys = []
        for position in range(first, first + batch_size):
            if position // length != epoch:
                epoch = position // length
                order = np.random.default_rng((seed, epoch)).permutation(length)
            keys.append((position, int(order[position % length])))
        yield keys
