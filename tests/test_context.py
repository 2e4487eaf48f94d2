"""The scenes whose objects' classes the sky or a legend decides, and the ablation on them."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data import TrainData, open_data
from support import scenes
from support.images import VOID
from support.settings import PRESETS, Settings, defaults
from tools import ablation


def test_the_sky_alone_decides_what_an_object_is():
    for index in range(20):
        (dusk, dusk_label), (day, day_label) = (scenes.draw_context("val", index, time) for time in (0, 1))
        changed = np.flatnonzero((dusk != day).any(axis=(0, 2)))
        assert changed.max() < scenes.SKY or changed.min() >= scenes.WIDTH - scenes.SKY  # the scene may be mirrored
        distance = np.abs(np.flatnonzero((dusk_label != VOID).any(0) & (dusk_label > 2).any(0))[:, None] - changed)
        assert distance.min() > 40
        twin = np.array([0, 2, 1, 4, 3, 6, 5], np.uint8)  # the same form at the other time
        afar = ablation.decided_by_far_end("context", *map(torch.from_numpy, (dusk, dusk_label)))
        assert afar.numpy().any() and np.array_equal(afar, (dusk_label != day_label) & (dusk == day).all(2))
        valid = dusk_label != VOID
        assert (valid == (day_label != VOID)).all() and (twin[dusk_label[valid]] == day_label[valid]).all()


def test_the_legend_alone_decides_what_an_object_is():
    """One entry of it decides for the objects of that form alone."""
    for index in range(20):
        kind, colour = index % 4, index // 4 % 2
        one, two = [colour] * 4, [1 - colour if k == kind else colour for k in range(4)]
        (image, label), (other, other_label) = (scenes.draw_legend("val", index, chosen) for chosen in (one, two))
        expected = label.copy()
        expected[label == 1 + 2 * kind + colour] = 1 + 2 * kind + 1 - colour
        assert np.array_equal(other_label, expected)
        repainted = (image != other).any(2)
        entry = repainted.any(0).nonzero()[0]
        assert len(entry) and np.ptp(entry) < 31
        hidden = (label != other_label) & ~repainted  # of the form, and on the other side
        afar = ablation.decided_by_far_end("legend", *map(torch.from_numpy, (image, label))).numpy()
        assert np.array_equal(afar & (label == 1 + 2 * kind + colour), hidden)
        objects = hidden.any(0).nonzero()[0]
        legend = np.arange(label.shape[1])[:: 1 if entry[0] < 4 * scenes.STEP else -1][: 4 * scenes.STEP]
        assert not len(objects) or np.abs(objects[:, None] - legend).min() > scenes.GAP - 2
        grey = image[..., 0].astype(int) - image[..., 2]
        assert np.abs(np.delete(grey, legend, 1)).mean() < 12  # there is no colour but noise


@pytest.mark.parametrize("name, size, rare", [("context", (32, 160), 0.04), ("legend", (32, 221), 0.02)])
def test_scenes_are_fixed_distinct_and_balanced(name, size, rare):
    data, again, other = (open_data(name, None, split) for split in ("train", "train", "val"))
    classes = len(data.classes)
    counts = np.zeros(256, int)
    for index in range(200):
        image, label = data[index]
        assert image.shape == (*size, 3) and image.dtype == label.dtype == torch.uint8
        assert image.equal(again[index][0]) and label.equal(again[index][1])
        assert not image.equal(other[index][0])
        counts += np.bincount(label.flatten(), minlength=256)
    share = counts[:classes] / counts[:classes].sum()
    assert counts[classes:VOID].sum() == 0 and (share[1:] > rare).all()
    for forms in (share[1::2], share[2::2]):  # the two skies, or the two colours of each form
        assert 0.4 < forms[0] / (share[1] + share[2]) < 0.6
    if name == "context":
        assert share[3:].max() < 1.5 * share[3:].min()


@pytest.mark.parametrize("name", ["context", "legend"])
def test_training_sees_scenes_whole(name):
    preset = PRESETS[name]
    data = open_data(name, None, "train")
    samples = TrainData(data, preset.crop_size, preset.scale, 0, preset.ratios)
    for position in range(20):
        label = samples[position, position]["label"]
        present = {int(value) for value in label.unique() if value not in (0, VOID)}
        if name == "context":
            assert len(present & {1, 2}) == 1 and present & {3, 4, 5, 6}
        else:
            forms = [name.split()[-1] for name in data.classes]
            assert {forms[value] for value in present} == set(forms[1:])
        assert samples[position, position]["size"].tolist() == list(preset.crop_size)


def test_drawn_scenes_are_a_data_set():
    counts = {"shapes": 6, "context": 7, "legend": 9}
    assert list(counts) == ["shapes", "context", "legend"]
    for name, count in counts.items():
        data = open_data(name, None, "val")
        image, label = data[3]
        assert len(data) == len(data.files) == 50 and data.labelled and len(data.classes) == len(data.palette) == count
        assert image.shape[:2] == label.shape and str(data.files[3][0]) == "val00003"
        copy = pickle.loads(pickle.dumps(data))  # processes and workers of loaders receive it so
        assert copy[3][0].equal(image) and (copy.name, copy.split, copy.cache) == (name, "val", None)


@pytest.mark.parametrize("name, forms", [("context", ["disc", "cross"]), ("legend", list(scenes.LEGEND_FORMS))])
def test_the_ablation_counts_what_the_far_end_decides(name, forms, monkeypatch):
    """A model that is right about the discs among those objects alone."""
    data = open_data(name, None, "val")
    scene = iter(data)
    discs = torch.tensor([kind for kind, words in enumerate(data.classes) if "disc" in words])

    def guess(model, image, settings):
        image, label = next(scene)
        return torch.where(torch.isin(label, discs) & ablation.decided_by_far_end(name, image, label), label, 99), None

    settings = Settings(dataset=name, classes=data.classes)
    monkeypatch.setattr(ablation, "load_model", lambda path: (None, settings))
    monkeypatch.setattr(ablation, "for_inference", lambda model, device: model)
    monkeypatch.setattr(ablation, "predict", guess)
    monkeypatch.setattr(ablation, "validations", lambda out: {300: 61.28})
    head, _, row = ablation.results_table({"ann": [Path("run")]}, 300)
    assert head == f"| model | mIoU | lowest, highest | {' | '.join(forms)} |"
    assert row == f"| ann | 61.3 | 61.3, 61.3 | 100{' | 0' * (len(forms) - 1)} |"


@pytest.mark.slow
def test_the_ablation_is_one_command(run_inside, tmp_path):
    command = ("--seeds", 1, "--model", "ann", "ann", "--iters")
    lines = run_inside(ablation, *command, 1).splitlines()
    table = [line for line in lines if line.startswith("|")]
    name, miou, span, disc, cross = table[2].strip("| ").split(" | ")
    assert name == "ann" and int(disc) >= 0 and int(cross) >= 0 and len(table) == 3
    state = torch.load(tmp_path / "runs/ablation/context-ann-0/best.pt", weights_only=True)
    assert span == f"{miou}, {miou}" and 0 < float(miou) <= 100 * state["best_miou"] + 0.05
    assert run_inside(ablation, *command, 1).splitlines() == lines  # what is finished is not run again
    log = tmp_path / "runs/ablation/context-ann-0/log.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if "mIoU" not in line))
    assert run_inside(ablation, *command, 1).splitlines() == lines  # a run stopped before its end is continued


@pytest.mark.slow
def test_the_ablation_refuses_another_run(run_inside, tmp_path):
    arguments = ("--seeds", 1, "--model", "fcn", "--iters")
    out = tmp_path / "runs/ablation/context-fcn-0"
    out.mkdir(parents=True)
    settings = Settings(**defaults({"dataset": "context"}) | {"dataset": "context", "model": "fcn", "iters": 1})
    settings.effective_batch = settings.batch_size
    for name, value, wanted in (("iters", 2, 1), ("amp", "bf16", "none"), ("effective_batch", 8, 4)):
        torch.save({"model": {}, "config": vars(replace(settings, **{name: value}))}, out / "last.pt")
        message = run_inside(ablation, *arguments, 1, fails=True)
        words = f"--{name} {wanted}".replace("_", "-")
        assert message.startswith(f"{words}: the run in runs/ablation/context-fcn-0 has {value}")
    (out / "last.pt").rename(out / "best.pt")  # train.py refuses this one
    message = run_inside(ablation, *arguments, 1, fails=True)
    assert message.startswith("runs/ablation/context-fcn-0: its training ended early, see above")
