"""The metrics are the reference's, and so is the learning rate."""

import math

import numpy as np
import pytest
import reference
import torch
from conftest import write_scene

from data import normalise, open_data
from evaluate import confusion_matrix, evaluate, evaluation_loader, metrics
from resnet_d8 import FCN
from support.fast import for_inference
from support.images import window_starts
from support.settings import Settings
from train import poly_lr, segmentation_loss, validation_is_due


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


def test_validations_are_tenths_and_the_end():
    assert [i for i in range(241) if validation_is_due(i, 240)] == list(range(24, 241, 24))
    assert [i for i in range(5) if validation_is_due(i, 4)] == [1, 2, 3, 4]
    assert [i for i in range(106) if validation_is_due(i, 105)] == [*range(11, 105, 11), 105]


def test_loss_is_divided_by_all_pixels():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    labels[0, :2] = 255
    weight = torch.tensor([1.0, 0.5, 4.0])
    valid = [(n, y, x, c) for (n, y, x), c in np.ndenumerate(labels.numpy()) if c != 255]
    terms = [(-logits[n, :, y, x].log_softmax(0)[c], weight[c]) for n, y, x, c in valid]
    plain, weighted = sum(t for t, _ in terms) / 40, sum(t * w for t, w in terms) / 40
    assert segmentation_loss(logits, labels).item() == pytest.approx(plain.item(), rel=1e-6)
    assert segmentation_loss(logits, labels, weight).item() == pytest.approx(weighted.item(), rel=1e-6)


def test_windows_lie_on_the_grid_and_end_inside():
    assert window_starts(1025, 769, 513) == [0, 256]
    assert window_starts(2049, 769, 513) == [0, 513, 1026, 1280]
    assert window_starts(769, 769, 513) == window_starts(100, 769, 513) == [0]


def test_images_of_any_sizes_are_summed_up(folder):
    """Over a data set whose images differ in size: each image's confusion matrix and loss, added up."""
    write_scene(folder / "images/val", folder / "annotations/val", "scene9", 1, size=(32, 48))
    data, maps = open_data("folder", folder, "val"), {}
    torch.manual_seed(0)
    model = for_inference(FCN(3, depth=18), torch.device("cpu"))
    loader = evaluation_loader(data, 0)
    result = evaluate(model, data, loader, Settings(), save=maps.__setitem__, with_loss=True)
    assert [tuple(maps[i].shape) for i in range(4)] == [(40, 48), (40, 48), (32, 48), (40, 48)]
    labels = [data[i][1] for i in range(4)]
    matrix = sum(confusion_matrix(maps[i], labels[i], 3) for i in range(4))
    assert result["matrix"].equal(matrix) and result["mIoU"] == metrics(matrix)["mIoU"]
    with torch.no_grad():
        losses = [
            segmentation_loss(model(normalise(data[i][0].permute(2, 0, 1)[None])), labels[i][None].long())
            for i in range(4)
        ]
    weights = [label.numel() for label in labels]
    assert result["loss"] == pytest.approx(np.average([loss.item() for loss in losses], weights=weights))
