"""The scenes whose objects' classes the sky decides, and the ablation on them."""

import numpy as np
import pytest
import torch

from data import TrainData, open_data
from support import scenes
from support.images import VOID
from support.settings import PRESETS
from tools import ablation


def test_the_sky_alone_decides_what_an_object_is():
    for index in range(20):
        (dusk, dusk_label), (day, day_label) = (scenes.draw_context("val", index, time) for time in (0, 1))
        changed = np.flatnonzero((dusk != day).any(axis=(0, 2)))
        assert changed.max() < scenes.SKY or changed.min() >= scenes.WIDTH - scenes.SKY  # the scene may be mirrored
        distance = np.abs(np.flatnonzero((dusk_label != VOID).any(0) & (dusk_label > 2).any(0))[:, None] - changed)
        assert distance.min() > 40
        twin = np.array([0, 2, 1, 4, 3, 6, 5], np.uint8)  # the same form at the other time
        valid = dusk_label != VOID
        assert (valid == (day_label != VOID)).all() and (twin[dusk_label[valid]] == day_label[valid]).all()


def test_scenes_are_fixed_distinct_and_balanced():
    counts = np.zeros(256, int)
    for index in range(200):
        image, label = scenes.draw_context("train", index)
        assert image.shape == (32, 160, 3) and image.dtype == label.dtype == np.uint8
        again = scenes.draw_context("train", index)
        assert np.array_equal(image, again[0]) and np.array_equal(label, again[1])
        assert not np.array_equal(image, scenes.draw_context("val", index)[0])
        counts += np.bincount(label.flatten(), minlength=256)
    share = counts[:7] / counts[:7].sum()
    assert counts[7:VOID].sum() == 0 and 0.4 < share[1] / share[1:3].sum() < 0.6
    assert (share[3:] > 0.04).all() and share[3:].max() < 1.5 * share[3:].min()


def test_training_sees_scenes_whole():
    preset = PRESETS["context"]
    samples = TrainData(open_data("context", None, "train"), preset.crop_size, preset.scale, 0, preset.ratios)
    for position in range(20):
        label = samples[position, position]["label"]
        present = {int(value) for value in label.unique() if value not in (0, VOID)}
        assert len(present & {1, 2}) == 1 and present & {3, 4, 5, 6}
        assert samples[position, position]["valid"].tolist() == [scenes.HEIGHT, scenes.WIDTH]


def test_drawn_scenes_are_a_data_set():
    for name, count in (("shapes", 6), ("context", 7)):
        data = open_data(name, None, "val")
        image, label = data[3]
        assert len(data) == len(data.files) == 50 and data.labelled and len(data.classes) == len(data.palette) == count
        assert image.shape[:2] == label.shape and str(data.files[3][0]) == "val00003"


@pytest.mark.slow
def test_the_ablation_is_one_command(run_inside, tmp_path):
    command = ("--seeds", 1, "--model", "ann", "--iters")
    table = [line for line in run_inside(ablation, *command, 1).splitlines() if line.startswith("|")]
    name, miou, span, parameters, multiply_adds, speed = table[2].strip("| ").split(" | ")
    assert len(table) == 3 and (name, parameters, multiply_adds) == ("ann", "12.62", "1.069")  # 10^6 and 10^9
    state = torch.load(tmp_path / "runs/ablation/ann-0/best.pt", weights_only=True)
    assert span == f"{miou}, {miou}" and 0 < float(miou) <= 100 * state["best_miou"] + 0.05 and float(speed) > 0
    assert run_inside(ablation, *command, 1).splitlines() == table  # what is finished is not run again
    assert "runs/ablation/ann-0: holds a run with iters 1, not 2" in run_inside(ablation, *command, 2, fails=True)
