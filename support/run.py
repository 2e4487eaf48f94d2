"""The folder of a training run: how a run begins or continues in it, what is written to it, and how it is found again.

Rank 0 alone reads and writes it. last.pt is the truth about a run; config.json is written for people.
"""

import contextlib
import errno
import json
import math
import os
import time
from dataclasses import replace

import numpy as np
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has other locks, so there is none there
    fcntl = None

from support.checkpoint import read_checkpoint, write_checkpoint
from support.command import BAR, InputError
from support.files import write_file
from support.pictures import draw_comparison, save_png, without_nan
from support.processes import rank_and_world
from support.report import write_report
from support.settings import PRESETS, Settings, check_stride, defaults, refuse_changes

SAVE_SECONDS = 300  # between two savings of last.pt
RUN_FILES = ("last.pt", "best.pt", "config.json", "log.jsonl", "samples", "report.html")


def open_run(out, given, resume):
    """Locks the folder `out` and returns (settings, saved). For a new run: the preset's settings, replaced by those
    `given`; and None. For a resumed one: the settings in last.pt, replaced likewise; and the rest of last.pt. Raises
    InputError if the run may not begin or continue like this."""
    if resume and not given and not any((out / name).exists() for name in RUN_FILES):
        raise InputError(f"{out}: holds no run to continue")
    out.mkdir(parents=True, exist_ok=True)
    lock(out)
    last = out / "last.pt"
    held = [name for name in RUN_FILES if (out / name).exists()]
    if held and not (resume and last.exists()):
        what = "a run; continue it with --resume, or" if last.exists() else f"{held[0]}, but no last.pt;"
        raise InputError(f"{out}: already holds {what} name another folder with --out")
    if held:
        try:
            saved = read_checkpoint(last)
        except InputError as error:
            advice = f"; {out}/best.pt, copied over it, continues from the best validation" * (out / "best.pt").exists()
            raise InputError(f"{error}{advice}") from None
        if "optimizer" not in saved:
            raise InputError(f"{last}: holds no state that can be continued; --init starts from its weights")
        refuse_changes(given, saved["settings"], out)
        settings = replace(saved.pop("settings"), **given)
    else:
        saved, settings = None, Settings(**defaults(given) | given)
    check_stride(settings)
    # A resumed run keeps its images per step: with more or fewer processes, accumulate changes.
    at_once = settings.batch_size * rank_and_world()[1]
    per_step = settings.effective_batch or at_once * settings.accumulate
    if per_step % at_once:
        raise InputError(f"--batch-size: the run in {out} has {per_step} images per step, no multiple of {at_once}")
    if settings.accumulate != per_step // at_once and "accumulate" in given:
        print(f"note: --accumulate {per_step // at_once}, since the run in {out} has {per_step} images per step")
    return replace(settings, effective_batch=per_step, accumulate=per_step // at_once), saved


def lock(out):
    """Keeps a run's folder for this process alone until that ends, by a lock on OUT/.lock. Raises InputError if another
    process has it."""
    file = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o666)  # stays open: closing it would give up the lock
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # else the file system has no locks
            raise InputError(f"{out}: another process is training there; wait for it, or name another --out") from None


def add_classes(settings, train_data, val_data, out):
    """Puts the data set's classes and palette into the settings. Raises InputError if the data set has no labels, or
    other classes than the resumed run, or if there are more or fewer class weights."""
    for data in (train_data, val_data):
        if not data.labelled:
            raise InputError(f"{data.files[0][0].parent}: the split {data.split!r} has no folder of labels")
    classes = list(train_data.classes)
    if settings.classes and settings.classes != classes:
        raise InputError(f"{out}: the run was trained on other classes: {', '.join(settings.classes[:4])} ...")
    if settings.class_weights and len(settings.class_weights) != len(classes):
        raise InputError(f"--class-weights: {train_data.name} has {len(classes)} classes; give as many weights")
    settings.classes = classes
    settings.palette = [list(colour) for colour in train_data.palette]


def describe(settings, images, iteration, out, device):
    """What a run does, as text; and which learning rate suits it, if it has not the published images per step."""
    world, effective, preset = rank_and_world()[1], settings.effective_batch, PRESETS[settings.dataset]
    norm = "SyncBatchNorm" if world > 1 and device.type == "cuda" else "BatchNorm"
    blocks = f" with {' at '.join(settings.blocks)}" if settings.blocks else ""
    text = f"{settings.model} R-{settings.depth}{blocks} on {settings.dataset}, {images} images, "
    text += f"from iteration {iteration} to {settings.iters}, {out}/\n"
    text += f"{effective} images per step: {world} (processes) x {settings.batch_size} (--batch-size) x "
    text += f"{settings.accumulate} (--accumulate); {norm}, {device}"
    if iteration == 0 and settings.lr == preset.lr and preset.images_per_step not in (None, effective):
        text += f"\nthe published recipe has {preset.images_per_step} images per step; give --batch-size or "
        text += f"--accumulate for as many, or --lr {preset.lr * effective / preset.images_per_step:g}"
    return text


class Run:
    """A run's folder while it trains, and the progress bar.

    config.json        the settings
    log.jsonl          a line for each validation, and for 1000 to 2000 of the steps, or all if there are fewer;
                       `iteration` is the number of steps before it; `skipped` counts from the last start
    samples/*.png      a picture for each validation
    last.pt, best.pt   the state to continue from; the state of the best mIoU
    report.html        one page with all of this; written at each validation
    events.*           TensorBoard's, if tensorboard is installed
    .lock              locked while a process trains here
    """

    def __init__(self, out, settings, start):
        """Prepares the folder to begin or continue at the iteration `start`: removes log lines from there on."""
        self.out, self.settings = out, settings
        self.writes = rank_and_world()[0] == 0
        self.last_save = time.monotonic()
        self.lr = settings.lr
        self.skipped = 0
        self.board = None
        if self.writes:
            (out / "samples").mkdir(exist_ok=True)
            for pattern in ("*.????????.partial", "samples/*.????????.partial"):
                for partial in out.glob(pattern):  # of write_file, in a process that was killed
                    partial.unlink()
            write_file(out / "config.json", lambda file: file.write(json.dumps(vars(settings), indent=1).encode()))
            kept = [json.dumps(line) + "\n" for line in read_log(out) if line["iteration"] < start]
            write_file(out / "log.jsonl", lambda file: file.write("".join(kept).encode()))
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(out, purge_step=start)
        self.bar = tqdm(None, settings.model, settings.iters, initial=start, disable=not self.writes, **BAR)

    def close(self):
        self.bar.close()
        if self.board:
            self.board.close()

    def say(self, text):
        if self.writes:
            tqdm.write(text)

    def log(self, iteration, **values):
        if not self.writes:
            return
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps({"iteration": iteration} | values) + "\n")
        for name, value in values.items() if self.board else ():
            if not isinstance(value, list):
                self.board.add_scalar(name, value, iteration)

    def log_step(self, iteration, loss, aux_loss, lr, skipped, seconds):
        """Shows a step, and logs it if its turn has come. Raises InputError if its loss is not finite."""
        self.lr = lr
        if not math.isfinite(loss + aux_loss):
            raise self.divergence_error(iteration, f"the loss is {loss + aux_loss}")
        self.skipped += skipped
        speed = self.settings.effective_batch / seconds
        if iteration % max(self.settings.iters // 1000, 1) == 0:
            values = {"loss": loss, "aux_loss": aux_loss, "lr": lr}
            self.log(iteration, **values, images_per_second=speed, skipped=self.skipped)
        note = f", {self.skipped} steps skipped" if self.skipped else ""
        self.bar.set_postfix_str(f"loss {loss + aux_loss:.3f}, lr {lr:.4f}, {speed:.1f} images/s{note}", refresh=False)
        self.bar.update()

    def divergence_error(self, iteration, what):
        """The InputError that ends a training that has diverged."""
        advice = f"start again with a lower --lr; {self.out}/last.pt is the last state that was finite"
        return InputError(f"iteration {iteration}: diverged at learning rate {self.lr:.2g}: {what}; {advice}")

    def log_validation(self, iteration, result, rows):
        """Logs evaluate.metrics() of a validation, and shows it: the mIoU on the terminal, a picture of some rows
        (image, label, prediction), and the page of the run so far."""
        means = {name: result[name] for name in ("mIoU", "mAcc", "aAcc")}
        self.log(iteration, val_loss=result["loss"], **means, IoU=without_nan(result["IoU"]))
        path = self.out / "samples" / f"{iteration:06}.png"
        self.say(f"iteration {iteration}: mIoU {result['mIoU']:.2%}, {path}")
        picture = draw_comparison(rows, self.settings.classes, self.settings.palette)
        save_png(picture, path)
        lines = read_log(self.out)
        write_report(self.out, vars(self.settings), lines, result["matrix"])
        never = [name for name, share in zip(self.settings.classes, result["Acc"], strict=True) if share.isnan()]
        if never and sum("mIoU" in line for line in lines) == 1:  # the first validation
            names = ", ".join(never[:5]) + " ..." * (len(never) > 5)
            self.say(f"warning: no validation label shows {names}; python -m tools.check_data reads all labels")
        if self.board:
            self.board.add_image("samples", np.asarray(picture), iteration, dataformats="HWC")

    def save_is_due(self):
        return time.monotonic() - self.last_save > SAVE_SECONDS

    def save(self, state, name="last.pt"):
        """Writes last.pt or best.pt. Raises InputError if it cannot; the one before it stays."""
        if self.writes:
            write_checkpoint(state, self.settings, self.out / name)
        self.last_save = time.monotonic()


def read_log(folder):
    """The lines of a run's log.jsonl, as dicts."""
    path = folder / "log.jsonl"
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # a line that was cut off when the machine went down
            lines.append(json.loads(text))
    return lines
