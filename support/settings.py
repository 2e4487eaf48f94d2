"""Every setting of a run, declared once: options, checkpoints and resuming follow from it; and the presets."""

import argparse
import math
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
    **{f"gc{ratio}": partial(GCBlock, ratio=ratio) for ratio in (4, 8, 16, 32)},
    "gc16-avg": partial(GCBlock, ratio=16, pooling="avg"),
    "gc16-mul": partial(GCBlock, ratio=16, fusion="mul"),
    "gc16-avg-mul": partial(GCBlock, ratio=16, pooling="avg", fusion="mul"),
}
PLACES = ("res4", "alternate", "res3-res5")  # of gcnet.add_blocks
BLOCKS_HELP = f"{', '.join(BLOCKS)}; places: {', '.join(PLACES)}, which gcnet.add_blocks explains"
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # --amp: the type of mixed precision


class Preset(NamedTuple):
    """A data set and the recipe for it."""

    data: Callable  # (root, split) -> images.Files or scenes.Scenes
    scale: tuple | None  # (long, short) side to which images are resized; None: each keeps its size
    crop_size: tuple  # (height, width); also of the window, where inference slides one
    batch_size: int  # images per process; where a recipe is published, 4 processes make its images per step
    images_per_step: int | None  # in all processes, as published; None: the recipe is this project's own
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
    "context":       Preset(scenes.context,     None,         (32, 160),   4, None, 300,  0.1, depth=18, ratios=(1, 1)),
    "legend":        Preset(scenes.legend,      None,         (32, 221),   4, None, 800,  0.1, depth=18, ratios=(1, 1)),
}
# fmt: on


def number_above_0(text):
    """A finite number above 0, for argparse."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return float(text)


def absolute(text):
    """An absolute path, for argparse."""
    return os.path.realpath(os.path.expanduser(text))


def setting(help=None, default=None, free=False, **parsing):
    """A field of Settings, an option of train.py if it has a help. default holds where `defaults` has none; free: a
    resumed run may have another value; parsing is what argparse needs: type, choices, nargs, metavar."""
    return field(default=default, metadata={"help": help, "free": free, "parsing": parsing})


@dataclass(kw_only=True)
class Settings:
    """The settings of a run, under the names of train.py's options. A checkpoint keeps them as a dict, `config`; a
    published model has only those that build and evaluate it."""

    model: str = setting("the model to train", "gcnet", choices=tuple(MODELS))
    dataset: str = setting("data set and recipe; the last three are synthetic", "shapes", choices=tuple(PRESETS))
    data_root: str = setting("the data set's folder (default: its name below data/)", free=True, type=absolute)
    depth: int = setting("of the ResNet", type=int, choices=tuple(ResNetD8.BLOCKS))
    blocks: list = setting(f"put blocks into the ResNet: {BLOCKS_HELP}", nargs=2, metavar=("BLOCK", "PLACE"))
    cityscapes_ablation: bool = setting("the model sizes of GCNet's Cityscapes ablation", False)
    crop_size: list = setting("of crops, and of --stride's windows", type=positive, nargs=2, metavar=("H", "W"))
    stride: list = setting("evaluate in windows this far apart", free=True, type=positive, nargs=2, metavar=("H", "W"))
    batch_size: int = setting("images per process; the published recipes have 4 processes", free=True, type=positive)
    accumulate: int = setting("batches per step", 1, free=True, type=positive)
    iters: int = setting("steps", type=positive)
    lr: float = setting("the first learning rate", type=number_above_0)
    pretrained: str = setting("the backbone's weights: imagenet (not for depth 34), none, a file or a URL")
    init: str = setting("start from the weights of a checkpoint: file, folder, URL or published name")
    class_weights: list = setting("the weight of each class in the loss", type=number_above_0, nargs="+", metavar="W")
    amp: str = setting("mixed precision", "none", choices=tuple(AMP))
    compile: bool = setting("torch.compile the model", False)
    deterministic: bool = setting("ask torch for deterministic kernels, which are slower on a GPU", False)
    cache: str = setting("a folder to keep decoded images in, for faster reading", free=True, type=absolute)
    workers: int = setting("data-loading workers of each process", 2, free=True, type=whole_number)
    seed: int = setting("of the weights, the order, the augmentation and dropout", 0, type=whole_number)
    # Decided by the preset alone.
    scale: list = setting()
    ratios: list = setting()  # between which the training images' random ratio is drawn
    align_corners: bool = setting(default=False)
    # Not known before the data set is opened and the processes are counted.
    classes: list = setting()
    palette: list = setting()
    effective_batch: int = setting()  # images per step, in all processes together


def defaults(given):
    """The default settings for the data set in the dict `given`; some follow from its depth and crop_size, too."""
    dataset = given.get("dataset", "shapes")
    preset = PRESETS[dataset]
    crop_size = given.get("crop_size", preset.crop_size)
    backbone_fits = given.get("depth", preset.depth) in BACKBONES and not given.get("cityscapes_ablation")
    needs_none = given.get("init") or dataset in ("shapes", "context", "legend")
    return {
        "depth": preset.depth,
        "crop_size": list(preset.crop_size),
        "batch_size": preset.batch_size,
        "iters": preset.iters,
        "lr": preset.lr,
        "pretrained": "imagenet" if backbone_fits and not needs_none else "none",
        "scale": preset.scale and list(preset.scale),
        "ratios": list(preset.ratios),
        "align_corners": preset.align_corners,
        "stride": preset.stride and [min(pair) for pair in zip(preset.stride, crop_size, strict=True)],
    }


def check_stride(settings):
    """Raises InputError if there is a stride, and windows of crop_size that are so far apart do not cover an image."""
    window, stride = settings.crop_size, settings.stride
    if stride and not window:
        raise InputError("--stride: the checkpoint does not say how large its crops were, which are the windows")
    if stride and (stride[0] > window[0] or stride[1] > window[1]):
        raise InputError(f"--stride {stride[0]} {stride[1]}: leaves gaps between windows of {window[0]} {window[1]}")


def parse_arguments(description):
    """(given, out, resume, device) of train.py's command line: a dict of the settings that it gives, the run's folder
    as a Path, whether to continue an existing run, and the device's name or None. Raises InputError for a mistake."""
    first, _ = option_parser(description, {}, add_help=False).parse_known_args()  # to know whose defaults to show
    given = vars(option_parser(description, vars(first)).parse_args())
    out = given.pop("out", None)
    resume = given.pop("resume", False)
    device_name = given.pop("device", None)
    new = Settings(**defaults(given) | given)
    out = Path(os.path.expanduser(out or f"runs/{new.model}-r{new.depth}-{new.dataset}"))
    block, place = given.get("blocks", (None, None))
    if block and not (block in BLOCKS and place in PLACES):
        raise InputError(f"--blocks {block} {place}: there is no such block and place; --help lists them")
    if "init" in given and "pretrained" in given:
        raise InputError("--init and --pretrained: a run starts from one of them")
    return given, out, resume, device_name


def option_parser(description, given, **options):
    """A parser of train.py's options, which leaves out what is not on the command line; its help shows the defaults for
    the data set and depth in `given`."""
    note = f"The defaults are those of --dataset {given.get('dataset', 'shapes')}; --dataset X --help shows those of X."
    parser = Parser(description, argument_default=argparse.SUPPRESS, epilog=note, **options)
    shown = defaults(given)
    for option in fields(Settings):
        if not option.metadata["help"]:
            continue
        default = shown.get(option.name, option.default)
        words = " ".join(map(str, default)) if isinstance(default, list) else default
        text = option.metadata["help"] + ("" if default is None or default is False else f" (default: {words})")
        parsing = {"action": "store_true"} if option.type is bool else option.metadata["parsing"]
        parser.add_argument(flag(option), help=text, **parsing)
    parser.add_device()
    parser.add_argument("--out", metavar="DIR", help="the run's folder (default: runs/MODEL-rDEPTH-DATASET)")
    parser.add_argument("--resume", action="store_true", help="continue --out's run, or start one as the options say")
    return parser


def flag(option):
    return "--" + option.name.replace("_", "-")


def refuse_changes(given, settings, out):
    """Raises InputError if the command line gives the run in `out` other settings than it has."""
    for option in fields(Settings):
        had = getattr(settings, option.name)
        if not option.metadata["free"] and given.get(option.name, had) != had:
            advice = f"--init {out}/last.pt --out NEW starts another run from its weights"
            raise InputError(f"{flag(option)} {given[option.name]}: the run in {out} has {had}; {advice}")
