"""The weights of the classes in the loss: given, or from a scan of the data set's labels."""

import torch

from support.command import InputError
from support.processes import sum_over_processes
from support.scan import scan


def class_weights(given, data, device, workers):
    """The loss's weights, float32 (K,), or None: from K numbers as text, or from ["balanced"] by a scan of the data.

    Balanced is median frequency balancing (Eigen and Fergus, ICCV 2015): the median of the classes' frequencies over
    each one's, a frequency being the share of a class in the images that show it; 1 for a class that none shows.
    Raises InputError if the numbers cannot be weights, or a label cannot be read.
    """
    if given is None:
        return None
    if given == ["balanced"]:
        return balanced(data, device, workers)
    try:
        weights = torch.tensor([float(weight) for weight in given])
    except ValueError:
        weights = torch.empty(0)
    usable = weights.isfinite().all() and (weights >= 0).all() and weights.any()
    if len(weights) != len(data.classes) or not usable:
        raise InputError(f"--class-weights: takes 'balanced' or {len(data.classes)} numbers from 0, one per class")
    return weights.to(device)


def balanced(data, device, workers):
    seen = torch.zeros(2, len(data.classes), dtype=torch.float64)  # pixels of a class; of the images that show it
    for counts, _, problem in scan(data, workers):
        if problem:
            raise InputError(problem)
        pixels = torch.tensor(counts[: len(data.classes)], dtype=torch.float64)
        seen += torch.stack([pixels, (pixels > 0) * pixels.sum()])
    of_class, of_images = sum_over_processes(seen)
    frequency = of_class / of_images
    return (frequency.nanquantile(0.5) / frequency).nan_to_num(1.0).float().to(device)
