"""TensorBoard's events of a run, where tensorboard is installed."""

import pytest
from conftest import read_log, train_arguments

import train


def test_tensorboard(folder, run_inside, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_inside(train, *train_arguments(folder, "run", workers=0)[1:])
    board = events.EventAccumulator(str(tmp_path / "run")).Reload()
    log = read_log(tmp_path / "run")
    for tag in ("loss", "aux_loss", "lr", "mIoU", "val_loss"):
        logged = [(line["iteration"], line[tag]) for line in log if tag in line]
        assert [(event.step, pytest.approx(event.value)) for event in board.Scalars(tag)] == logged
    assert [image.step for image in board.Images("samples")] == [1, 2, 3, 4]
