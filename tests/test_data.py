"""Files to batches: OpenCV's pixels, aligned labels, the crop's rule, and randomness that depends on nothing else."""

import os
import resource

import numpy as np
import pytest
import reference
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data import (
    MEAN,
    STD,
    VOID,
    Batches,
    SegmentationData,
    TrainData,
    distort,
    keep_ratio,
    nearest,
    resize,
    sample,
    to_device,
)
from support.layouts import InputError

OPENCV = reference.arrays("opencv")
IMAGE = torch.tensor(reference.arrays("inputs")["image"])


def test_keep_ratio():
    for w, h, long, short, new_w, new_h in reference.arrays("rescale")["rows"].tolist():
        assert keep_ratio((h, w), (long, short)) == (new_h, new_w)


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


def test_nearest_lies_on_the_images_grid():
    assert nearest(4, 8).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert nearest(6, 3).tolist() == [1, 3, 5]


def test_distort_is_the_reference():
    colour = torch.tensor(OPENCV["colour_params"])
    images = IMAGE.permute(2, 0, 1)[None].float().expand(len(colour), -1, -1, -1)
    for i, ours in enumerate(distort(images, colour).permute(0, 2, 3, 1).numpy()):
        difference = np.abs(ours - OPENCV[f"colour_{i}"])
        in_hsv = colour[i, 2] != 1 or colour[i, 3] != 0  # the reference rounds hue to 2 degrees, and saturation
        assert difference.max() <= (5 if in_hsv else 0) and difference.mean() < 0.6


@pytest.fixture
def data(folder):
    return SegmentationData("folder", folder, "train")


def neutral(sample):
    return sample | {"colour": torch.tensor([0.0, 1, 1, 0, 1])}


def test_label_and_image_stay_together(data):
    """Wherever the 3x3 neighbourhood is of one class, the image must show that class; padding is 0 and void."""
    train, padded = TrainData(data, (36, 44), None, seed=0), 0
    for position in range(30):
        sample = neutral(train[position, position % len(data)])
        images, labels = to_device(torch.utils.data.default_collate([sample]), "cpu")
        assert images.shape == (1, 3, 36, 44) and images.dtype == torch.float32
        red = images[0, 0] * STD[0] + MEAN[0]
        label, (h, w) = labels[0], sample["size"]
        inside = torch.zeros_like(label, dtype=torch.bool)
        inside[:h, :w] = True
        assert (images[:, :, ~inside] == 0).all() and (label[~inside] == VOID).all()
        padded += int((~inside).sum())
        blocks = torch.nn.functional.unfold(label[None, None].float(), 3)
        uniform = (blocks == blocks[:, :1]).all(1).view(label.shape[0] - 2, label.shape[1] - 2)
        inner, shown = label[1:-1, 1:-1], red[1:-1, 1:-1]
        checked = uniform & (inner != VOID)
        assert checked.any()
        assert ((shown - (60 * inner + 30)).abs()[checked] < 1).all()
    assert padded > 0


def test_crops_avoid_a_single_class(data, monkeypatch):
    label = torch.zeros(64, 64, dtype=torch.uint8)
    label[:16] = 1  # 16x16 crops with less than 75% of one class are rare here
    monkeypatch.setattr(SegmentationData, "__getitem__", lambda self, i: (torch.zeros(64, 64, 3).byte(), label))
    train = TrainData(data, (16, 16), None, seed=0)
    mixed = sum(0.25 < train[p, 0]["label"].float().mean() < 0.75 for p in range(200))
    assert mixed > 120, mixed  # a single draw gives about 25; ten more give it nearly always, at r < 2


def test_augmentation_covers_its_ranges(data):
    train = TrainData(data, (8, 8), None, seed=0)
    colours = torch.stack([train[p, 0]["colour"] for p in range(400)])
    brightness, early, saturation, hue, late = colours.T
    assert brightness.min() < -28 and brightness.max() > 28
    assert 0.5 <= early.min() < 0.55 and 1.45 < early.max() <= 1.5 and 0.5 <= late.min() < 0.55
    assert 0.5 <= saturation.min() < 0.55 and 1.45 < saturation.max() <= 1.5
    assert set((hue * 180).round().int().tolist()) == set(range(-18, 18))
    assert ((early == 1) | (late == 1)).all()
    for neutral_share in (brightness == 0, saturation == 1, (early == 1) & (late == 1)):
        assert 0.4 < neutral_share.float().mean() < 0.6


def test_batches_depend_on_seed_and_position_only(data):
    train = TrainData(data, (32, 32), None, seed=3)

    def load(workers, start=0, **shared):
        return list(
            DataLoader(train, batch_sampler=Batches(6, seed=3, start=start, stop=8, **shared), num_workers=workers)
        )

    whole = load(0, batch=4)
    for other in (load(2, batch=4), whole[:3] + load(1, batch=4, start=3)):
        for one, two in zip(whole, other, strict=True):
            assert all(one[key] == two[key] if key == "file" else one[key].equal(two[key]) for key in one)
    halves = [load(0, batch=2, rank=rank, world=2) for rank in (0, 1)]
    for one, *parts in zip(whole, *halves, strict=True):
        assert one["image"].equal(torch.cat([part["image"] for part in parts]))
    shown = [index for keys in Batches(6, 3, 0, 0, 4) for _, index in keys]
    assert sorted(shown[:6]) == sorted(shown[6:]) == list(range(6)) and shown[:6] != shown[6:]


def test_the_cache_gives_what_was_read(folder, tmp_path):
    plain, cached = (SegmentationData("folder", folder, "train", cache) for cache in (None, tmp_path / "cache"))
    for _ in range(2):
        for i in range(len(plain)):
            assert all(one.equal(two) for one, two in zip(plain[i], cached[i], strict=True))
        assert len(list((tmp_path / "cache").iterdir())) == 2 * len(plain)
    path = plain.files[0][0]
    Image.new("RGB", (48, 40), (1, 2, 3)).save(path)  # a file that changes is read again, though its name stays
    assert cached[0][0].equal(plain[0][0]) and cached[0][0][0, 0].tolist() == [1, 2, 3]
    cached[1][0].zero_()  # whoever writes into an image writes into a copy
    assert cached[1][0].equal(plain[1][0])


@pytest.mark.parametrize(
    "fault, words", [("a file", "cannot be written to"), ("damaged", "delete it"), ("full", "with room for all")]
)
def test_a_cache_that_fails_says_so(fault, words, folder, tmp_path):
    cache = tmp_path / "cache"
    data, limits = SegmentationData("folder", folder, "train", cache), resource.getrlimit(resource.RLIMIT_FSIZE)
    if fault == "a file":
        cache.touch()
    elif fault == "damaged":
        data[0]
        for file in cache.iterdir():
            os.truncate(file, 150)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    with pytest.raises(InputError, match=words):
        try:
            data[0]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert fault != "full" or not list(cache.iterdir())
