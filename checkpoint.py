"""Checkpoints: what a run leaves behind, and what builds a model again.

A checkpoint is a plain dict that torch.load(..., weights_only=True) reads:

    model       state dict; the parameter names are those of the published models
    config      what building and evaluating the model needs, and the arguments of the run
    optimizer, scaler, iteration, best_miou     where a run goes on
"""

import json
import os
import pickle
import zipfile
from pathlib import Path

import torch

from ann import ANN
from gcnet import GCNet, SNLNet
from layouts import InputError
from nonlocal_net import NonLocalNet
from resnet_d8 import FCN

MODELS = {"gcnet": GCNet, "nonlocal_net": NonLocalNet, "ann": ANN, "snlnet": SNLNet, "fcn": FCN}


def build_model(config):
    """A new model for a checkpoint's config, on the CPU."""
    return MODELS[config["model"]](len(config["classes"]), config["depth"], config["align_corners"])


def save(state, path):
    """Writes a checkpoint so that at any moment `path` is a whole one: the old, then the new."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        kept = "; the one before it is whole" if path.exists() else ""
        raise InputError(f"{path}: cannot write the checkpoint ({error}){kept}") from None


def begin_run(folder, config, start):
    """Makes a run's folder, or readies it to go on at an iteration: the log loses what was written after that."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    log = folder / "log.jsonl"
    if log.exists():
        kept = [
            line
            for line in log.read_text().splitlines()
            if line.endswith("}") and json.loads(line)["iteration"] < start
        ]
        log.write_text("".join(line + "\n" for line in kept))


def read_config(folder):
    """The config of the run in a folder."""
    try:
        return json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise InputError(f"{folder}: holds no run to go on with; --out names the folder of one") from None


def load_backbone(model, source):
    """Starts the model's backbone from ImageNet weights: a file, or "none"."""
    if source == "none":
        return
    weights = torch.load(source, map_location="cpu", weights_only=True)
    model.backbone.load_state_dict({k: v for k, v in weights.items() if not k.startswith("fc.")})


def load(path):
    """The checkpoint in a file, on the CPU. No code in the file is ever run."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: there is no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: is no checkpoint, or damaged ({reason})") from None
    config = state.get("config") if isinstance(state, dict) else None
    if not isinstance(config, dict) or "model" not in state:
        raise InputError(f"{path}: is no checkpoint of this project; it has no config and model")
    if not config.get("classes"):
        raise InputError(f"{path}: does not say how many classes its model has")
    return state


def newest_run(root="runs"):
    """The folder below root whose checkpoint was written last."""
    runs = sorted(Path(root).glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise InputError(f"{root}/: holds no run yet; name a checkpoint, or train one with: python train.py")
    return runs[-1].parent
