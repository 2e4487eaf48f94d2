"""Every setting of a run, declared once, and the presets: a data set and the recipe for it.

train.py's options and --help, what a checkpoint keeps and what a resumed run may not change follow from `Settings`.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from ann import ANN
from gcnet import GCBlock, GCNet, SimplifiedNonLocalBlock, SNLNet
from nonlocal_net import NonLocalBlock, NonLocalNet
from resnet_d8 import FCN, ResNetD8
from support import layouts, scenes
from support.command import InputError, Parser, positive, whole_number
from support.zoo import BACKBONES

MODELS = {"gcnet": GCNet, "nonlocal_net": NonLocalNet, "ann": ANN, "snlnet": SNLNet, "fcn": FCN}
BLOCKS = {  # each is made for a number of channels; "mul" is the paper's "scale"
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
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # --amp: the type of mixed precision


class Preset(NamedTuple):
    """A data set and the recipe for it."""

    data: Callable  # (root, split) -> images.Files or scenes.Scenes
    scale: tuple | None  # (long, short) side to which images are resized; None: each keeps its size
    crop_size: tuple  # (height, width); also of the window, where inference slides one
    batch_size: int  # images per process, for the published number of images with 4 processes
    images: int | None  # per step in all processes, as published; None: the recipe is this project's own
    iters: int
    lr: float
    align_corners: bool = False
    stride: tuple | None = None  # (down, across) of the sliding window; None: inference on whole images
    depth: int = 50
    ratios: tuple = (0.5, 2)  # of the random resizing


# fmt: off
PRESETS = {
    #                                           long, short    crop h, w  batch, images  iters   lr  align  stride
    "cityscapes":    Preset(layouts.cityscapes, (2048, 1024), (512, 1024), 2, 8,    40_000, 0.01),
    "cityscapes769": Preset(layouts.cityscapes, (2049, 1025), (769, 769),  2, 8,    40_000, 0.01, True, (513, 513)),
    "ade20k":        Preset(layouts.ade20k,     (2048, 512),  (512, 512),  4, 16,   80_000, 0.01),
    "voc12aug":      Preset(layouts.voc12aug,   (2048, 512),  (512, 512),  4, 16,   20_000, 0.01),
    "folder":        Preset(layouts.folder,     None,         (512, 512),  4, None, 20_000, 0.01),
    "shapes":        Preset(scenes.shapes,      None,         (64, 64),    8, None, 240,    0.03, depth=18),
    # A crop out of an enlarged scene could lack the sky or the legend, which decide the labels: no random resizing.
    "context":       Preset(scenes.context,     None,         (32, 160),   8, None, 300,  0.1, depth=18, ratios=(1, 1)),
    "legend":        Preset(scenes.legend,      None,         (32, 221),   8, None, 1600, 0.1, depth=18, ratios=(1, 1)),
}
# fmt: on
DRAWN = ("shapes", "context", "legend")  # which need no downloads


# ------------------------------------------------------------------------------------------------------- the settings


def rate(text):
    """A finite number above 0, for argparse."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return float(text)


def absolute(text):
    """An absolute path, for argparse."""
    return os.path.realpath(os.path.expanduser(text))


def setting(help=None, default=None, free=False, **parsing):
    """A field of Settings.

    help     of its option; without one it is no option
    default  where `defaults` has none for it
    free     whether a resumed run may have another value
    parsing  what argparse needs: type, choices, nargs, metavar
    """
    return field(default=default, metadata={"help": help, "free": free, "parsing": parsing})


@dataclass(kw_only=True)
class Settings:
    """The settings of a run, under the names of train.py's options. A checkpoint keeps them all as a dict, `config`; of
    a published model only those are known that build and evaluate it."""

    model: str = setting("the model to train", "gcnet", choices=tuple(MODELS))
    dataset: str = setting("also selects the preset; those from shapes on are drawn", "shapes", choices=tuple(PRESETS))
    data_root: str = setting("the data set's folder (default: its name below data/)", free=True, type=absolute)
    depth: int = setting("of the ResNet", type=int, choices=tuple(ResNetD8.BLOCKS))
    blocks: list = setting(
        f"put blocks into the ResNet: {', '.join(BLOCKS)}; "
        f"place: {', '.join(f'{place} ({meaning})' for place, meaning in PLACES.items())}",
        nargs=2,
        metavar=("BLOCK", "PLACE"),
    )
    cityscapes_ablation: bool = setting(
        "as in GCNet's ablation: stem of 128 channels, auxiliary head of 512, NL in a quarter", False
    )
    crop_size: list = setting("of the training crops", type=positive, nargs=2, metavar=("H", "W"))
    stride: list = setting("evaluate in crops this far apart", free=True, type=positive, nargs=2, metavar=("H", "W"))
    batch_size: int = setting("images per process; the preset's is made for 4 processes", free=True, type=positive)
    accumulate: int = setting("batches per step", 1, type=positive)
    iters: int = setting("steps", type=positive)
    lr: float = setting("the first learning rate", type=rate)
    pretrained: str = setting("the backbone's weights: imagenet (but for depth 34), none, a file or a URL")
    init: str = setting("start from the weights of a checkpoint: file, folder, URL or published name")
    class_weights: list = setting("in the loss: one per class, or: balanced", nargs="+", metavar="W")
    amp: str = setting("mixed precision", "none", choices=tuple(AMP))
    compile: bool = setting("torch.compile the model", False)
    deterministic: bool = setting("ask torch for deterministic kernels, which are slower on a GPU", False)
    cache: str = setting("a folder to keep decoded images in, for faster reading", free=True, type=absolute)
    workers: int = setting("data-loading processes of each process", 2, free=True, type=whole_number)
    seed: int = setting("of the weights, the order and the augmentation", 0, type=whole_number)
    # Decided by the preset alone.
    scale: list = setting()
    ratios: list = setting()  # between which the training images' random ratio is drawn
    align_corners: bool = setting(default=False)
    # Not known before the data set is opened and the processes are counted.
    classes: list = setting()
    palette: list = setting()
    effective_batch: int = setting()  # images per step, in all processes together


def defaults(given):
    """The settings that follow from the data set, depth and crop in `given`, a dict of settings."""
    dataset = given.get("dataset", "shapes")
    preset = PRESETS[dataset]
    crop_size = given.get("crop_size", preset.crop_size)
    has_weights = given.get("depth", preset.depth) in BACKBONES and not given.get("cityscapes_ablation")
    return {
        "depth": preset.depth,
        "crop_size": list(preset.crop_size),
        "batch_size": preset.batch_size,
        "iters": preset.iters,
        "lr": preset.lr,
        "pretrained": "imagenet" if has_weights and dataset not in DRAWN else "none",
        "scale": preset.scale and list(preset.scale),
        "ratios": list(preset.ratios),
        "align_corners": preset.align_corners,
        "stride": preset.stride and [min(pair) for pair in zip(preset.stride, crop_size, strict=True)],
    }


def check_stride(settings):
    """Raises InputError if windows of crop_size that are `stride` apart would not cover an image."""
    window, stride = settings.crop_size, settings.stride
    if not window:
        raise InputError("--stride: the checkpoint does not say how large its crops were, which are the windows")
    if stride[0] > window[0] or stride[1] > window[1]:
        raise InputError(f"--stride {stride[0]} {stride[1]}: leaves gaps between windows of {window[0]} {window[1]}")


# --------------------------------------------------------------------------------------------- from the command line


def parse(description):
    """(given, out, resume, device) of train.py's command line: a dict of the settings that it gives, the run's folder
    as a Path, whether to continue an existing run, and the device's name or None. Raises InputError for a mistake."""
    first, _ = option_parser(description, {}, add_help=False).parse_known_args()  # to know whose defaults to show
    given = vars(option_parser(description, vars(first)).parse_args())
    out = given.pop("out", None)
    resume = given.pop("resume", False)
    device_name = given.pop("device", None)
    if out is None:
        new = Settings(**defaults(given) | given)
        out = f"runs/{new.model}-r{new.depth}-{new.dataset}"
    block, place = given.get("blocks", (None, None))
    if block and not (block in BLOCKS and place in PLACES):
        raise InputError(f"--blocks {block} {place}: there is no such block and place; --help lists them")
    if "init" in given and "pretrained" in given:
        raise InputError("--init and --pretrained: a run starts from one of them")
    return given, Path(os.path.expanduser(out)), resume, device_name


def option_parser(description, given, **options):
    """A parser of train.py's options. It leaves out what is not on the command line, for the preset or the resumed run
    to fill in; its help shows the defaults for the data set and depth in `given`."""
    note = f"The defaults are those of --dataset {given.get('dataset', 'shapes')}; --dataset X --help shows those of X."
    parser = Parser(description, argument_default=argparse.SUPPRESS, epilog=note, **options)
    shown = defaults(given)
    for each in fields(Settings):
        if not each.metadata["help"]:
            continue
        default = shown.get(each.name, each.default)
        words = " ".join(map(str, default)) if isinstance(default, list) else default
        text = each.metadata["help"] + ("" if default is None or default is False else f" (default: {words})")
        parsing = {"action": "store_true"} if each.type is bool else each.metadata["parsing"]
        parser.add_argument(flag(each), help=text, **parsing)
    parser.add_device()
    parser.add_argument("--out", metavar="DIR", help="the run's folder (default: runs/MODEL-rDEPTH-DATASET)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, or start it if there is none")
    return parser


def flag(each):
    return "--" + each.name.replace("_", "-")


def refuse_changes(given, settings, out):
    """Raises InputError if the command line gives the run in `out` other settings than it has."""
    for each in fields(Settings):
        had = getattr(settings, each.name)
        if not each.metadata["free"] and given.get(each.name, had) != had:
            advice = f"; --init {out}/last.pt --out NEW starts another run from its weights" * (each.name == "iters")
            raise InputError(f"{flag(each)} {given[each.name]}: the run in {out} has {had or 'none'}{advice}")
