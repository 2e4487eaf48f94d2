"""What shows a run's course, where the packages for it are installed: curves.png and TensorBoard's events."""

import numpy as np
import pytest
from conftest import read_log, train_arguments
from PIL import Image

import train
from support.pictures import curves


def test_curves(tmp_path):
    pytest.importorskip("matplotlib")

    def panels(**changed):
        """The three parts of the picture, of a log in which one value in the middle may be another."""
        lines = [{"iteration": i, "loss": 1 / (i + 1), "lr": 0.01 - i / 1000} for i in range(10)]
        lines += [{"iteration": i, "val_loss": 0.5 - i / 100, "mIoU": i / 10} for i in (3, 6, 9)]
        for name, value in changed.items():
            next(line for line in lines if line["iteration"] == 6 and name in line)[name] = value
        curves(lines, tmp_path / "curves.png")
        return np.split(np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")), 3, axis=1)

    plain = panels()
    for name, panel in (("loss", 0), ("val_loss", 0), ("lr", 1), ("mIoU", 2)):
        value = 0.005 if name == "lr" else 0.35
        changed = [(a != b).any() for a, b in zip(plain, panels(**{name: value}), strict=True)]
        assert changed == [i == panel for i in range(3)], name


def test_tensorboard(folder, run_inside, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_inside(train, *train_arguments(folder, "run", workers=0)[1:])
    board = events.EventAccumulator(str(tmp_path / "run")).Reload()
    log = read_log(tmp_path / "run")
    for tag in ("loss", "aux_loss", "lr", "mIoU", "val_loss"):
        logged = [(line["iteration"], line[tag]) for line in log if tag in line]
        assert [(event.step, pytest.approx(event.value)) for event in board.Scalars(tag)] == logged
    assert [image.step for image in board.Images("samples")] == [1, 2, 3, 4]
