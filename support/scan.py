"""Reads all labels of a data set once: for tools/check_data.py, and for the class weights of the loss."""

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from support.command import InputError
from support.images import VOID
from support.processes import rank_and_world, sum_over_processes, worker_options


class Scan(Dataset):
    """Item i is (pixels of each label value, int64 (256,), (height, width), None), or (None, None, what is wrong)."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        try:
            image, label = self.data[i]
        except InputError as error:
            return None, None, str(error)
        if label is None:
            return None, None, f"{self.data.files[i][0]}: has no label; its split has no folder of labels"
        return np.bincount(label.flatten(), minlength=256), tuple(image.shape[:2]), None


def scan(data, workers):
    """Scan's items over this process's share of a data set, with a progress bar."""
    rank, world = rank_and_world()
    own = range(rank, len(data), world)
    # `tuple` leaves an item as it is: as tensors, each from a worker would be an open file.
    loader = DataLoader(Scan(data), sampler=own, batch_size=None, collate_fn=tuple, **worker_options(workers))
    return list(tqdm(loader, f"reading {data.split}", disable=rank > 0, leave=False, dynamic_ncols=True))


def never_labelled(pixels, names):
    """A sentence about the classes that have no pixels; "" if all have some.

    pixels  (K,) of each class, or (256,) of each label value
    names   of the K classes
    """
    missing = [name for name, count in zip(names, pixels, strict=False) if not count]
    if not missing:
        return ""
    text = f"no label shows {', '.join(missing[:5])}" + (f" and {len(missing) - 5} others" if missing[5:] else "")
    if len(missing) == len(names) - 1 and any(pixels[VOID:]):
        text += "; all other pixels are 255, which means void: python -m tools.convert_masks makes them a class"
    return text


def class_weights(given, data, device, workers):
    """The loss's weights, float32 (K,), or None: from K numbers as text, or from ["balanced"] by a scan of the data.

    Balanced is median frequency balancing (Eigen and Fergus, ICCV 2015): the median of the classes' frequencies over
    each one's, a frequency being the share of a class in the images that show it; 1 for a class that none shows.
    Raises InputError if the numbers cannot be weights, or a label cannot be read.
    """
    if given is None:
        return None
    if given == ["balanced"]:
        return balanced(data, workers).to(device)
    try:
        weights = torch.tensor([float(weight) for weight in given])
    except ValueError:
        weights = torch.empty(0)
    usable = weights.isfinite().all() and (weights >= 0).all() and weights.any()
    if len(weights) != len(data.classes) or not usable:
        raise InputError(f"--class-weights: takes 'balanced' or {len(data.classes)} numbers from 0, one per class")
    return weights.to(device)


def balanced(data, workers):
    seen = torch.zeros(2, len(data.classes), dtype=torch.float64)  # pixels of a class; of the images that show it
    for counts, _, problem in scan(data, workers):
        if problem:
            raise InputError(problem)
        pixels = torch.tensor(counts[: len(data.classes)], dtype=torch.float64)
        seen += torch.stack([pixels, (pixels > 0) * pixels.sum()])
    of_class, of_images = sum_over_processes(seen)
    frequency = of_class / of_images
    return (frequency.nanquantile(0.5) / frequency).nan_to_num(1.0).float()
