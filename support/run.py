"""The folder of a training run: what is in it, who writes it, and how it is found and read again."""

import contextlib
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from support.checkpoint import save
from support.command import InputError
from support.files import lock_file, replace
from support.images import VOID
from support.pictures import compare, write_png
from support.processes import gather, mark_begun, rank_and_world, sum_over_processes
from support.report import write_report
from support.results import without_nan
from support.scan import never_labelled

SAVE_SECONDS = 300  # between two savings of last.pt
FILES = ("config.json", "log.jsonl", "last.pt", "best.pt", "samples", "report.html")
LARGEST = 1e12  # of weights and of BatchNorm's statistics: beyond, the next step overflows


class Run:
    """A run's folder while it trains, and the progress bar. One process writes.

    config.json        the settings
    log.jsonl          a line for each validation, and for at least each thousandth of the steps
    samples/*.png      a picture for each validation
    last.pt, best.pt   the state to continue from; the state of the best mIoU
    report.html        a page that shows all of this, of one file; written at each validation
    events.*           TensorBoard's, if tensorboard is installed
    .lock              locked while a process trains here

    Its methods raise InputError or OSError if the folder cannot be written to.
    """

    def __init__(self, out, settings, start, leader=0):
        """Makes the folder, or prepares it to continue at the iteration `start`: later lines leave the log. The process
        `leader` does, and writes to it."""
        self.out, self.settings = out, settings
        self.writes = writes = rank_and_world()[0] == leader
        self.last_save = time.monotonic()
        self.skipped = 0
        self.labelled = torch.zeros(256, dtype=torch.int64)  # pixels of each label value, until the first validation
        self.board = None
        if writes:
            (out / "samples").mkdir(parents=True, exist_ok=True)
            for name in (*FILES, "samples/*.png"):
                for partial in out.glob(f"{name}.*.partial"):  # of a process that was killed while it wrote
                    partial.unlink()
            replace(out / "config.json", lambda file: file.write(json.dumps(vars(settings), indent=1).encode() + b"\n"))
            kept = [json.dumps(line) + "\n" for line in read_log(out) if line["iteration"] < start]
            replace(out / "log.jsonl", lambda file: file.write("".join(kept).encode()))
            mark_begun()
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(out, purge_step=start)
        self.bar = tqdm(None, settings.model, settings.iters, initial=start, disable=not writes, dynamic_ncols=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def say(self, text):
        if self.writes:
            tqdm.write(text)

    def log(self, iteration, **values):
        if not self.writes:
            return
        path = self.out / "log.jsonl"
        try:
            with open(path, "a") as file:
                file.write(json.dumps({"iteration": iteration} | values) + "\n")
        except OSError as error:
            raise InputError(f"{path}: cannot be written to ({error.strerror})") from None
        for name, value in values.items() if self.board else ():
            if not isinstance(value, list):
                self.board.add_scalar(name, value, iteration)

    def step(self, iteration, loss, aux_loss, lr, skipped, seconds, batches):
        """Shows a step, and logs it if its turn has come. Raises InputError, which names the files of the batches, if
        its loss is not finite."""
        if not math.isfinite(loss + aux_loss):
            names = ", ".join(sum(gather([file for batch in batches for file in batch["file"]]), []))
            what = f"the loss is {loss + aux_loss}, learning rate {lr:.2g}; batch: {names}"
            raise InputError(f"iteration {iteration}: {what}")
        self.skipped += skipped
        if self.labelled is not None:
            for batch in batches:
                self.labelled += torch.bincount(batch["label"].flatten(), minlength=256)
                self.labelled[VOID] -= batch["label"].numel() - int(batch["valid"].prod(1).sum())  # the crops' padding
        speed = self.settings.effective_batch / seconds
        if iteration % max(self.settings.iters // 1000, 1) == 0:
            values = {"loss": loss, "aux_loss": aux_loss, "lr": lr}
            self.log(iteration, **values, images_per_second=speed, skipped=self.skipped)
        note = f", {self.skipped} steps skipped" if self.skipped else ""
        text = f"loss {loss + aux_loss:.3f}, lr {lr:.4f}, {speed:.1f} images/s{note}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()

    def show(self, iteration, result, rows):
        """Logs evaluate.metrics() of a validation, and shows it: the mIoU on the terminal, a picture of some rows
        (image, label, prediction), and the page of the run so far."""
        means = {name: result[name] for name in ("mIoU", "mAcc", "aAcc")}
        self.log(iteration, val_loss=result["loss"], **means, IoU=without_nan(result["IoU"]))
        self.say(f"iteration {iteration}: mIoU {result['mIoU']:.2%}, {self.picture_path(iteration)}")
        picture = compare(rows, self.settings.classes, self.settings.palette)
        write_png(picture, self.picture_path(iteration))
        write_report(self.out, vars(self.settings), read_log(self.out), result["matrix"])
        if self.board:
            self.board.add_image("samples", np.asarray(picture), iteration, dataformats="HWC")

    def note_missing_classes(self):
        """Says at the first validation which classes no label has shown so far; all processes call this."""
        if self.labelled is not None:
            missing = never_labelled(sum_over_processes(self.labelled), self.settings.classes)
            self.labelled = None
            if missing:
                self.say(f"warning: of the training labels so far {missing}")

    def picture_path(self, iteration):
        return self.out / "samples" / f"{iteration:06}.png"

    def save_is_due(self):
        return time.monotonic() - self.last_save > SAVE_SECONDS

    def save(self, name, state):
        """Writes last.pt, for which all processes call this, or best.pt, for which the writer does. Raises InputError,
        and leaves the file as it is, if the training has diverged."""
        if name == "last.pt" and dist.is_initialized():
            for buffer in state.model.buffers():  # BatchNorm's statistics may differ; DDP goes on with those of rank 0
                dist.broadcast(buffer, 0)
        weights = state.model.state_dict().values()
        largest = torch.stack([value.abs().max().float() for value in weights]).max().item()
        if not largest < LARGEST:
            kept = f"; {self.out / 'last.pt'} is as before" if (self.out / "last.pt").exists() else ""
            what = f"the training has diverged, to weights of {largest:.2g}, which are not saved{kept}"
            raise InputError(f"iteration {state.iteration}: {what}; start anew with a lower --lr")
        if self.writes:
            save(state, vars(self.settings), self.out / name)
        if name == "last.pt":
            self.last_save = time.monotonic()


def lock(out):
    """Keeps a run's folder for this process alone until that ends, by a lock on OUT/.lock. Raises InputError if another
    process has it."""
    out.mkdir(parents=True, exist_ok=True)
    file = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o666)  # stays open: closing it would give up the lock
    if not lock_file(file, wait=False):
        raise InputError(f"{out}: another process is training there; wait for it, or name another --out")


def held(out):
    """The first of a run's files that a folder holds, None if there is none."""
    paths = (out / name for name in FILES)
    return next((path for path in paths if (any(path.iterdir()) if path.is_dir() else path.exists())), None)


def read_log(folder):
    """The lines of a run's log.jsonl, as dicts."""
    path = folder / "log.jsonl"
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # a machine that went down may leave anything
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("iteration"), int):
                lines.append(line)
    return lines


def read_config(folder):
    """The settings of the run in a folder, as a dict. Raises InputError."""
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder}: holds no config.json to go on with; --out names the folder of a run") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'}: is damaged ({error})") from None


def newest_checkpoint():
    """The best.pt in a folder of runs/, or in a folder of that, that was written last on any of the machines; says
    which. Raises InputError if there is none."""
    found = [path for pattern in ("*/best.pt", "*/*/best.pt") for path in Path("runs").glob(pattern)]
    _, newest = max(gather(max([(path.stat().st_mtime, str(path)) for path in found], default=(0, None))))
    if newest is None:
        raise InputError("runs/: holds no run yet; name a checkpoint, or train one with: python train.py")
    if rank_and_world()[0] == 0:
        print(f"checkpoint: {newest}")
    return newest
