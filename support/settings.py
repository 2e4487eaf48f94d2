"""Every setting of a training run, declared once, and the presets.

train.py's options and --help, config.json, the check of an edited config.json, and what a resumed run may not change
all follow from `Settings`.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from resnet_d8 import ResNetD8
from support import layouts, run, scenes
from support.checkpoint import BLOCKS, CONFIG, MODELS, PLACES, load, modernise, set_stride
from support.command import InputError, Parser, positive, whole_number
from support.processes import check_same, gather, has_begun, rank_and_world, share
from support.zoo import BACKBONES

LOCAL = ("data_root", "cache", "workers")  # each machine may have its own
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
    "context":       Preset(scenes.context,     None,         (32, 160),   8, None, 300, 0.1, depth=18, ratios=(1, 1)),
    "legend2":   Preset(partial(scenes.legend, 2, 2), None,   (32, 167),   8, None, 1600, 0.1, depth=18, ratios=(1, 1)),
    "legend3":   Preset(partial(scenes.legend, 3, 2), None,   (32, 194),   8, None, 1600, 0.1, depth=18, ratios=(1, 1)),
    "legend4":   Preset(partial(scenes.legend, 4, 2), None,   (32, 221),   8, None, 1600, 0.1, depth=18, ratios=(1, 1)),
    "legend2x4": Preset(partial(scenes.legend, 2, 4), None,   (32, 167),   8, None, 1600, 0.1, depth=18, ratios=(1, 1)),
}
# fmt: on
DRAWN = ("shapes", "context", "legend2", "legend3", "legend4", "legend2x4")  # which need no downloads


# ------------------------------------------------------------------------------------------------------- the settings


def rate(text):
    """A finite number above 0, for argparse."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return float(text)


def absolute(text):
    """An absolute path, for argparse."""
    return os.path.realpath(os.path.expanduser(text))


def setting(help=None, default=MISSING, free=False, **parsing):
    """A field of Settings.

    help     of its option; without one it is no option
    default  if there is none, `defaults` gives it
    free     whether a resumed run may have another value
    parsing  what argparse needs: type, choices, nargs, metavar
    """
    return field(default=default, metadata={"help": help, "free": free, "parsing": parsing})


@dataclass(kw_only=True)
class Settings:
    """The settings of a run, by the names that train.py's options, config.json and a checkpoint's config have."""

    model: str = setting("the model to train", "gcnet", choices=tuple(MODELS))
    dataset: str = setting("also selects the preset; those from shapes on are drawn", "shapes", choices=tuple(PRESETS))
    data_root: str | None = setting("the data set's folder (default: its name below data/)", None, True, type=absolute)
    depth: int = setting("of the ResNet", type=int, choices=tuple(ResNetD8.BLOCKS))
    blocks: list | None = setting(
        f"put blocks into the ResNet: {', '.join(BLOCKS)}; "
        f"place: {', '.join(f'{place} ({meaning})' for place, meaning in PLACES.items())}",
        None,
        nargs=2,
        metavar=("BLOCK", "PLACE"),
    )
    cityscapes_ablation: bool = setting(
        "as in GCNet's ablation: stem of 128 channels, auxiliary head of 512, NL in a quarter", False
    )
    crop_size: list = setting("of the training crops", type=positive, nargs=2, metavar=("H", "W"))
    stride: list | None = setting(
        "evaluate in crops this far apart", free=True, type=positive, nargs=2, metavar=("H", "W")
    )
    batch_size: int = setting("images per process; the preset's is made for 4 processes", free=True, type=positive)
    accumulate: int = setting("batches per step", 1, free=True, type=positive)
    iters: int = setting("steps", type=positive)
    lr: float | int = setting("the first learning rate", type=rate)
    pretrained: str = setting("the backbone's weights: imagenet (but for depth 34), none, a file or a URL")
    init: str | None = setting("start from the weights of a checkpoint: file, folder, URL or published name", None)
    class_weights: list | None = setting("in the loss: one per class, or: balanced", None, nargs="+", metavar="W")
    amp: str = setting("mixed precision", "none", choices=tuple(AMP))
    compile: bool = setting("torch.compile the model", False)
    deterministic: bool = setting("ask torch for deterministic kernels, which are slower on a GPU", False)
    cache: str | None = setting("a folder to keep decoded images in, for faster reading", None, True, type=absolute)
    workers: int = setting("data-loading processes of each process", 2, free=True, type=whole_number)
    seed: int = setting("of the weights, the order and the augmentation", 0, type=whole_number)
    # Decided by the preset alone.
    scale: list | None = setting()
    align_corners: bool = setting()
    # Added by `complete`.
    effective_batch: int | None = setting(default=None)  # images per step, in all processes together
    classes: list | None = setting(default=None)
    palette: list | None = setting(default=None)


def defaults(given):
    """The settings that have no default of their own: what follows from the data set, depth and crop in `given`."""
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
        "align_corners": preset.align_corners,
        "stride": preset.stride and [min(pair) for pair in zip(preset.stride, crop_size, strict=True)],
    }


# --------------------------------------------------------------------------------------------- from the command line


def parse(description):
    """(given, out, resume, device) of train.py's command line: a dict of the settings that it gives, the run's folder
    as a Path, whether the run may be there already, and the device's name or None. Raises InputError for a mistake."""
    first, _ = option_parser(description, {}, add_help=False).parse_known_args()  # to know whose defaults to show
    given = vars(option_parser(description, vars(first)).parse_args())
    out = given.pop("out", None)
    resume = given.pop("resume", False)
    device_name = given.pop("device", None)
    if out is None:
        new = Settings(**defaults(given) | given)
        out = f"runs/{new.model}-r{new.depth}-{new.dataset}"
    if not CONFIG["blocks"](given.get("blocks")):
        raise InputError(f"--blocks {' '.join(given['blocks'])}: is no BLOCK and PLACE; --help names them")
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


# ------------------------------------------------------------------------------------ one decision for all processes


def agree(given, out, resume):
    """(settings, saved, leader) of a run, from what `parse` returns. Settings that are not given come from the preset
    or the resumed run. saved is the run's checkpoint, None if it has none.

    One process decides for all, and writes to the folder `out` from then on: `leader`, in whose folder the run has come
    farthest. The others need no such folder. Raises InputError if the run may not begin or continue like this.
    """
    resume = resume or any(gather(has_begun()))
    alone = rank_and_world()[1] == 1
    reached = gather((-1, None) if alone or not resume else reached_by(out))
    if len({run for _, run in reached if run}) > 1:
        raise InputError(f"{out}: the machines hold different runs there; keep one, or name another folder with --out")
    leader = reached.index(max(reached, key=lambda state: state[0]))
    settings, saved = share(lambda: decide(given, out, resume), leader)
    own = {name: given[name] for name in LOCAL if name in given}
    check_same("the command line", sorted((name, value) for name, value in given.items() if name not in LOCAL))
    return replace(settings, **own), saved, leader


def reached_by(out):
    """(iteration, text of what makes the run this run) of the state in a folder, (-1, None) if there is none."""
    try:
        saved = load(out / "last.pt")
        kept = [saved["config"].get(each.name) for each in fields(Settings) if not each.metadata["free"]]
        return saved["iteration"], str(kept)
    except (InputError, KeyError):
        return -1, None


def decide(given, out, resume):
    """(settings, saved) as of `agree`, from what the folder `out` of this process holds."""
    run.lock(out)
    begun = run.held(out)
    saved = None
    if begun and not resume:
        what = f"already holds a run ({begun.name})"
        raise InputError(f"{out}: {what}; continue it with --resume, delete it, or name another folder with --out")
    if begun:
        known = read_settings(out)
        refuse_changes(given, known, out)
        if (out / "last.pt").exists():
            saved = load(out / "last.pt")
            for name in ("model", "depth", "blocks", "cityscapes_ablation", "align_corners"):
                if saved["config"][name] != known[name]:
                    was = saved["config"][name]
                    raise InputError(f"{out}/config.json: {name}: {known[name]}, but last.pt was trained with {was}")
        elif (out / "best.pt").exists():
            raise InputError(f"{out}: holds no last.pt to continue from; --init {out}/best.pt starts a new run")
    else:
        known = defaults(given)
    settings = Settings(**known | given)
    set_stride(vars(settings), settings.stride)
    if settings.batch_size == 1 and max(settings.crop_size) <= 8:
        raise InputError("--batch-size 1 with --crop-size 8 8 or less: BatchNorm needs more than one value per channel")
    return settings, saved


# ---------------------------------------------------------------------------------------------- from a run to resume


def read_settings(out):
    """The settings in a run's config.json, edited or not. Raises InputError where an option would not take them."""
    saved = run.read_config(out)
    modernise(saved)
    path = out / "config.json"
    known = {each.name: each for each in fields(Settings)}
    for name, value in saved.items():
        if name not in known:
            raise InputError(f"{path}: there is no setting {name}")
        try:
            check(known[name], value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            what = f"argument {flag(known[name])}" if known[name].metadata["help"] else name
            raise InputError(f"{path}: {what}: {error}") from None
    for name, sound in CONFIG.items():
        if saved.get(name) is not None and not sound(saved[name]):
            raise InputError(f"{path}: {name}: cannot be {saved[name]!r:.60}")
    for name, each in known.items():
        if name not in saved and each.default is not None and each.default is not False:
            raise InputError(f"{path}: lacks the setting {name}")
    return saved


def check(each, value):
    """Raises ValueError or ArgumentTypeError if the setting `each` cannot have this value."""
    parsing = each.metadata["parsing"]
    words = value if isinstance(value, list) else [value]
    if not isinstance(value, each.type) or value is not None and parsing.get("nargs") not in (None, "+", len(words)):
        raise ValueError(f"cannot be {value!r}; its type is {getattr(each.type, '__name__', each.type)}")
    for word in words if value is not None else ():
        parsing.get("type", str)(str(word))
        if word not in parsing.get("choices", [word]):
            raise ValueError(f"cannot be {word!r}; choose from {', '.join(map(str, parsing['choices']))}")


def refuse_changes(given, saved, out):
    """Raises InputError if the command line gives the run in `out` other settings than it has."""
    for each in fields(Settings):
        had = saved.get(each.name, each.default)
        if not each.metadata["free"] and given.get(each.name, had) != had:
            raise InputError(f"{flag(each)} {given[each.name]}: the run in {out} has {had}")


# ---------------------------------------------------------------------------------- from the data and the processes


def complete(settings, out, train_data, val_data):
    """Fills in the settings' accumulate, effective_batch, classes and palette, which follow from the data and the
    number of processes. Raises InputError if they do not fit the resumed run."""
    at_once = settings.batch_size * rank_and_world()[1]
    wanted = settings.effective_batch or at_once * settings.accumulate
    if wanted % at_once:
        raise InputError(f"--batch-size: the run in {out} has {wanted} images per step, no multiple of these {at_once}")
    settings.effective_batch = wanted
    settings.accumulate = wanted // at_once  # with another number of processes than before, another number of batches
    for data in (train_data, val_data):
        if not data.labelled:
            raise InputError(f"{data.files[0][0].parent}: the split {data.split!r} has no folder of labels")
    if list(train_data.classes) != (settings.classes or list(train_data.classes)):
        raise InputError(f"{out}: the run was trained on other classes: {', '.join(settings.classes[:4])} ...")
    settings.classes = list(train_data.classes)
    settings.palette = [list(colour) for colour in train_data.palette]


def describe_run(settings, images, start, out):
    """What a run does, as text."""
    what = f"{settings.model} R-{settings.depth} on {settings.dataset}, {images} images"
    return f"{what}, from iteration {start} to {settings.iters}, {out}/"


def describe_batch(settings, device):
    """The images of a step, as text; and how to have as many as the published recipe, if that has another number."""
    _, world = rank_and_world()
    effective = settings.effective_batch
    norm = "SyncBatchNorm" if world > 1 and device.type == "cuda" else "BatchNorm"
    text = f"{world} x {settings.batch_size} x {settings.accumulate} = {effective} images per step; {norm}, {device}"
    preset = PRESETS[settings.dataset]
    published = preset.images
    if published in (None, effective):
        return text
    ways = [f"--batch-size {published // world}"] if published % world == 0 else []
    at_once = world * settings.batch_size
    if published % at_once == 0:
        ways.append(f"--accumulate {published // at_once} (but BatchNorm sees {at_once})")
    ways.append(f"--lr {preset.lr * effective / published:g}")
    return f"{text}\nthe published recipe has {published} images per step; to match it: {', or '.join(ways)}"
