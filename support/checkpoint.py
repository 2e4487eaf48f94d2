"""Checkpoints, and the models by name.

A checkpoint is a plain dict that torch.load(..., weights_only=True) reads:

    model       state dict; the parameter names are those of the published models
    config      the run's settings, some of which build the model and evaluate it
    optimizer, scaler, iteration, best_miou     what else a run needs in order to continue

tools/export.py writes the first two alone, as model.safetensors and config.json in a folder.

No state of random numbers is needed: all that train.py draws follows from the seed and the iteration.
"""

import hashlib
import json
import re
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ann import ANN
from gcnet import GCBlock, GCNet, SimplifiedNonLocalBlock, SNLNet, add_blocks
from nonlocal_net import NonLocalBlock, NonLocalNet
from resnet_d8 import FCN, ResNetD8
from support import zoo
from support.command import InputError
from support.files import replace
from support.processes import gather, share

MODELS = {"gcnet": GCNet, "nonlocal_net": NonLocalNet, "ann": ANN, "snlnet": SNLNet, "fcn": FCN}
BLOCKS = {  # of train.py --blocks, each made for a number of channels; "mul" is the paper's "scale"
    "nl": NonLocalBlock,
    "nl-gaussian": partial(NonLocalBlock, mode="gaussian"),
    "nl-dot-product": partial(NonLocalBlock, mode="dot_product"),
    "nl-concatenation": partial(NonLocalBlock, mode="concatenation"),
    "snl": SimplifiedNonLocalBlock,
    "gc4": partial(GCBlock, ratio=4),
    "gc8": partial(GCBlock, ratio=8),
    "gc16": partial(GCBlock, ratio=16),
    "gc32": partial(GCBlock, ratio=32),
    "gc16-avg": partial(GCBlock, ratio=16, pooling="avg"),
    "gc16-mul": partial(GCBlock, ratio=16, fusion="mul"),
    "gc16-avg-mul": partial(GCBlock, ratio=16, pooling="avg", fusion="mul"),
}
PLACES = {  # of gcnet.add_blocks
    "res4": "at its last residual block",
    "alternate": "at every other one of res3 and res4",
    "res3-res5": "at all of them",
}


@dataclass
class State:
    """What training changes, and a checkpoint keeps."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    iteration: int = 0  # the steps taken
    best_miou: float = -1.0  # of all validations


def build_model(config):
    """A new model for a checkpoint's config, on the CPU."""
    options = {}
    if config.get("cityscapes_ablation"):
        options = {"stem_channels": 128, "aux_channels": 512}
        if config["model"] == "nonlocal_net":
            options["reduction"] = 4
    model = MODELS[config["model"]](len(config["classes"]), config["depth"], config["align_corners"], **options)
    if config.get("blocks"):
        block, place = config["blocks"]
        add_blocks(model.backbone, BLOCKS[block], place)
    return model


def modernise(config):
    """Brings the config of an earlier version up to date."""
    ratio = config.pop("gc_backbone", None)
    if ratio:
        config["blocks"] = [f"gc{ratio}", "res3-res5"]
    for name, value in {"data_root": None, "blocks": None, "cityscapes_ablation": False}.items():
        config.setdefault(name, value)


# ------------------------------------------------------------------------------------------------------------ writing


def save(state, config, path):
    """Writes a State and the run's config as a checkpoint. Raises InputError if it cannot; the file before it stays."""
    saved = {name: getattr(state, name).state_dict() for name in ("model", "optimizer", "scaler")}
    saved |= {"config": config, "iteration": state.iteration, "best_miou": state.best_miou}
    replace(path, lambda file: torch.save(saved, file))


# ------------------------------------------------------------------------------------------------------------ reading


def read(path):
    """What torch.save or tools/export.py wrote to a file, on the CPU. No code in it is ever run. Raises InputError."""
    try:
        if path.suffix == ".safetensors":
            return read_export(path)
        if zipfile.is_zipfile(path):  # torch does not compare the checksums
            with zipfile.ZipFile(path) as archive:
                if part := archive.testzip():
                    raise InputError(f"{path}: is damaged ({part} is not as it was written)")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (InputError, MemoryError):
        raise
    except PermissionError as error:
        raise InputError(f"{error.filename or path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged file can meet any of them
        objects = re.search(r"GLOBAL (\S+)", str(error))
        if not objects:
            raise InputError(f"{path}: is no checkpoint, or damaged ({type(error).__name__})") from None
        raise InputError(
            f"{path}: holds {objects[1]}, which could run code. If you trust its source, strip it there: "
            "s = torch.load(PATH, weights_only=False); torch.save({k: s[k] for k in ('meta', 'state_dict')}, PATH)"
        ) from None


def read_export(path):
    """{"model", "config"} of a model.safetensors and the config.json beside it."""
    try:
        from safetensors.torch import load as read_tensors
    except ImportError:
        raise InputError(f"{path}: is read with a package that is missing; pip install safetensors") from None
    beside = path.with_name("config.json")
    if not beside.is_file():
        raise InputError(f"{path}: there is no config.json beside it, which tools/export.py writes too")
    try:
        config = json.loads(beside.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{beside}: is damaged ({error})") from None
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()  # the format itself has no checksum
    if isinstance(config, dict) and config.get("sha256", found) != found:
        raise InputError(f"{path}: is damaged, or is not the file that {beside} describes: sha256 there is another")
    return {"model": read_tensors(content), "config": config}


def load(source):
    """The checkpoint, as the module says, of a path, a URL, or a published model's name. A folder is taken for the
    model.safetensors or best.pt in it. Raises InputError."""
    path = zoo.locate(source)
    saved = read(path)
    if isinstance(saved, dict) and "state_dict" in saved:
        try:
            saved = zoo.convert(saved, path)
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(f"{path}: its state_dict or meta is not that of a published model ({error})") from None
    config = saved.get("config") if isinstance(saved, dict) else None
    if not isinstance(config, dict) or "model" not in saved:
        raise InputError(f"{path}: is no checkpoint of a model; it has no config and model, nor state_dict and meta")
    if not isinstance(saved["model"], dict):
        raise InputError(f"{path}: its model is no dict of weights")
    modernise(config)
    for name, sound in CONFIG.items():
        if name not in config:
            raise InputError(f"{path}: its config lacks {name}")
        if not sound(config[name]):
            raise InputError(f"{path}: its config says {name}: {config[name]!r:.60}, which no model here can have")
    if len(config["palette"]) != len(config["classes"]):
        raise InputError(
            f"{path}: its config has {len(config['palette'])} colours for {len(config['classes'])} classes"
        )
    if config["stride"] and not (config["crop_size"] and fits(config["stride"], config["crop_size"])):
        raise InputError(f"{path}: its config has a stride {config['stride']} for windows of {config['crop_size']}")
    if not all(isinstance(name, str) for name in saved["model"]):
        raise InputError(f"{path}: its weights have no names")
    return saved


def fits(stride, window):
    return stride[0] <= window[0] and stride[1] <= window[1]


def set_stride(config, stride):
    """Puts --stride into a config. Raises InputError if windows so far apart would not cover an image."""
    if stride:
        window = config["crop_size"]
        if not window:
            raise InputError("--stride: the checkpoint does not say how large its crops were, which are the windows")
        if not fits(stride, window):
            raise InputError(f"--stride {' '.join(map(str, stride))}: leaves gaps between windows of {window}")
        config["stride"] = stride


def is_pair(value):
    """Whether a value of a config is a size: two whole numbers from 1."""
    return isinstance(value, list | tuple) and len(value) == 2 and all(type(v) is int and 0 < v < 2**20 for v in value)


def is_placed_block(value):
    """Whether a value of a config is a block and where it is."""
    return isinstance(value, list) and value in [[block, place] for block in BLOCKS for place in PLACES]


def is_colour(value):
    return isinstance(value, list | tuple) and len(value) == 3 and all(type(v) is int and 0 <= v < 256 for v in value)


# What the config of a checkpoint must hold, so that the model can be built and evaluated.
CONFIG = {
    "model": lambda value: isinstance(value, str) and value in MODELS,
    "depth": lambda value: type(value) is int and value in ResNetD8.BLOCKS,
    "align_corners": lambda value: isinstance(value, bool),
    "blocks": lambda value: value is None or is_placed_block(value),
    "cityscapes_ablation": lambda value: isinstance(value, bool),
    "dataset": lambda value: isinstance(value, str),
    "data_root": lambda value: value is None or isinstance(value, str),
    "scale": lambda value: value is None or is_pair(value),
    "crop_size": lambda value: value is None or is_pair(value),
    "stride": lambda value: value is None or is_pair(value),
    "classes": lambda value: isinstance(value, list) and 0 < len(value) < 255 and all(type(v) is str for v in value),
    "palette": lambda value: isinstance(value, list) and all(map(is_colour, value)),
}


def load_weights(module, weights, source):
    """load_state_dict, strictly. InputError names the first weight that does not fit, or is not finite."""
    for name, value in module.state_dict().items():
        given = weights.get(name, value)
        if isinstance(given, torch.Tensor) and given.is_floating_point() != value.is_floating_point():
            raise InputError(f"{source}: {name} is {given.dtype}; the model has {value.dtype}")
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].split('", ')[0].strip()
        raise InputError(f"{source}: does not fit the model ({first})") from None
    for name, value in module.state_dict().items():
        if not value.isfinite().all():
            raise InputError(f"{source}: {name} holds values that are not finite; use an earlier checkpoint")


def load_model(source, stride=None):
    """(model, config) of a checkpoint, on the CPU; source is that of `load`. Of several processes, the one with the
    newest file of that name reads it for all. stride (down, across) has the model evaluated in sliding windows.
    Raises InputError."""
    path = zoo.in_folder(Path(source))
    times = gather(path.stat().st_mtime if path.is_file() else 0)
    saved = share(lambda: load(source), times.index(max(times)))
    set_stride(saved["config"], stride)
    model = build_model(saved["config"])
    load_weights(model, saved["model"], source)
    return model, saved["config"]


def restore(state, saved, iters, source):
    """Puts the checkpoint `saved`, of a run of `iters` steps, into a State. Raises InputError if it is none."""
    iteration, best_miou = saved.get("iteration"), saved.get("best_miou")
    if type(iteration) is not int or not 0 <= iteration <= iters or type(best_miou) is not float:
        raise InputError(f"{source}: is no state of a run of {iters} steps; --init takes its weights alone")
    load_weights(state.model, saved["model"], source)
    try:
        state.optimizer.load_state_dict(saved["optimizer"])
        state.scaler.load_state_dict(saved["scaler"])
        for parameter, kept in state.optimizer.state.items():
            if kept["momentum_buffer"].shape != parameter.shape:
                raise ValueError("its momentum has another shape than its weights")
    except Exception as error:  # what another program put there can meet any of them
        raise InputError(
            f"{source}: holds no state of this run's optimizer ({error}); --init takes its weights alone"
        ) from None
    state.iteration = iteration
    state.best_miou = best_miou


# ------------------------------------------------------------------------------------------- what a new run starts from


def load_initial(model, settings, leader):
    """Starts the model of a new run as --init or --pretrained says, in all processes from what the process `leader` has
    read. Raises InputError if it does not fit."""

    def read_weights():
        if settings.init:
            load_init(model, settings.init, settings.blocks)
        else:
            load_backbone(model, settings.pretrained, settings.depth)
        return model.state_dict()

    model.load_state_dict(share(read_weights, leader))


def fresh_blocks(module, given):
    """The weights, as they are, of those blocks in a backbone of which a file's weights `given` have none."""
    there = {key.partition(".context_block.")[0] for key in given}
    own = {key: value for key, value in module.state_dict().items() if ".context_block." in key}
    return {key: value for key, value in own.items() if key.partition(".context_block.")[0] not in there}


def load_backbone(model, source, depth):
    """Starts the model's backbone from ImageNet weights: "imagenet", a path or URL, or "none". Raises InputError."""
    if source == "none":
        return
    if source == "imagenet":
        if depth not in zoo.BACKBONES:
            raise InputError(f"--pretrained imagenet: there are such weights for depth 18, 50 and 101, not {depth}")
        source = zoo.BACKBONES[depth]
    try:
        saved = read(zoo.locate(source))
    except InputError as error:
        raise InputError(f"{error}; without ImageNet weights: --pretrained none") from None
    named = saved.get("state_dict", saved) if isinstance(saved, dict) else None
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named):
        raise InputError(f"--pretrained {source}: holds no weights by name")
    weights = {name: value for name, value in named.items() if not name.startswith("fc.")}
    load_weights(model.backbone, fresh_blocks(model.backbone, weights) | weights, source)


def load_init(model, source, blocks=None):
    """Starts the model from a checkpoint, but for classifiers with another number of classes; prints what was loaded.

    source is that of `load`; blocks is the model's setting, (block, place) or None. Raises InputError.
    """
    saved = load(source)
    theirs = saved["config"]["blocks"]
    if blocks and theirs and blocks[0] != theirs[0]:  # other blocks may have weights of the same names
        raise InputError(f"--init {source}: its blocks are {theirs[0]}, not {blocks[0]}")
    own, given = model.state_dict(), saved["model"]
    weights = fresh_blocks(model, given) | given
    kept = {key for key in weights if "conv_seg" in key and key in own and weights[key].shape != own[key].shape}
    load_weights(model, {key: own[key] if key in kept else weights[key] for key in weights}, source)
    classifiers = "but the classifiers, which start anew: other classes" if kept else "classifiers too"
    fresh = "; blocks that it lacks start anew" if len(weights) > len(given) else ""
    print(f"--init {source}: all weights, {classifiers}{fresh}")
