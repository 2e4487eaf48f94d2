"""The scenes whose objects' classes the sky decides, and the ablation on them."""

import numpy as np
import torch

from data import VOID, SegmentationData, TrainData
from support import context


def test_the_sky_alone_decides_what_an_object_is():
    for index in range(20):
        (dusk, dusk_label), (day, day_label) = (context.draw("val", index, time) for time in (0, 1))
        changed = np.flatnonzero((dusk != day).any(axis=(0, 2)))
        assert changed.max() < context.SKY or changed.min() >= context.WIDTH - context.SKY  # the scene may be mirrored
        distance = np.abs(np.flatnonzero((dusk_label != VOID).any(0) & (dusk_label > 2).any(0))[:, None] - changed)
        assert distance.min() > 40
        twin = np.array([0, 2, 1, 4, 3, 6, 5], np.uint8)  # the same form at the other time
        valid = dusk_label != VOID
        assert (valid == (day_label != VOID)).all() and (twin[dusk_label[valid]] == day_label[valid]).all()


def test_scenes_are_fixed_distinct_and_balanced():
    counts = np.zeros(256, int)
    for index in range(200):
        image, label = context.draw("train", index)
        assert image.shape == (32, 160, 3) and image.dtype == label.dtype == np.uint8
        assert all(np.array_equal(*pair) for pair in zip((image, label), context.draw("train", index), strict=True))
        assert not np.array_equal(image, context.draw("val", index)[0])
        counts += np.bincount(label.flatten(), minlength=256)
    share = counts[:7] / counts[:7].sum()
    assert counts[7:VOID].sum() == 0 and 0.4 < share[1] / share[1:3].sum() < 0.6
    assert (share[3:] > 0.04).all() and share[3:].max() < 1.5 * share[3:].min()


def test_training_sees_scenes_whole():
    samples = TrainData(SegmentationData("context", None, "train"), (context.HEIGHT, context.WIDTH), None, seed=0)
    for position in range(20):
        label = samples[position, position]["label"]
        present = {int(value) for value in label.unique() if value not in (0, VOID)}
        assert len(present & {1, 2}) == 1 and present & {3, 4, 5, 6}
        assert samples[position, position]["size"].tolist() == [context.HEIGHT, context.WIDTH]


def test_the_ablation_is_one_command(run_script, tmp_path):
    command = ("tools/ablation.py", "--seeds", 1, "--model", "ann", "--iters")
    table = [line for line in run_script(*command, 1).stdout.splitlines() if line.startswith("|")]
    name, miou, span, parameters, multiply_adds, speed = table[2].strip("| ").split(" | ")
    assert len(table) == 3 and (name, parameters, multiply_adds) == ("ann", "12.62", "1.084")  # 10^6 and 10^9
    state = torch.load(tmp_path / "runs/ablation/ann-0/best.pt", weights_only=True)
    assert span == f"{miou}, {miou}" and 0 < float(miou) <= 100 * state["best_miou"] + 0.05 and float(speed) > 0
    assert run_script(*command, 1).stdout.splitlines() == table  # what is finished is not run again
    other = run_script(*command, 2, status=2).stderr
    assert "train.py: error: --iters 2: the run in" in other and "ablation.py: error: runs/ablation/ann-0: " in other
