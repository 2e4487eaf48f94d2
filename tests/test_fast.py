"""What is faster is the same: each form of support/fast.py, and the resizing of images, beside the plain one."""

import copy

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn

from ann import ANN
from evaluate import multi_scale_flip, predict, slide_inference, whole_inference
from support import fast_loss
from support.fast import SampledFirst, fold_batchnorm, for_inference, resized_classes, slide_labels
from support.images import normalise, resize
from support.settings import MODELS, Settings
from train import segmentation_loss

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


@pytest.mark.parametrize("name", MODELS.keys() - {"snlnet"})
@torch.no_grad()
def test_a_model_for_inference_is_the_model(name):
    model = build(name)
    fast = for_inference(copy.deepcopy(model), torch.device("cpu"))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    close(fast(IMAGES), model(IMAGES))


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
        plain = model(IMAGES)
    close(fast(IMAGES), plain, 0.03)
    close(fast(IMAGES), model(IMAGES), 0.03)


@pytest.mark.parametrize("align", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "align_corners"])
@torch.no_grad()
def test_the_modes_are_the_same_with_a_fast_model(align):
    model = build("gcnet", align)
    fast = for_inference(copy.deepcopy(model), torch.device("cpu"))
    images = torch.cat([IMAGES, IMAGES.flip(2)])[:, :, :80, :90]
    close(slide_inference(fast, images, (65, 65), (43, 43)), slide_inference(model, images, (65, 65), (43, 43)))
    close(whole_inference(fast, images), model(images))
    close(multi_scale_flip(fast, IMAGE, (90, 48)), multi_scale_flip(model, IMAGE, (90, 48)))
    for stride in (None, [20, 30]):
        for scale in (None, [90, 48]):
            for aug in (False, True):
                settings = Settings(scale=scale, crop_size=[33, 40], stride=stride)
                same = predict(fast, IMAGE, settings, aug)[0] == predict(model, IMAGE, settings, aug)[0]
                assert same.float().mean() > 0.999


@pytest.mark.parametrize(
    "crop_size, stride", [((33, 40), (20, 30)), ((33, 40), (33, 40)), ((90, 30), (7, 11))], ids=str
)
@torch.no_grad()
def test_windows_by_rows_are_sliding_windows(crop_size, stride):
    """Also of an image that is lower than the window, and of windows that cover a pixel many times."""
    model = build("gcnet")
    label = torch.randint(0, 19, IMAGE.shape[:2], generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    label[:9] = 255
    logits = slide_inference(model, normalise(IMAGE.permute(2, 0, 1)[None]), crop_size, stride)
    plain_loss = F.cross_entropy(logits, label[None].long(), ignore_index=255, reduction="sum").item()
    classes, loss = slide_labels(model, IMAGE, crop_size, stride, label)
    assert classes.dtype == torch.uint8 and (classes == logits[0].argmax(0)).float().mean() > 0.999
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    assert slide_labels(model, IMAGE, crop_size, stride)[1] is None


@pytest.mark.parametrize("align", [False, True], ids=["plain", "align_corners"])
@pytest.mark.parametrize("size", [(100, 70), (33, 200), (9, 11), (40, 25)], ids=str)
def test_classes_by_bands_are_those_of_the_resized_logits(size, align, monkeypatch):
    logits = torch.randn(1, 7, 40, 25, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label = torch.randint(0, 7, size, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    label[:3] = 255
    resized = F.interpolate(logits, size, mode="bilinear", align_corners=align)
    plain_loss = F.cross_entropy(resized, label[None].long(), ignore_index=255, reduction="sum").item()
    for budget in (1, 5000, 2**24):
        monkeypatch.setitem(fast_loss.BAND, "cpu", budget)
        classes, loss = resized_classes(logits, size, align, label)
        assert (classes == resized[0].argmax(0)).all() and loss == pytest.approx(plain_loss, rel=1e-12)
        assert resized_classes(logits, size, align)[1] is None


# --------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("band", [1, 2000, 2**30], ids=["single rows", "bands", "at once"])
@pytest.mark.parametrize("align", [False, True], ids=["plain", "align_corners"])
def test_the_loss_by_rows_is_the_loss(align, band, monkeypatch):
    """Values and gradients, with void bands, class weights, odd sizes, and a class that no label shows."""
    monkeypatch.setitem(fast_loss.BAND, "cpu", band)
    torch.manual_seed(0)
    sizes = (((5, 7), (33, 50)), ((13, 13), (97, 97)), ((1, 3), (8, 17)), ((4, 4), (4, 4)), ((9, 8), (5, 3)))
    for (h, w), size in sizes:
        labels = torch.randint(0, 4, (2, *size))
        labels[:, : size[0] // 3] = 255
        for weight in (None, torch.rand(5, dtype=torch.float64)):
            logits = torch.randn(2, 5, h, w, dtype=torch.float64, requires_grad=True)
            resized = F.interpolate(logits, size, mode="bilinear", align_corners=align)
            plain = F.cross_entropy(resized, labels, weight, ignore_index=255, reduction="sum") / labels.numel()
            ours = segmentation_loss(logits, labels, weight, align)
            torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
            expected, found = (torch.autograd.grad(3 * loss, logits)[0] for loss in (plain, ours))
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_the_loss_of_16_bit_logits_is_computed_in_32():
    torch.manual_seed(0)
    labels = torch.randint(0, 5, (2, 33, 50))
    for dtype in (torch.bfloat16, torch.float16):
        logits = (30 * torch.randn(2, 5, 5, 7)).to(dtype).requires_grad_()
        loss = segmentation_loss(logits, labels)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(segmentation_loss(logits.detach().float(), labels).item(), rel=1e-6)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.dtype == dtype and gradient.abs().max() > 0


def test_labels_that_are_all_void_have_no_loss():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((1, 32, 32), 255))
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


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
