"""The metrics are the reference's, and so is the learning rate."""

import math

import numpy as np
import pytest
import reference
import torch

from evaluate import confusion_matrix, metrics, window_starts
from train import poly_lr


def test_metrics():
    golden = reference.arrays("metrics")
    pairs = zip(golden["pred"], golden["label"], strict=True)
    result = metrics(sum(confusion_matrix(torch.tensor(p), torch.tensor(y), 21) for p, y in pairs))
    for name in ("IoU", "Acc", "mIoU", "mAcc", "aAcc"):
        np.testing.assert_allclose(result[name], golden[name], rtol=1e-6)


def test_absent_classes():
    label, prediction = torch.tensor([0, 0, 255]), torch.tensor([0, 1, 2])
    result = metrics(confusion_matrix(prediction, label, 3))
    assert result["IoU"][:2].tolist() == [0.5, 0.0] and result["Acc"][0] == 0.5
    assert math.isnan(result["IoU"][2]) and math.isnan(result["Acc"][1]) and math.isnan(result["Acc"][2])
    assert result["mIoU"] == 0.25 and result["mAcc"] == 0.5


def test_poly_lr():
    for iters, iteration, lr in reference.arrays("poly")["rows"]:
        assert poly_lr(iteration, iters) == pytest.approx(lr, rel=1e-9)


def test_windows_lie_on_the_grid_and_end_inside():
    assert window_starts(1025, 769, 513) == [0, 256]
    assert window_starts(2049, 769, 513) == [0, 513, 1026, 1280]
    assert window_starts(769, 769, 513) == window_starts(100, 769, 513) == [0]
