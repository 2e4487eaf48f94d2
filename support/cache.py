"""--cache: decoded images and labels, kept as arrays that are mapped into memory when they are read again."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch

from support.command import InputError
from support.files import replace

FORM = 2  # of what is kept: one more whenever a file is decoded to something else than before


def cached(folder, decode, path, *arguments):
    """decode(path, *arguments), or what `folder` keeps of it; a file that has changed is decoded anew.

    Raises InputError if the folder cannot be written to, or holds a damaged file.
    """
    state = path.stat()
    key = hashlib.sha256(os.fsencode(os.path.realpath(path)) + f" {state.st_mtime_ns} {state.st_size} {FORM}".encode())
    for argument in arguments:  # a label's table
        key.update(argument)
    kept = Path(folder, f"{key.hexdigest()}.npy")
    if not kept.exists():
        keep(kept, decode(path, *arguments).numpy())
    try:
        return torch.from_numpy(np.load(kept, mmap_mode="c"))
    except Exception:  # a damaged file can meet any of them
        raise InputError(f"{kept}: is damaged; delete it, it is made again") from None


def keep(path, array):
    """Writes an array. That it is on the disk is not waited for: what is lost is made again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, lambda file: np.save(file, array), sync=False)
    except (InputError, OSError) as error:
        raise InputError(
            f"--cache {path.parent}: cannot be written to ({error}); "
            "it must be a folder with room for all images, decoded"
        ) from None
