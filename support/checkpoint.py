"""Checkpoints: written, read, and the models built and filled from them.

A checkpoint is a plain dict that torch.load(..., weights_only=True) reads:

    model       state dict; the parameter names are those of the published models
    config      the run's Settings as a dict, some of which build the model and evaluate it
    optimizer, scaler, iteration, best_miou     what else a run needs in order to continue

tools/export.py writes the first two alone, as model.safetensors and config.json in a folder.

No state of random numbers is needed: all that train.py draws follows from the seed and the iteration.
"""

import hashlib
import json
import re
import zipfile
from dataclasses import dataclass

import torch

from gcnet import add_blocks
from support import zoo
from support.command import InputError
from support.files import write_file
from support.processes import from_rank_0
from support.settings import BLOCKS, MODELS, Settings, check_stride


@dataclass
class State:
    """What training changes, and a checkpoint keeps."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    iteration: int = 0  # the steps taken
    best_miou: float = -1.0  # of all validations


def build_model(settings):
    """A new model, on the CPU, from a Settings."""
    options = {}
    if settings.cityscapes_ablation:
        options = {"stem_channels": 128, "aux_channels": 512}
        if settings.model == "nonlocal_net":
            options["reduction"] = 4
    model = MODELS[settings.model](len(settings.classes), settings.depth, settings.align_corners, **options)
    if settings.blocks:
        block, place = settings.blocks
        add_blocks(model.backbone, BLOCKS[block], place)
    return model


# ------------------------------------------------------------------------------------------------------------ writing


def write_checkpoint(state, settings, path):
    """Writes a State and a run's Settings as a checkpoint. Raises InputError if it cannot; the file before it stays."""
    saved = {name: getattr(state, name).state_dict() for name in ("model", "optimizer", "scaler")}
    saved |= {"config": vars(settings), "iteration": state.iteration, "best_miou": state.best_miou}
    write_file(path, lambda file: torch.save(saved, file))


# ------------------------------------------------------------------------------------------------------------ reading


def read_file(path):
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
    except Exception as error:  # a damaged file can meet any of them
        objects = re.search(r"GLOBAL (\S+)", str(error))
        if not objects:
            what = f"{type(error).__name__}: {str(error):.80}"
            raise InputError(f"{path}: cannot be read as a checkpoint ({what})") from None
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
    config, content = json.loads(beside.read_bytes()), path.read_bytes()
    if hashlib.sha256(content).hexdigest() != config["sha256"]:  # the format itself has no checksum
        raise InputError(f"{path}: is damaged, or is not the file that {beside} describes: its SHA-256 is another")
    for name in ("mean", "std", "sha256"):  # the others are settings
        del config[name]
    return {"model": read_tensors(content), "config": config}


def read_checkpoint(source):
    """The checkpoint, as the module says, of a path, a URL, or a published model's name, with its config as a Settings
    under `settings`. A folder stands for the model.safetensors or best.pt in it. Raises InputError."""
    path = zoo.find_file(source)
    saved = read_file(path)
    if isinstance(saved, dict) and "state_dict" in saved:
        saved = zoo.convert(saved, path)
    if not (isinstance(saved, dict) and {"model", "config"} <= saved.keys()):
        raise InputError(f"{path}: is no checkpoint of a model; it has no config and model, nor state_dict and meta")
    try:
        saved["settings"] = Settings(**saved.pop("config"))
    except TypeError as error:
        raise InputError(f"{path}: its config builds no model here ({error})") from None
    return saved


def load_weights(module, weights, source):
    """load_state_dict, strictly. InputError names the first weight that does not fit, or is not finite."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].split('", ')[0].strip()
        raise InputError(f"{source}: does not fit the model ({first})") from None
    for name, value in module.state_dict().items():
        if not value.isfinite().all():
            raise InputError(f"{source}: {name} holds values that are not finite; use an earlier checkpoint")


def load_model(source, stride=None):
    """(model, settings) of a checkpoint, on the CPU; source is that of `read_checkpoint`. stride (down, across) has the
    model evaluated in sliding windows. Raises InputError."""
    saved = from_rank_0(read_checkpoint, source)
    settings = saved["settings"]
    if stride:
        settings.stride = stride
        check_stride(settings)
    try:
        model = build_model(settings)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{source}: its config builds no model here ({type(error).__name__}: {error})") from None
    load_weights(model, saved["model"], source)
    return model, settings


def restore(state, saved, source):
    """Puts the checkpoint `saved` of a run into its State. Raises InputError if its weights do not fit."""
    load_weights(state.model, saved["model"], source)
    state.optimizer.load_state_dict(saved["optimizer"])
    state.scaler.load_state_dict(saved["scaler"])
    state.iteration, state.best_miou = saved["iteration"], saved["best_miou"]


# ------------------------------------------------------------------------------------------- what a new run starts from


def set_first_weights(model, settings):
    """Starts the model of a new run as --init or --pretrained says, in all processes from what process 0 has read.
    Raises InputError if it does not fit."""

    def read_weights():
        if settings.init:
            start_from_checkpoint(model, settings.init, settings.blocks)
        elif settings.pretrained != "none":
            start_from_imagenet(model, settings.pretrained, settings.depth)
        return model.state_dict()

    model.load_state_dict(from_rank_0(read_weights))


def weights_of_new_blocks(module, given):
    """The present weights of those blocks in a backbone of which a file's weights `given` have none."""
    known = {key.partition(".context_block.")[0] for key in given}
    own = {key: value for key, value in module.state_dict().items() if ".context_block." in key}
    return {key: value for key, value in own.items() if key.partition(".context_block.")[0] not in known}


def start_from_imagenet(model, source, depth):
    """Starts the model's backbone from ImageNet weights: "imagenet", a path or URL. Raises InputError."""
    if source == "imagenet":
        if depth not in zoo.BACKBONES:
            raise InputError(f"--pretrained imagenet: there are such weights for depth 18, 50 and 101, not {depth}")
        source = zoo.BACKBONES[depth]
    try:
        saved = read_file(zoo.find_file(source))
    except InputError as error:
        raise InputError(f"{error}; without ImageNet weights: --pretrained none") from None
    weights = {name: value for name, value in saved.get("state_dict", saved).items() if not name.startswith("fc.")}
    load_weights(model.backbone, weights_of_new_blocks(model.backbone, weights) | weights, source)


def start_from_checkpoint(model, source, blocks=None):
    """Starts the model from a checkpoint, but for classifiers with another number of classes; prints what was loaded.

    source is that of `read_checkpoint`; blocks is the model's setting, (block, place) or None. Raises InputError.
    """
    saved = read_checkpoint(source)
    theirs = saved["settings"].blocks
    if blocks and theirs and blocks[0] != theirs[0]:  # other blocks may have weights of the same names
        raise InputError(f"--init {source}: its blocks are {theirs[0]}, not {blocks[0]}")
    own, given = model.state_dict(), saved["model"]
    weights = weights_of_new_blocks(model, given) | given
    kept = {key for key in weights if "conv_seg" in key and key in own and weights[key].shape != own[key].shape}
    load_weights(model, {key: own[key] if key in kept else weights[key] for key in weights}, source)
    classifiers = "without the classifiers: they have another number of classes" if kept else "with the classifiers"
    fresh = "; without blocks, which it does not have" if len(weights) > len(given) else ""
    print(f"--init {source}: all weights, {classifiers}{fresh}")
