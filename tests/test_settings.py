"""The settings, from their one declaration: what --help shows, what config.json may hold, what a resumed run keeps."""

import dataclasses
import json
import re
import sys

import pytest
import torch

from support import settings
from support.command import InputError
from support.run import Run
from support.settings import PRESETS, Settings


@pytest.fixture
def parse(tmp_path, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "--out", str(tmp_path / "run")])
        given, out, resume, _ = settings.parse("About it.")
        return settings.agree(given, out, resume)[0], out

    return run


def begin(out, given):
    """A run's folder as its first step finds it."""
    with Run(out, given, 0):
        pass


@pytest.mark.parametrize("given", [(), ("--dataset", "ade20k"), ("--dataset", "context", "--depth", "101")], ids=str)
def test_help_shows_the_true_defaults(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where no run stands in the default folder
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setattr(sys, "argv", ["train.py", *given])
    parsed, _, _ = settings.agree(*settings.parse("")[:3])
    monkeypatch.setattr(sys, "argv", ["train.py", *given, "--help"])
    with pytest.raises(SystemExit):
        settings.parse("")
    text = capsys.readouterr().out
    for field in dataclasses.fields(Settings):
        if not field.metadata["help"]:
            assert f"{settings.flag(field)} " not in text
            continue
        (entry,) = re.findall(rf"^  {settings.flag(field)}\s.*?(?=^  -|^$)", text, re.M | re.S)
        value = getattr(parsed, field.name)
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        if field.name not in ("dataset", "depth", "data_root"):  # of which the first two are given here
            assert entry.strip().endswith(f"(default: {shown})") == (value is not None and value is not False), entry
    assert f"--dataset {parsed.dataset};" in text


def test_presets_are_the_published_recipes():
    for name in ("cityscapes", "cityscapes769", "ade20k", "voc12aug"):
        assert PRESETS[name].lr == 0.01 and PRESETS[name].depth == 50
        assert PRESETS[name].images == 4 * PRESETS[name].batch_size == (8 if "city" in name else 16)
    assert PRESETS["cityscapes769"].data is PRESETS["cityscapes"].data


@pytest.mark.parametrize("depth, weights", [(18, "imagenet"), (34, "none"), (50, "imagenet"), (101, "imagenet")])
def test_where_there_are_imagenet_weights_they_are_the_default(depth, weights, parse):
    for name in PRESETS:
        drawn = name.startswith(("shapes", "context", "legend"))  # with which a run needs no downloads
        assert parse("--dataset", name, "--depth", str(depth))[0].pretrained == ("none" if drawn else weights)


def test_a_resumed_run_keeps_its_settings(parse):
    config, out = parse("--dataset", "cityscapes769", "--crop-size", "600", "500", "--seed", "3")
    assert config.stride == [513, 500] and config.align_corners and config.scale == [2049, 1025]
    begin(out, config)
    assert parse("--resume") == (config, out)
    assert parse("--resume", "--workers", "7", "--cache", "/c")[0] == dataclasses.replace(config, workers=7, cache="/c")
    for words in ("--iters 5", "--seed 4", "--depth 101", "--amp bf16", "--crop-size 8 8", "--init x", "--compile"):
        with pytest.raises(InputError, match=rf"^{words.split()[0]} .*: the run in {out} has "):
            parse("--resume", *words.split())


def test_a_run_begun_by_an_earlier_version_has_all_settings(parse):
    """What config.json held before a setting was added that is off unless given."""
    config, out = parse("--seed", "3")
    begin(out, config)
    path = out / "config.json"
    saved = json.loads(path.read_text())
    del saved["blocks"], saved["cityscapes_ablation"], saved["cache"], saved["deterministic"]
    path.write_text(json.dumps(saved))
    assert parse("--resume")[0] == config


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("iters", None, "argument --iters: cannot be None"),
        ("iters", "twenty", "argument --iters: cannot be 'twenty'"),
        ("iters", -3, "argument --iters: -3 is not a whole number"),
        ("lr", float("nan"), "argument --lr: nan is not a finite number above 0"),
        ("model", "unet", "argument --model: cannot be 'unet'; choose from gcnet, "),
        ("depth", 20, "argument --depth: cannot be 20"),
        ("crop_size", [32], r"argument --crop-size: cannot be \[32\]; its type is list"),
        ("crop_size", [32, 0], "argument --crop-size: 0 is too few"),
        ("compile", "no", "argument --compile: cannot be 'no'"),
        ("scale", "large", r"scale: cannot be 'large'; its type is list \| None"),
        ("batchsize", 8, "there is no setting batchsize"),
        ("iters", dataclasses.MISSING, "lacks the setting iters"),
        ("seed", dataclasses.MISSING, "lacks the setting seed"),
    ],
)
def test_an_edited_config_is_checked(name, value, words, parse):
    config, out = parse()
    begin(out, config)
    saved = json.loads((out / "config.json").read_text()) | {name: value}
    if value is dataclasses.MISSING:
        del saved[name]
    (out / "config.json").write_text(json.dumps(saved))
    with pytest.raises(InputError, match=f"^{out}/config.json: {words}"):
        parse("--resume")


@pytest.mark.parametrize(
    "words, message",
    [
        ("--lr 0", "--lr: 0 is not a finite number above 0"),
        ("--iters 0", "--iters: 0 is too few"),
        ("--seed -1", "--seed: -1 is not a whole number"),
        ("--model unet", "--model: invalid choice: 'unet'"),
        ("--batch-size 1 --crop-size 8 8", "BatchNorm needs more than one value"),
        ("--init a --pretrained none", "a run starts from one of them"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(words, message, parse):
    with pytest.raises(InputError, match=message):
        parse(*words.split())


def test_the_batch_is_compared_with_the_published_recipe(parse, monkeypatch):
    monkeypatch.setattr(settings, "rank_and_world", lambda: (0, 2))
    for words, expected in (
        (("--dataset", "ade20k"), "--batch-size 8, or --accumulate 2 (but BatchNorm sees 8), or --lr 0.005"),
        (("--dataset", "ade20k", "--batch-size", "8"), None),
        (("--dataset", "folder"), None),
    ):
        config, _ = parse(*words)
        config.effective_batch = 2 * config.batch_size
        first, *others = settings.describe_batch(config, torch.device("cpu")).splitlines()
        assert first == f"2 x {config.batch_size} x 1 = {2 * config.batch_size} images per step; BatchNorm, cpu"
        assert others == ([f"the published recipe has 16 images per step; to match it: {expected}"] if expected else [])
