"""Checkpoints: what a run leaves behind, and what builds a model again.

A checkpoint is a plain dict that torch.load(..., weights_only=True) reads:

    model       state dict; the parameter names are those of the published models
    config      what building and evaluating the model needs, and the arguments of the run
    optimizer, scaler, iteration, best_miou     where a run goes on

No state of random numbers is needed: all that train.py draws follows from the seed and the iteration.
"""

import contextlib
import json
import os
import re
from pathlib import Path

import torch

from ann import ANN
from gcnet import GCNet, SNLNet, add_gc_blocks
from nonlocal_net import NonLocalNet
from resnet_d8 import FCN, ResNetD8
from support import zoo
from support.layouts import InputError

MODELS = {"gcnet": GCNet, "nonlocal_net": NonLocalNet, "ann": ANN, "snlnet": SNLNet, "fcn": FCN}


def build_model(config):
    """A new model for a checkpoint's config, on the CPU."""
    model = MODELS[config["model"]](len(config["classes"]), config["depth"], config["align_corners"])
    if config.get("gc_backbone"):
        add_gc_blocks(model.backbone, config["gc_backbone"])
    return model


def save(state, path):
    """Writes a checkpoint."""
    replace(path, lambda file: torch.save(state, file))


def replace(path, write):
    """Has write(file) fill a new file, then puts it in the place of `path`, which at any moment is whole."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        while error.__context__:  # torch's own complaint hides the disk's
            error = error.__context__
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        kept = "; the one before it is whole" if path.exists() else ""
        raise InputError(f"{path}: cannot be written ({error}){kept}") from None


def begin_run(folder, config, start):
    """Makes a run's folder, or readies it to go on at an iteration: the log loses what was written after that."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    replace(folder / "config.json", lambda file: file.write(json.dumps(config, indent=1).encode() + b"\n"))
    kept = [json.dumps(line) + "\n" for line in read_log(folder) if line["iteration"] < start]
    replace(folder / "log.jsonl", lambda file: file.write("".join(kept).encode()))


def read_log(folder):
    """The lines of a run's log.jsonl, as dicts."""
    log, lines = folder / "log.jsonl", []
    for text in log.read_text(errors="replace").splitlines() if log.exists() else []:
        with contextlib.suppress(ValueError):  # a machine that went down may leave anything
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("iteration"), int):
                lines.append(line)
    return lines


def read_config(folder):
    """The config of the run in a folder."""
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder}: holds no run to go on with; --out names the folder of one") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'}: is damaged ({error})") from None


def read(path):
    """What torch.save wrote to a file, on the CPU. No code in the file is ever run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can meet any of them
        objects = re.search(r"GLOBAL (\S+)", str(error))
        if not objects:
            raise InputError(f"{path}: is no checkpoint, or damaged ({type(error).__name__})") from None
        raise InputError(
            f"{path}: holds {objects[1]}, which could run code. If you trust its source, strip it there: "
            "s = torch.load(PATH, weights_only=False); torch.save({k: s[k] for k in ('meta', 'state_dict')}, PATH)"
        ) from None


def load(source):
    """The checkpoint of a path, a URL, or a published model's name, as the module says."""
    path = zoo.locate(source)
    state = read(path)
    if isinstance(state, dict) and "state_dict" in state:
        return zoo.convert(state, path)
    config = state.get("config") if isinstance(state, dict) else None
    if not isinstance(config, dict) or "model" not in state:
        raise InputError(f"{path}: is no checkpoint of a model; it has no config and model, nor state_dict and meta")
    if not isinstance(state["model"], dict):
        raise InputError(f"{path}: its model is no dict of weights")
    if not config.get("classes"):
        raise InputError(f"{path}: does not say how many classes its model has")
    missing = {"model", "depth", "align_corners", "dataset", "scale", "crop_size", "stride", "palette"} - config.keys()
    if missing or config["model"] not in MODELS or config["depth"] not in ResNetD8.BLOCKS:
        what = ", ".join(sorted(missing)) or "a model and depth of this project"
        raise InputError(f"{path}: its config does not name {what}")
    return state


def load_weights(module, weights, source):
    """load_state_dict, strictly; the first name or shape that does not fit is the message."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].split(",")[0].strip()
        raise InputError(f"{source}: does not fit the model ({first})") from None
    for name, value in module.state_dict().items():
        if not value.isfinite().all():
            raise InputError(f"{source}: {name} holds values that are not finite; use an earlier checkpoint")


def load_model(source):
    """(model, config) of a checkpoint, on the CPU; source is that of `load`."""
    state = load(source)
    model = build_model(state["config"])
    load_weights(model, state["model"], source)
    return model, state["config"]


def context_blocks(module):
    """The weights of a backbone's GC blocks: a file without them leaves them as they start, the identity."""
    return {key: value for key, value in module.state_dict().items() if ".context_block." in key}


def load_backbone(model, source, depth):
    """Starts the model's backbone from ImageNet weights: "imagenet", a path or URL, or "none"."""
    if source == "none":
        return
    if source == "imagenet":
        if depth not in zoo.BACKBONES:
            raise InputError(f"--pretrained imagenet: there are such weights for depth 50 and 101, not {depth}")
        source = zoo.BACKBONES[depth]
    try:
        weights = read(zoo.locate(source))
    except InputError as error:
        raise InputError(f"{error}; without ImageNet weights: --pretrained none") from None
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else None
    if not isinstance(weights, dict):
        raise InputError(f"--pretrained {source}: holds no weights by name")
    weights = {key: value for key, value in weights.items() if not key.startswith("fc.")}
    load_weights(model.backbone, context_blocks(model.backbone) | weights, source)


def load_initial(model, source):
    """Starts the model from a checkpoint, but for the classifiers where their class counts differ. Says what it did."""
    own, given = model.state_dict(), load(source)["model"]
    weights = context_blocks(model) | given
    kept = {key for key in weights if "conv_seg" in key and key in own and weights[key].shape != own[key].shape}
    load_weights(model, {key: own[key] if key in kept else weights[key] for key in weights}, source)
    classifiers = "but the classifiers, which start anew: other classes" if kept else "classifiers too"
    fresh = "; the backbone's GC blocks start anew" if len(weights) > len(given) else ""
    return f"--init {source}: all weights, {classifiers}{fresh}"


def newest_run(root="runs"):
    """The folder below root whose checkpoint was written last."""
    runs = sorted(Path(root).glob("**/best.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise InputError(f"{root}/: holds no run yet; name a checkpoint, or train one with: python train.py")
    return runs[-1].parent
