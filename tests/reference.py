"""What the reference computes, and the weights with which it did: functions of the parameters' names."""

import functools
import json
import zlib
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "golden"


def arrays(name):
    return np.load(FOLDER / f"{name}.npz")


def keys(model, depth):
    """Parameter name -> shape, of the reference's model."""
    return json.loads((FOLDER / f"{model}_keys.json").read_text())[f"r{depth}"]


@functools.lru_cache(maxsize=8)
def weights(model, depth):
    """The reference's state dict, float32."""
    return {name: torch.tensor(weight(name, shape)) for name, shape in keys(model, depth).items()}


def weight(name, shape):
    name = name.replace("context.stages.0.query_project", "context.stages.0.key_project")  # ANN shares the two
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith(("running_mean", "bias")):
        values = 0.1 * rng.standard_normal(shape)
    elif name.endswith("running_var"):
        values = rng.uniform(0.5, 1.5, shape)
    elif len(shape) == 4:
        values = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    else:
        values = rng.uniform(0.5, 1.5, shape)
    return values.astype(np.float32)
