"""Reads all labels of a data set once: for tools/check_data.py, and for the class weights of the loss."""

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from support.command import InputError
from support.images import VOID
from support.processes import loading, patient, rank_and_world


class Scan(Dataset):
    """Item i is (pixels of each label value (256,), (height, width), None), or (None, None, what is wrong)."""

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


def never_labelled(pixels, names):
    """Which classes have no pixels, of those of each label value (256,), as a sentence's end; "" if all have some."""
    missing = [name for index, name in enumerate(names) if not pixels[index]]
    if not missing:
        return ""
    text = f"none shows {', '.join(missing[:5])}" + (f" and {len(missing) - 5} others" if missing[5:] else "")
    if len(missing) == len(names) - 1 and pixels[VOID]:
        text += "; all other pixels are 255, which means void: python -m tools.convert_masks makes them a class"
    return text


def unchanged(item):
    return item


def scan(data, workers):
    """Scan's items over a data set, or over this process's share of it, with a progress bar."""
    rank, world = rank_and_world()
    share = range(rank, len(data), world)
    loader = DataLoader(Scan(data), sampler=share, batch_size=None, collate_fn=unchanged, **loading(workers))
    return list(
        tqdm(patient(loader), f"reading {data.split}", len(loader), disable=rank > 0, leave=False, dynamic_ncols=True)
    )
