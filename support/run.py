"""The folder of a training run: how a run begins or continues in it, what is written to it, and how it is found again.

Process 0 alone reads and writes it. last.pt is the truth about a run; config.json is written for people.
"""

import contextlib
import errno
import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has other locks, so there is none there
    fcntl = None

from support.checkpoint import read_checkpoint, write_checkpoint
from support.command import InputError
from support.files import write_file
from support.pictures import compare, save_png, without_nan
from support.processes import rank_and_world
from support.report import write_report
from support.scan import never_labelled
from support.settings import PRESETS, Settings, check_stride, defaults, refuse_changes

SAVE_SECONDS = 300  # between two savings of last.pt
FILES = ("last.pt", "best.pt", "config.json", "log.jsonl", "samples", "report.html")


# ------------------------------------------------------------------------------------------------------- how it begins


def open_run(out, given, resume):
    """(settings, saved) of the run in the folder `out`, which this process locks until it ends: of a new run, from the
    settings `given` and the preset; or of the run to resume, from its last.pt, which is `saved`, else None. Raises
    InputError if the run may not begin or continue like this."""
    out.mkdir(parents=True, exist_ok=True)
    lock(out)
    last = out / "last.pt"
    held = [name for name in FILES if (out / name).exists()]
    if held and not resume:
        ways = "continue it with --resume, " * last.exists() + "delete it, or name another folder with --out"
        raise InputError(f"{out}: already holds a run ({held[0]}); {ways}")
    if not last.exists() and (held or resume and not given):
        what = f"holds {held[0]}, but no last.pt" if held else "holds no run"
        weights = f", from its weights with --init {out}/best.pt" * ("best.pt" in held)
        raise InputError(f"{out}: {what} to continue from; start a run by its settings in a new folder{weights}")
    if held:
        saved = read_checkpoint(last)
        if "optimizer" not in saved or not saved["settings"].ratios:  # weights alone, or of an earlier version
            raise InputError(f"{last}: holds no state that can be continued; --init starts from its weights")
        refuse_changes(given, saved["settings"], out)
        settings = replace(saved.pop("settings"), **given)
    else:
        saved, settings = None, Settings(**defaults(given) | given)
    if settings.stride:
        check_stride(settings)
    # With another number of processes than before, another number of batches: the images per step stay.
    at_once = settings.batch_size * rank_and_world()[1]
    effective = settings.effective_batch or at_once * settings.accumulate
    if effective % at_once:
        what = f"{effective} images per step, no multiple of these {at_once}"
        raise InputError(f"--batch-size: the run in {out} has {what}")
    return replace(settings, effective_batch=effective, accumulate=effective // at_once), saved


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
    """Puts the data set's classes and palette into the settings. Raises InputError if the data set has no labels, or if
    its classes are not those of the resumed run."""
    for data in (train_data, val_data):
        if not data.labelled:
            raise InputError(f"{data.files[0][0].parent}: the split {data.split!r} has no folder of labels")
    classes = list(train_data.classes)
    if settings.classes and settings.classes != classes:
        raise InputError(f"{out}: the run was trained on other classes: {', '.join(settings.classes[:4])} ...")
    settings.classes = classes
    settings.palette = [list(colour) for colour in train_data.palette]


def describe(settings, images, iteration, out, device):
    """What a run does, as text; and how to have the published number of images per step, if it has another one."""
    world, effective = rank_and_world()[1], settings.effective_batch
    norm = "SyncBatchNorm" if world > 1 and device.type == "cuda" else "BatchNorm"
    text = f"{settings.model} R-{settings.depth} on {settings.dataset}, {images} images, "
    text += f"from iteration {iteration} to {settings.iters}, {out}/\n"
    text += f"{world} x {settings.batch_size} x {settings.accumulate} = {effective} images per step; {norm}, {device}"
    preset = PRESETS[settings.dataset]
    if preset.images in (None, effective):
        return text
    batch = f"--batch-size {preset.images // world}, or " if preset.images % world == 0 else ""
    ways = f"{batch}--lr {preset.lr * effective / preset.images:g}"
    return f"{text}\nthe published recipe has {preset.images} images per step; to match it: {ways}"


# -------------------------------------------------------------------------------------------------- what is written


class Run:
    """A run's folder while it trains, and the progress bar.

    config.json        the settings
    log.jsonl          a line for each validation, and for at least each thousandth of the steps
    samples/*.png      a picture for each validation
    last.pt, best.pt   the state to continue from; the state of the best mIoU
    report.html        a page that shows all of this, of one file; written at each validation
    events.*           TensorBoard's, if tensorboard is installed
    .lock              locked while a process trains here

    Its methods raise InputError or OSError if the folder cannot be written to.
    """

    def __init__(self, out, settings, start):
        """Prepares the folder to begin or continue at the iteration `start`: later lines leave the log."""
        self.out, self.settings = out, settings
        self.writes = rank_and_world()[0] == 0
        self.last_save = time.monotonic()
        self.lr = settings.lr
        self.skipped = 0
        self.board = None
        if self.writes:
            (out / "samples").mkdir(exist_ok=True)
            for name in (*FILES, "samples/*.png"):
                for partial in out.glob(f"{name}.*.partial"):  # of write_file, in a process that was killed
                    partial.unlink()
            write_file(out / "config.json", lambda file: file.write(json.dumps(vars(settings), indent=1).encode()))
            kept = [json.dumps(line) + "\n" for line in read_log(out) if line["iteration"] < start]
            write_file(out / "log.jsonl", lambda file: file.write("".join(kept).encode()))
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(out, purge_step=start)
        shown = {"initial": start, "disable": not self.writes, "dynamic_ncols": True}
        self.bar = tqdm(None, settings.model, settings.iters, **shown)

    def __enter__(self):
        return self

    def __exit__(self, *error):
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
        text = f"loss {loss + aux_loss:.3f}, lr {lr:.4f}, {speed:.1f} images/s{note}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()

    def divergence_error(self, iteration, what):
        """The InputError that ends a training that has diverged."""
        last = self.out / "last.pt"
        kept = f"; {last} is from before" if last.exists() else ""
        advice = "start again with a lower --lr"
        return InputError(f"iteration {iteration}: diverged at learning rate {self.lr:.2g}: {what}; {advice}{kept}")

    def log_validation(self, iteration, result, rows):
        """Logs evaluate.metrics() of a validation, and shows it: the mIoU on the terminal, a picture of some rows
        (image, label, prediction), and the page of the run so far."""
        means = {name: result[name] for name in ("mIoU", "mAcc", "aAcc")}
        self.log(iteration, val_loss=result["loss"], **means, IoU=without_nan(result["IoU"]))
        path = self.out / "samples" / f"{iteration:06}.png"
        self.say(f"iteration {iteration}: mIoU {result['mIoU']:.2%}, {path}")
        picture = compare(rows, self.settings.classes, self.settings.palette)
        save_png(picture, path)
        lines = read_log(self.out)
        write_report(self.out, vars(self.settings), lines, result["matrix"])
        missing = never_labelled(result["matrix"].sum(1), self.settings.classes)
        if missing and sum("mIoU" in line for line in lines) == 1:  # the first validation
            self.say(f"warning: in the validation images {missing}; python -m tools.check_data reads all labels")
        if self.board:
            self.board.add_image("samples", np.asarray(picture), iteration, dataformats="HWC")

    def save_is_due(self):
        return time.monotonic() - self.last_save > SAVE_SECONDS

    def save(self, state, name="last.pt"):
        """Writes last.pt or best.pt. Raises InputError if it cannot; the one before it stays."""
        if self.writes:
            write_checkpoint(state, self.settings, self.out / name)
        self.last_save = time.monotonic()


# -------------------------------------------------------------------------------------------------- what is read again


def read_log(folder):
    """The lines of a run's log.jsonl, as dicts."""
    path = folder / "log.jsonl"
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # a line that was cut off when the machine went down
            lines.append(json.loads(text))
    return lines


def newest_checkpoint():
    """The best.pt in a folder of runs/, or in a folder of that, that was written last; says which. Raises InputError if
    there is none."""
    found = [path for pattern in ("*/best.pt", "*/*/best.pt") for path in Path("runs").glob(pattern)]
    if not found:
        raise InputError("runs/: holds no run yet; name a checkpoint, or train one with: python train.py")
    newest = max(found, key=lambda path: path.stat().st_mtime)
    print(f"checkpoint: {newest}")
    return newest
