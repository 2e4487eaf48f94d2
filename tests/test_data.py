"""Files to batches: aligned labels, the crop's rule, colours, and randomness that depends on nothing else."""

import os
import resource
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data import (
    TrainData,
    batch_keys,
    distort,
    distort_and_normalise,
    keep_ratio,
    nearest_pixels,
    open_data,
    training_loader,
)
from support.command import InputError
from support.images import MEAN, STD, VOID, Files

OPENCV = reference.arrays("opencv")
IMAGE = torch.tensor(reference.arrays("inputs")["image"])


def test_keep_ratio():
    for w, h, long, short, new_w, new_h in reference.arrays("rescale")["rows"].tolist():
        assert keep_ratio((h, w), (long, short)) == (new_h, new_w)


def test_nearest_lies_on_the_images_grid():
    assert nearest_pixels(4, 8).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert nearest_pixels(6, 3).tolist() == [1, 3, 5]


def test_distort_is_the_reference():
    colour = torch.tensor(OPENCV["colour_params"])
    images = IMAGE.permute(2, 0, 1)[None].float().expand(len(colour), -1, -1, -1)
    for i, ours in enumerate(distort(images, colour).permute(0, 2, 3, 1).numpy()):
        difference = np.abs(ours - OPENCV[f"colour_{i}"])
        in_hsv = colour[i, 2] != 1 or colour[i, 3] != 0  # the reference rounds hue to 2 degrees, and saturation
        assert difference.max() <= (5 if in_hsv else 0) and difference.mean() < 0.6


@pytest.fixture
def data(folder):
    return open_data("folder", folder, "train")


def neutral(sample):
    return sample | {"colour": torch.tensor([0.0, 1, 1, 0, 1])}


def test_label_and_image_stay_together(data):
    """Wherever the 3x3 neighbourhood is of one class, the image must show that class; padding is 0 and void."""
    train, padded = TrainData(data, (36, 44), None, seed=0, ratios=(0.5, 2)), 0
    for position in range(30):
        sample = neutral(train[position, position % len(data)])
        images, labels = distort_and_normalise(torch.utils.data.default_collate([sample]), "cpu")
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
    monkeypatch.setattr(Files, "__getitem__", lambda self, i: (torch.zeros(64, 64, 3).byte(), label))
    train = TrainData(data, (16, 16), None, seed=0, ratios=(0.5, 2))
    mixed = sum(0.25 < train[p, 0]["label"].float().mean() < 0.75 for p in range(200))
    assert mixed > 120, mixed  # a single draw gives about 25; ten more give it nearly always, at r < 2


def test_augmentation_covers_its_ranges(data):
    train = TrainData(data, (8, 8), None, seed=0, ratios=(0.5, 2))
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
    train = TrainData(data, (32, 32), None, seed=3, ratios=(0.5, 2))

    def load(workers, start=0, **shared):
        keys = batch_keys(6, seed=3, start=start, stop=8, **shared)
        return list(DataLoader(train, batch_sampler=keys, num_workers=workers))

    whole = load(0, batch_size=4)
    for other in (load(2, batch_size=4), whole[:3] + load(1, batch_size=4, start=3)):
        for one, two in zip(whole, other, strict=True):
            assert all(one[key].equal(two[key]) for key in one)
    halves = [load(0, batch_size=2, rank=rank, world=2) for rank in (0, 1)]
    for one, *parts in zip(whole, *halves, strict=True):
        assert one["image"].equal(torch.cat([part["image"] for part in parts]))
    shown = [index for keys in batch_keys(6, 3, 0, 0, 4) for _, index in keys]
    assert sorted(shown[:6]) == sorted(shown[6:]) == list(range(6)) and shown[:6] != shown[6:]


def test_the_cache_gives_what_was_read(folder, tmp_path):
    plain, cached = (open_data("folder", folder, "train", cache) for cache in (None, tmp_path / "cache"))
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
    "fault, words", [("a file", "must be a folder"), ("damaged", "delete it"), ("full", "with room for decoded")]
)
def test_a_cache_that_fails_says_so(fault, words, folder, tmp_path):
    cache = tmp_path / "cache"
    data, limits = open_data("folder", folder, "train", cache), resource.getrlimit(resource.RLIMIT_FSIZE)
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


def test_the_cache_knows_the_labels_table(folder, tmp_path):
    data = open_data("folder", folder, "train", tmp_path / "cache")
    labels = [data[i][1] for i in range(len(data))]
    assert any((label == 2).any() for label in labels)
    (folder / "classes.txt").write_text("road\nhouse\n")
    fewer = open_data("folder", folder, "train", tmp_path / "cache")
    with pytest.raises(InputError, match="holds the value 2; labels are 0 to 1"):
        [fewer[i] for i in range(len(fewer))]


def test_the_loader_continues_at_an_iteration(folder):
    data = open_data("folder", folder, "train")
    settings = SimpleNamespace(dataset="folder", crop_size=[16, 16], scale=None, ratios=[0.5, 2], seed=5, batch_size=2)
    settings.accumulate, settings.iters, settings.workers = 3, 4, 0
    whole = list(training_loader(data, settings, 0, 0, 1, False))
    rest = list(training_loader(data, settings, 3, 0, 1, False))
    assert len(whole) == 12 and len(rest) == 3
    assert all(one["image"].equal(two["image"]) for one, two in zip(whole[9:], rest, strict=True))
