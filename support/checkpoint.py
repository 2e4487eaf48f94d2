"""Checkpoints: written, read, and the models built and filled from them.

A checkpoint is a plain dict that torch.load(..., weights_only=True) reads:

    model       state dict; the parameter names are those of the published models
    config      the run's Settings as a dict, some of which build the model and evaluate it
    optimizer, scaler, iteration, best_miou     what else a run needs in order to continue

tools/export.py writes the first two alone. What train.py draws at random follows from the seed and the iteration,
dropout also from the process.
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
    best_miou: float = -1.0  # of the validations so far; last.pt is written before that of its own iteration


def build_model(settings):
    """A new model, on the CPU, from a Settings."""
    options = {"stem_channels": 128, "aux_channels": 512} if settings.cityscapes_ablation else {}
    if options and settings.model == "nonlocal_net":
        options["reduction"] = 4
    model = MODELS[settings.model](len(settings.classes), settings.depth, settings.align_corners, **options)
    if settings.blocks:
        block, place = settings.blocks
        add_blocks(model.backbone, BLOCKS[block], place)
    return model


def write_checkpoint(state, settings, path):
    """Writes a State and a run's Settings as a checkpoint. Raises InputError if it cannot; the file before it stays."""
    saved = {name: getattr(state, name).state_dict() for name in ("model", "optimizer", "scaler")}
    saved |= {"config": vars(settings), "iteration": state.iteration, "best_miou": state.best_miou}
    write_file(path, lambda file: torch.save(saved, file))


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
        what = f"cannot be read as a checkpoint ({type(error).__name__}: {str(error).partition('. ')[0]})"
        if objects := re.search(r"GLOBAL (\S+)", str(error)):
            what = f"holds {objects[1]}, which could run code. If you trust its source, remove it: "
            what += "s = torch.load(PATH, weights_only=False); "
            what += "torch.save({k: s[k] for k in ('meta', 'state_dict')}, PATH)"
        raise InputError(f"{path}: {what}") from None


def read_export(path):
    """{"model", "config"} of a model.safetensors and the config.json beside it."""
    try:
        from safetensors.torch import load as read_tensors
    except ImportError:
        raise InputError(f"{path}: is read with a package that is missing; pip install safetensors") from None
    beside = path.with_name("config.json")
    config, content = json.loads(beside.read_bytes()), path.read_bytes()
    if hashlib.sha256(content).hexdigest() != config["sha256"]:  # the format itself has no checksum
        raise InputError(f"{path}: is damaged, or is not the file that {beside} describes: its SHA-256 is another")
    for name in ("mean", "std", "sha256"):  # the others are settings
        del config[name]
    return {"model": read_tensors(content), "config": config}


def read_checkpoint(source):
    """The checkpoint of a path, a URL, or a published model's name, with its config as a Settings under `settings`. A
    folder stands for the checkpoint in it. Raises InputError."""
    path = zoo.find_file(source)
    saved = read_file(path)
    if isinstance(saved, dict) and "state_dict" in saved:
        saved = zoo.convert_published(saved, path)
    if not (isinstance(saved, dict) and {"model", "config"} <= saved.keys()):
        raise InputError(f"{path}: is no checkpoint of a model: it needs model and config, or state_dict and meta")
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
        first = str(error).splitlines()[1].split('", ')[0].strip().replace('"', "")
        raise InputError(f"{source}: does not fit the model ({first})") from None
    for name, value in module.state_dict().items():
        if not value.isfinite().all():
            raise InputError(f"{source}: {name} holds values that are not finite; use an earlier checkpoint")


def load_model(source, stride=None):
    """(model, settings) of a checkpoint, on the CPU; source is that of `read_checkpoint`. With a stride (down,
    across) the model is evaluated in sliding windows. Raises InputError."""
    saved = from_rank_0(read_checkpoint, source)
    settings = saved["settings"]
    settings.stride = stride or settings.stride
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


def set_first_weights(model, settings):
    """Starts the model of a new run as --init or --pretrained says, in all processes from what rank 0 has read. Raises
    InputError if it does not fit."""

    def read_weights():
        if settings.init:
            start_from_checkpoint(model, settings.init, settings.blocks)
        elif settings.pretrained != "none":
            start_from_imagenet(model, settings.pretrained, settings.depth)
        return model.state_dict()

    model.load_state_dict(from_rank_0(read_weights))


def weights_of_new_blocks(module, saved):
    """The module's weights of the context blocks that the weights `saved` lack."""
    known = {key.partition(".context_block.")[0] for key in saved}
    own = {key: value for key, value in module.state_dict().items() if ".context_block." in key}
    return {key: value for key, value in own.items() if key.partition(".context_block.")[0] not in known}


def start_from_imagenet(model, source, depth):
    """Starts the model's backbone from ImageNet weights: "imagenet", a path or URL. Raises InputError."""
    if source == "imagenet" and depth not in zoo.BACKBONES:
        raise InputError(f"--pretrained imagenet: there are such weights for depth 18, 50 and 101, not {depth}")
    try:
        saved = read_file(zoo.find_file(zoo.BACKBONES[depth] if source == "imagenet" else source))
    except InputError as error:
        raise InputError(f"{error}; without ImageNet weights: --pretrained none") from None
    weights = {name: value for name, value in saved.get("state_dict", saved).items() if not name.startswith("fc.")}
    if "conv1.weight" in weights:
        raise InputError(f"{source}: is a ResNet with a 7x7 stem; a ResNet-v1c is needed, as in {zoo.BACKBONES[50]}")
    load_weights(model.backbone, weights_of_new_blocks(model.backbone, weights) | weights, source)


def start_from_checkpoint(model, source, blocks=None):
    """Starts the model from a checkpoint, but for classifiers with another number of classes; prints what was loaded.

    source is that of `read_checkpoint`; blocks is the model's setting, (block, place) or None. Raises InputError.
    """
    saved = read_checkpoint(source)
    theirs = saved["settings"].blocks
    if blocks and theirs and blocks[0] != theirs[0]:  # other blocks may have weights of the same names
        raise InputError(f"--init {source}: its blocks are {theirs[0]}, not {blocks[0]}")
    own = model.state_dict()
    new_blocks = weights_of_new_blocks(model, saved["model"])
    weights = new_blocks | saved["model"]
    shared = own.keys() & weights.keys()
    kept = {key: own[key] for key in shared if "conv_seg" in key and weights[key].shape != own[key].shape}
    load_weights(model, weights | kept, source)
    text = "; not its classifiers, which have another number of classes" * bool(kept)
    print(f"--init {source}: loaded all weights{text}{'; the new blocks begin as new' * bool(new_blocks)}")
