"""The folder of a training run: what is in it, who writes it, and how it is found and read again."""

import contextlib
import json
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.checkpoint import save
from support.command import InputError
from support.files import replace
from support.pictures import compare, curves

SAVE_SECONDS = 300  # between two savings of last.pt


class Run:
    """A run's folder while it trains, and the progress bar. One process writes; in the others say, log, step and save
    do nothing.

    config.json        the settings
    log.jsonl          a line for each validation, and for at least each thousandth of the steps
    samples/*.png      a picture for each validation
    last.pt, best.pt   the state to continue from; the state of the best mIoU
    curves.png         if matplotlib is installed; TensorBoard's events, if tensorboard is

    Its methods raise InputError or OSError if the folder cannot be written to.
    """

    def __init__(self, out, settings, start, writes):
        """Makes the folder, or prepares it to continue at the iteration `start`: later lines leave the log."""
        self.out, self.settings, self.writes = out, settings, writes
        self.last_save = time.monotonic()
        self.skipped = 0
        self.board = None
        if writes:
            (out / "samples").mkdir(parents=True, exist_ok=True)
            for partial in out.glob("*.partial"):  # of a process that was killed while it wrote
                partial.unlink()
            replace(out / "config.json", lambda file: file.write(json.dumps(vars(settings), indent=1).encode() + b"\n"))
            kept = [json.dumps(line) + "\n" for line in read_log(out) if line["iteration"] < start]
            replace(out / "log.jsonl", lambda file: file.write("".join(kept).encode()))
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
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps({"iteration": iteration} | values) + "\n")
        for name, value in values.items() if self.board else ():
            self.board.add_scalar(name, value, iteration)

    def step(self, iteration, loss, aux_loss, lr, skipped, seconds):
        """Shows a step, and logs it if its turn has come."""
        self.skipped += skipped
        speed = self.settings.effective_batch / seconds
        if iteration % max(self.settings.iters // 1000, 1) == 0:
            values = {"loss": loss, "aux_loss": aux_loss, "lr": lr}
            self.log(iteration, **values, images_per_second=speed, skipped=self.skipped)
        note = f", {self.skipped} steps skipped" if self.skipped else ""
        text = f"loss {loss + aux_loss:.3f}, lr {lr:.4f}, {speed:.1f} images/s{note}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()

    def show(self, iteration, rows):
        """Writes the picture of a validation, whose rows are (image, label, prediction), and the curves so far."""
        picture = compare(rows, self.settings.classes, self.settings.palette)
        picture.save(self.picture_path(iteration))
        curves(read_log(self.out), self.out / "curves.png")
        if self.board:
            self.board.add_image("samples", np.asarray(picture), iteration, dataformats="HWC")

    def picture_path(self, iteration):
        return self.out / "samples" / f"{iteration:06}.png"

    def save_is_due(self):
        return time.monotonic() - self.last_save > SAVE_SECONDS

    def save(self, name, state):
        """Writes last.pt or best.pt."""
        if self.writes:
            save(state, vars(self.settings), self.out / name)
        if name == "last.pt":
            self.last_save = time.monotonic()


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
        raise InputError(f"{folder}: holds no run to go on with; --out names the folder of one") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'}: is damaged ({error})") from None


def newest_checkpoint():
    """The best.pt below runs/ that was written last. Raises InputError if there is none."""
    found = sorted(Path("runs").glob("**/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError("runs/: holds no run yet; name a checkpoint, or train one with: python train.py")
    return found[-1]
