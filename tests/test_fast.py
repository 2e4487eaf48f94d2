"""What is faster is the same: each form of support/fast.py and support/resize.py beside the plain one."""

import copy

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn

from ann import ANN
from evaluate import inference, multi_scale_flip, predict, slide_inference, whole_inference
from support.checkpoint import MODELS
from support.fast import SampledFirst, fold_batchnorm, for_inference, resized_rows
from support.resize import resize, sample

IMAGES = torch.tensor(reference.arrays("inputs")["wide"])  # (1, 3, 97, 161)
IMAGE = torch.tensor(reference.arrays("inputs")["image"])  # (75, 110, 3)


def build(name, align_corners=False):
    """A model of the reference with its weights, none of which is trivial."""
    model = MODELS[name](19, 18, align_corners)
    model.load_state_dict(reference.weights(name, 18))
    return model.eval()


def close(ours, plain, tolerance=1e-5):
    assert ours.shape == plain.shape and ours.dtype == plain.dtype
    assert (ours - plain).abs().max() <= tolerance * plain.abs().max()


def whole(rows, height):
    """The parts that resized_rows yields, in one tensor; each row must come once."""
    rows = list(rows)
    assert [y for used, _ in rows for y in range(height)[used]] == list(range(height))
    return torch.cat([part for _, part in rows], dim=2)


@pytest.mark.parametrize("align", [False, True], ids=["plain", "align_corners"])
def test_resizes_by_rows_are_interpolations(align):
    torch.manual_seed(0)
    for small, middle, large in (
        ((13, 21), (97, 161), (71, 120)),
        ((13, 21), (97, 161), (200, 333)),
        ((13, 21), (97, 161), (97, 161)),
        ((97, 161), (97, 161), (97, 161)),  # as sliding windows give them
        ((97, 161), (97, 161), (120, 71)),
        ((2, 1), (9, 8), (1, 1)),
        ((1, 1), (1, 1), (5, 3)),
    ):
        logits = torch.randn(2, 4, *small)
        plain = logits
        for size in (middle, large):
            plain = F.interpolate(plain, size, mode="bilinear", align_corners=align)
        close(whole(resized_rows(logits, [middle, large], align), large[0]), plain)


@pytest.mark.parametrize("name", MODELS.keys() - {"snlnet"})
@torch.no_grad()
def test_a_model_for_inference_is_the_model(name):
    model = build(name)
    fast = for_inference(copy.deepcopy(model), torch.device("cpu"))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    close(fast(IMAGES), model.coarse(IMAGES)[0])
    golden = torch.tensor(reference.arrays(name)["r18_logits"])
    close(fast(torch.tensor(reference.arrays("inputs")["x"])), golden, 1e-4)


@torch.no_grad()
def test_batchnorms_of_every_kind_are_folded():
    model = build("ann")
    synchronised = fold_batchnorm(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)))
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in synchronised.modules())
    close(synchronised(IMAGES), model(IMAGES))


@torch.no_grad()
def test_ann_on_its_samples_is_ann():
    torch.manual_seed(0)
    head = fold_batchnorm(build("ann")).decode_head
    c3, c4, x = torch.randn(2, 256, 9, 13), torch.randn(2, 512, 9, 13), torch.randn(2, 128, 9, 13)
    close(SampledFirst(head.fusion)(c3, c4), head.fusion(c3, c4))
    close(SampledFirst(head.context)(x), head.context(x))
    with pytest.raises(AssertionError):  # what comes from the samples counts for more than the tolerance
        close(head.fusion(-c3, c4), head.fusion(c3, c4), 0.01)
    fast = for_inference(ANN(3, 18), torch.device("cpu"))
    assert sum(isinstance(module, SampledFirst) for module in fast.modules()) == 2


@pytest.mark.parametrize("name", ["gcnet", "ann"])
@torch.no_grad()
def test_weights_of_16_bits_are_mixed_precision(name):
    model = build(name)
    fast = for_inference(copy.deepcopy(model), torch.device("cpu"), torch.bfloat16)
    assert {conv.weight.dtype for conv in fast.modules() if isinstance(conv, nn.Conv2d)} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        plain = model.coarse(IMAGES)[0].float()
    close(fast(IMAGES), plain, 0.03)
    close(fast(IMAGES), model.coarse(IMAGES)[0], 0.03)


@pytest.mark.parametrize("align", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "align_corners"])
@torch.no_grad()
def test_the_modes_are_the_same_with_a_fast_model(align, monkeypatch):
    model = build("gcnet", align)
    fast = for_inference(copy.deepcopy(model), torch.device("cpu"))
    images = torch.cat([IMAGES, IMAGES.flip(2)])[:, :, :80, :90]
    for pixels in (1, 2**30):  # windows and images one by one, or together
        monkeypatch.setattr("evaluate.BATCH_PIXELS", pixels)
        slide = slide_inference(model, images, (65, 65), (43, 43))
        close(slide_inference(fast, images, (65, 65), (43, 43)), slide)
        close(inference(fast, images, (65, 65), (43, 43)), slide)
        close(whole_inference(model, images), model(images))
        close(whole(resized_rows(inference(fast, images), [images.shape[2:]], align), 80), model(images))
        close(multi_scale_flip(fast, IMAGE, (90, 48)), multi_scale_flip(model, IMAGE, (90, 48)))
    config = {"scale": [90, 48], "crop_size": [33, 40], "stride": None}
    for config["stride"] in (None, [20, 30]):
        for aug in (False, True):
            same = predict(fast, IMAGE[None], config, aug) == predict(model, IMAGE[None], config, aug)
            assert same.float().mean() > 0.999


# ------------------------------------------------------------------------------------------------- resizing of images

OPENCV = reference.arrays("opencv")


@pytest.mark.parametrize("key", [key for key in OPENCV if key.startswith("resize")])
def test_resize_is_opencv_bilinear(key):
    golden = OPENCV[key].astype(int)
    ours = resize(IMAGE, golden.shape[:2]).numpy()
    assert ours.dtype == np.uint8
    assert np.abs(ours - golden).max() <= 1
    window = resize(IMAGE, golden.shape[:2], (11, 7, 20, 30)).numpy().astype(int)
    assert np.abs(window - golden[11:31, 7:37]).max() <= 1
    assert np.abs(window - ours[11:31, 7:37]).max() <= 1  # halves may be rounded either way


def test_resize_is_its_formula():
    def one_axis(array, new):  # half-pixel centres, two taps, no antialiasing; along the first axis
        x = ((np.arange(new) + 0.5) * len(array) / new - 0.5).clip(0, len(array) - 1)
        low, weight = np.floor(x).astype(int), (x % 1)[:, None, None]
        return array[low] * (1 - weight) + array[(low + 1).clip(max=len(array) - 1)] * weight

    rng = np.random.default_rng(0)
    for factor in (0, 0.01, 0.5, 0.99, 1, 1.003, 1.02, 1.5, 4) * 4:
        h, w = (max(int(side * factor), 1) for side in IMAGE.shape[:2])
        exact = one_axis(one_axis(IMAGE.numpy().astype(float), h).swapaxes(0, 1), w).swapaxes(0, 1)
        assert np.abs(resize(IMAGE, (h, w)).numpy() - exact).max() <= 1.01
        (top, bottom), (left, right) = (sorted(rng.choice(side + 1, 2, replace=False).tolist()) for side in (h, w))
        window = top, left, bottom - top, right - left
        assert np.abs(resize(IMAGE, (h, w), window).numpy() - exact[top:bottom, left:right]).max() <= 1.01
        assert np.abs(sample(IMAGE, (h, w), window).numpy() - exact[top:bottom, left:right]).max() <= 0.51
