"""The metrics are the reference's, and so is the learning rate."""

import math

import numpy as np
import pytest
import reference
import torch
from conftest import write_scene

from data import open_data
from evaluate import confusion_matrix, equal_sizes, evaluate, evaluation_loader, metrics, window_starts
from resnet_d8 import FCN
from support.fast import for_inference
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


def test_images_of_one_size_go_together():
    sizes = [(4, 5), (4, 5), (4, 5), (5, 4), (4, 5)]
    samples = [(i, (torch.zeros(*size, 3), None)) for i, size in enumerate(sizes)]
    assert [[i for i, _, _ in group] for group in equal_sizes(samples, 40)] == [[0, 1], [2], [3], [4]]
    assert [[i for i, _, _ in group] for group in equal_sizes(samples, 0)] == [[0], [1], [2], [3], [4]]
    assert list(equal_sizes([], 40)) == []


def test_together_or_alone_the_result_is_the_same(folder, monkeypatch):
    write_scene(folder / "images/val", folder / "annotations/val", "scene9", 1, size=(32, 48))
    data, saved = open_data("folder", folder, "val"), {}
    torch.manual_seed(0)
    model = for_inference(FCN(3, depth=18), torch.device("cpu"))
    config = {"scale": None, "crop_size": [32, 32], "stride": None}
    results = []
    for pixels in (0, 10**6):
        monkeypatch.setattr("evaluate.BATCH_PIXELS", pixels)
        maps = {}
        loader = evaluation_loader(data, 0)
        results.append(evaluate(model, data, loader, config, save=maps.__setitem__, with_loss=True))
        saved[pixels] = maps
    assert results[0]["mIoU"] == results[1]["mIoU"] and results[0]["loss"] == pytest.approx(results[1]["loss"])
    assert [tuple(saved[0][i].shape) for i in range(4)] == [(40, 48), (40, 48), (32, 48), (40, 48)]
    assert all(saved[0][i].equal(saved[10**6][i]) for i in range(4))
