"""The settings, from their one declaration: what --help shows, and what a resumed run keeps."""

import contextlib
import dataclasses
import re
import sys

import pytest
import torch

from support import run, settings
from support.checkpoint import State
from support.command import InputError
from support.run import Run, open_run
from support.settings import PRESETS, Settings


@pytest.fixture
def parse(tmp_path, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "--out", str(tmp_path / "run")])
        given, out, resume, _ = settings.parse_arguments("About it.")
        return open_run(out, given, resume)[0], out

    return run


def begin(out, given):
    """A run's folder after its first saving."""
    model = torch.nn.Linear(1, 1)
    state = State(model, torch.optim.SGD(model.parameters()), torch.amp.GradScaler("cpu", enabled=False))
    with contextlib.closing(Run(out, given, 0)) as run:
        run.save(state)


@pytest.mark.parametrize("given", [(), ("--dataset", "ade20k"), ("--dataset", "context", "--depth", "101")], ids=str)
def test_help_shows_the_true_defaults(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where no run stands in the default folder
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setattr(sys, "argv", ["train.py", *given])
    given_settings, out, resume, _ = settings.parse_arguments("")
    parsed, _ = open_run(out, given_settings, resume)
    monkeypatch.setattr(sys, "argv", ["train.py", *given, "--help"])
    with pytest.raises(SystemExit):
        settings.parse_arguments("")
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
        assert PRESETS[name].images_per_step == 4 * PRESETS[name].batch_size == (8 if "city" in name else 16)
    assert PRESETS["cityscapes769"].data is PRESETS["cityscapes"].data


@pytest.mark.parametrize("depth, weights", [(18, "imagenet"), (34, "none"), (50, "imagenet"), (101, "imagenet")])
def test_where_there_are_imagenet_weights_they_are_the_default(depth, weights, parse):
    for name in PRESETS:
        drawn = name in ("shapes", "context", "legend")  # with which a run needs no downloads
        assert parse("--dataset", name, "--depth", str(depth))[0].pretrained == ("none" if drawn else weights)
        assert parse("--dataset", name, "--depth", str(depth), "--init", "x")[0].pretrained == "none"


def test_a_resumed_run_keeps_its_settings(parse):
    config, out = parse("--dataset", "cityscapes769", "--crop-size", "600", "500", "--seed", "3")
    assert config.stride == [513, 500] and config.align_corners and config.scale == [2049, 1025]
    begin(out, config)
    assert parse("--resume") == (config, out)
    assert parse("--resume", "--workers", "7", "--cache", "/c")[0] == dataclasses.replace(config, workers=7, cache="/c")
    for words in ("--iters 5", "--seed 4", "--depth 101", "--amp bf16", "--crop-size 8 8", "--init x", "--compile"):
        with pytest.raises(InputError, match=rf"^{words.split()[0]} .*: the run in {out} has "):
            parse("--resume", *words.split())


def test_a_longer_run_starts_from_the_weights(parse):
    config, out = parse("--iters", "7")
    begin(out, config)
    with pytest.raises(InputError, match=rf"--iters 9: the run in {out} has 7; --init {out}/last.pt --out NEW starts"):
        parse("--resume", "--iters", "9")


def test_config_json_is_for_people(parse):
    """What a run is stands in last.pt; an edited config.json changes nothing."""
    config, out = parse("--seed", "3")
    begin(out, config)
    (out / "config.json").write_text('{"seed": 4, "iters": "many"}')
    assert parse("--resume")[0] == config


@pytest.mark.parametrize(
    "words, message",
    [
        ("--lr 0", "--lr: 0 is not a finite number above 0"),
        ("--iters 0", "--iters: 0 is not a whole number from 1"),
        ("--seed -1", "--seed: -1 is not a whole number"),
        ("--model unet", "--model: invalid choice: 'unet'"),
        ("--blocks gc16 everywhere", "--blocks gc16 everywhere: there is no such block and place"),
        ("--data-root=", "--data-root=: is empty"),
        ("--iter 20", "unrecognized arguments: --iter 20"),
        ("--init a --pretrained none", "a run starts from one of them"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(words, message, parse):
    with pytest.raises(InputError, match=message):
        parse(*words.split())


def test_the_batch_is_compared_with_the_published_recipe(parse, monkeypatch):
    monkeypatch.setattr(run, "rank_and_world", lambda: (0, 2))
    for words, expected in (
        (("--dataset", "ade20k"), "give --batch-size or --accumulate for as many, or --lr 0.005"),
        (("--dataset", "ade20k", "--lr", "0.005"), None),
        (("--dataset", "ade20k", "--batch-size", "8"), None),
        (("--dataset", "folder"), None),
    ):
        config, out = parse(*words)
        _, first, *others = run.describe(config, 100, 0, out, torch.device("cpu")).splitlines()
        parts = f"2 (processes) x {config.batch_size} (--batch-size) x 1 (--accumulate)"
        assert first == f"{2 * config.batch_size} images per step: {parts}; BatchNorm, cpu"
        assert others == ([f"the published recipe has 16 images per step; {expected}"] if expected else [])
