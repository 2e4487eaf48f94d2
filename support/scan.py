"""Reads all labels of a data set once: for tools/check_data.py, and for the class weights of the loss."""

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from support.command import InputError
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
