"""The presets, and the settings of a training run: from its command line, a preset, or the run that it resumes."""

import argparse
import os
from pathlib import Path
from typing import NamedTuple

import torch

from data import DRAWN
from support import checkpoint
from support.command import Parser, whole_number
from support.layouts import InputError


class Preset(NamedTuple):
    """The published recipe: batch is per GPU, for 4 of them; with a stride, inference slides a window of the crop."""

    scale: tuple | None
    crop: tuple
    batch: int
    iters: int
    lr: float
    align_corners: bool
    stride: tuple | None


PRESETS = {
    #                     long, short  crop h, w  batch  iters  lr  align_corners  stride
    "cityscapes": Preset((2048, 1024), (512, 1024), 2, 40_000, 0.01, False, None),
    "cityscapes769": Preset((2049, 1025), (769, 769), 2, 40_000, 0.01, True, (513, 513)),
    "ade20k": Preset((2048, 512), (512, 512), 4, 80_000, 0.01, False, None),
    "voc12aug": Preset((2048, 512), (512, 512), 4, 20_000, 0.01, False, None),
    "folder": Preset(None, (512, 512), 4, 20_000, 0.01, False, None),  # None: each image at its own size
    "shapes": Preset(None, (64, 64), 8, 240, 0.03, False, None),
    "context": Preset(None, (32, 160), 8, 300, 0.1, False, None),
}


AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # --amp: the type of mixed precision


def parse(description):
    """(config, out, resume): the run's settings; what is not given comes from the run itself or from the preset."""
    parser = Parser(description, argument_default=argparse.SUPPRESS)  # leaves out what was not given
    add = parser.add_argument
    add("--model", choices=checkpoint.MODELS, help="default: gcnet")
    add("--dataset", choices=PRESETS, help="default: shapes; it and context are drawn, not read")
    add("--data-root", help="the data set's folder (default: data/DATASET)")
    add("--depth", type=int, choices=(18, 34, 50, 101), help="of the ResNet (default: 50, with drawn scenes 18)")
    add("--gc-backbone", type=int, choices=(4, 16), help="put GC blocks of this ratio into the ResNet (default: none)")
    add("--crop-size", type=positive, nargs=2, metavar=("H", "W"), help="default: the data set's preset")
    add("--batch-size", type=positive, help="images per process (default: the preset, made for 4 processes)")
    add("--accumulate", type=positive, help="batches per step (default: 1)")
    add("--iters", type=positive, help="steps (default: the preset)")
    add("--lr", type=rate, help="the first learning rate (default: the preset, 0.01)")
    add("--pretrained", help="the backbone's weights: none, file or URL (default: ImageNet's for depth 50 and 101)")
    add("--init", help="start from a whole checkpoint: file, URL or published name; its classifiers only if they fit")
    add("--class-weights", nargs="+", help="of the loss: a number per class, or balanced: median / frequency")
    add("--amp", choices=AMP, help="mixed precision (default: none)")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--deterministic", action="store_true", help="ask torch for deterministic kernels, which are slower on a GPU")
    add("--cache", metavar="DIR", help="keep decoded images there: reading is faster, from the second epoch on")
    add("--workers", type=whole_number, help="data-loading processes of each process (default: 2)")
    add("--seed", type=whole_number, help="of the weights, the order and the augmentation (default: 0)")
    add("--out", help="the run's folder (default: runs/MODEL-rDEPTH-DATASET)")
    add("--resume", action="store_true", help="go on with the run in --out; its settings need not be given again")
    given = vars(parser.parse_args())

    out, resume = given.pop("out", None), given.pop("resume", False)
    chosen = {"model": "gcnet", "dataset": "shapes"} | given
    preset = PRESETS[chosen["dataset"]]
    chosen.setdefault("depth", 18 if chosen["dataset"] in DRAWN else 50)
    out = Path(out or "runs/{model}-r{depth}-{dataset}".format(**chosen))
    for name in given.keys() & {"data_root", "cache"}:
        given[name] = str(Path(given[name]).expanduser().resolve())
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):  # torchrun --max-restarts
        resume = (out / "config.json").exists()
    saved = read_settings(out, parser) if resume else {}
    if not resume and (out / "last.pt").exists():
        raise InputError(f"{out}: already holds a run; continue it with --resume, or name another folder with --out")
    defaults = {
        "data_root": None,
        "gc_backbone": None,
        "crop_size": list(preset.crop),
        "batch_size": preset.batch,
        "accumulate": 1,
        "iters": preset.iters,
        "lr": preset.lr,
        "init": None,
        "class_weights": None,
        "pretrained": "imagenet" if chosen["depth"] >= 50 else "none",
        "amp": "none",
        "cache": None,
        "compile": False,
        "deterministic": False,
        "workers": 2,
        "seed": 0,
        "align_corners": preset.align_corners,
        "scale": preset.scale and list(preset.scale),
    }
    for name in sorted(given.keys() - {"workers", "cache", "data_root", "batch_size", "accumulate"}):
        if resume and given[name] != saved.get(name, defaults.get(name)):
            raise InputError(f"--{name.replace('_', '-')} {given[name]}: the run in {out} has {saved.get(name)}")
    config = defaults | chosen | saved | given
    height, width = config["crop_size"]
    if config["batch_size"] == 1 and height <= 8 and width <= 8:
        raise InputError("--batch-size 1 with --crop-size 8 8 or less: BatchNorm needs more than one value per channel")
    if "init" in given and "pretrained" in given:
        raise InputError("--init and --pretrained: a run starts from one of them")
    config.setdefault("stride", preset.stride and [min(preset.stride[0], height), min(preset.stride[1], width)])
    return config, out, resume


def read_settings(out, parser):
    """The config of the run to go on with; what its file says, edited or not, has to pass the parser."""
    saved, words = checkpoint.read_config(out), []
    for name, value in saved.items():
        if value is not None and value is not False:
            words.append("--" + name.replace("_", "-"))
            words += value if isinstance(value, list) else [] if value is True else [value]
    try:
        return saved | vars(parser.parse_known_args(map(str, words))[0])
    except InputError as error:
        raise InputError(f"{out / 'config.json'}: {error}") from None


def complete(config, out, train_data, val_data, world):
    """Adds to config what follows from the data and the processes; refuses what does not fit the run it resumes."""
    effective = config["batch_size"] * world * config["accumulate"]
    if config.setdefault("effective_batch", effective) != effective:
        wanted = config["effective_batch"]
        raise InputError(f"--batch-size: the run in {out} has {wanted} images per step, this would be {effective}")
    for data in (train_data, val_data):
        if data.files[0][1] is None and data.name not in DRAWN:
            raise InputError(f"{data.files[0][0].parent}: the split {data.split!r} has no folder of labels")
    if config.setdefault("classes", list(train_data.classes)) != list(train_data.classes):
        raise InputError(f"{out}: the run was trained on other classes: {', '.join(config['classes'][:4])} ...")
    config["palette"] = [list(colour) for colour in train_data.palette]


def batch_notes(config, world, where):
    """What a run says of its images per step, and how to match the published recipe's where they differ."""
    batch, accumulate, effective = (config[name] for name in ("batch_size", "accumulate", "effective_batch"))
    notes = [f"{world} x {batch} x {accumulate} = {effective} images per step; {where}"]
    preset = PRESETS[config["dataset"]]
    published = 4 * preset.batch
    if config["dataset"] not in ("folder", *DRAWN) and effective != published:
        ways = [f"--batch-size {published // world}"] if published % world == 0 else []
        if published % (batch * world) == 0:
            ways.append(f"--accumulate {published // (batch * world)} (but BatchNorm sees {batch * world})")
        ways.append(f"--lr {preset.lr * effective / published:g}")
        notes.append(f"the published recipe has {published} images per step; its like: {', or '.join(ways)}")
    return notes


def positive(text):
    """A whole number from 1, for argparse."""
    if whole_number(text) == 0:
        raise argparse.ArgumentTypeError("0 is too few")
    return int(text)


def rate(text):
    """A finite number above 0, for argparse."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return float(text)
