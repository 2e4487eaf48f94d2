"""The real command lines on a small data set of own images: a run and what it leaves, resuming, mistakes."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from support import settings
from support.checkpoint import begin_run

SMALL = ("--depth", 18, "--crop-size", 32, 32, "--batch-size", 2, "--workers", 1)


def train_arguments(folder, out, iters=10):
    return ["train.py", "--dataset", "folder", "--data-root", folder, *SMALL, "--iters", iters, "--out", out]


def checkpoint(path):
    return torch.load(path, weights_only=True)


def changed(path):
    return path.stat().st_mtime if path.exists() else 0


def same_weights(one, two):
    return all(value.equal(checkpoint(two)["model"][key]) for key, value in checkpoint(one)["model"].items())


def test_a_run_and_its_evaluation(folder, run_script, tmp_path):
    done = run_script(*train_arguments(folder, "runs/one"))
    run = tmp_path / "runs/one"
    assert "1 x 2 x 1 = 2 images per step; BatchNorm" in done.stdout
    assert "house" in done.stdout and "mIoU" in done.stdout
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "mIoU" in line] == list(range(1, 11))
    assert lines[0].keys() == {"iteration", "loss", "aux_loss", "lr", "images_per_second", "skipped"}
    assert json.loads((run / "config.json").read_text())["crop_size"] == [32, 32]
    assert len(list((run / "samples").glob("*.png"))) == 10
    assert checkpoint(run / "last.pt")["iteration"] == 10
    best = max(line["mIoU"] for line in lines if "mIoU" in line)
    assert checkpoint(run / "best.pt")["best_miou"] == best

    whole = run_script("evaluate.py")  # the newest run, best.pt
    assert f"mIoU {best:.2%}" in whole.stdout and "tree" in whole.stdout
    assert run_script("evaluate.py", run / "best.pt", processes=2).stdout.count("mIoU") == 1
    assert f"mIoU {best:.2%}" in run_script("evaluate.py", "--checkpoint", run / "best.pt", processes=2).stdout
    assert "mIoU" in run_script("evaluate.py", "--aug", "--split", "train").stdout

    again = run_script(*train_arguments(folder, "runs/one"), status=2)
    assert again.stderr.strip() == (
        "train.py: error: runs/one: already holds a run; continue it with --resume, or name another folder with --out"
    )
    other = run_script("train.py", "--resume", "--out", "runs/one", "--lr", "0.5", status=2)
    assert "--lr 0.5" in other.stderr and "0.01" in other.stderr


def test_interrupted_and_resumed_equals_uninterrupted(folder, run_script, tmp_path):
    run_script(*train_arguments(folder, "whole", 12))
    command = [str(part) for part in (sys.executable, ROOT / "train.py", *train_arguments(folder, "parts", 12)[1:])]
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 0)):
        before = changed(tmp_path / "parts/last.pt")
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and changed(tmp_path / "parts/last.pt") == before:
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        assert process.returncode == status and "--resume" in out and "Traceback" not in err, out + err
        command = [sys.executable, str(ROOT / "train.py"), "--resume", "--out", "parts", "--workers", "0"]
    run_script("train.py", "--resume", "--out", "parts")
    assert same_weights(tmp_path / "whole/last.pt", tmp_path / "parts/last.pt")

    def log(name):
        lines = (json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines())
        return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]

    assert log("whole") == log("parts")


def test_a_resumed_run_keeps_its_settings(tmp_path, monkeypatch):
    def parse(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "--out", str(tmp_path / "run")])
        return settings.parse("")

    config, out, _ = parse("--dataset", "cityscapes769", "--crop-size", "600", "500", "--seed", "3")
    assert config["stride"] == [513, 500] and config["align_corners"] and config["scale"] == [2049, 1025]
    begin_run(out, config, 0)
    assert parse("--resume") == (config, out, True)


def test_two_processes_are_one_run(folder, run_script, tmp_path):
    done = run_script(*train_arguments(folder, "two", 2), processes=2)
    assert done.stdout.count("2 x 2 x 1 = 4 images per step; BatchNorm, cpu") == 1
    assert checkpoint(tmp_path / "two/last.pt")["iteration"] == 2
    run_script("evaluate.py", "two/last.pt")


def mistakes():
    """(what is wrong, how to make it so in a data set, words that the message must hold)"""

    def replace_label(root, array):
        Image.fromarray(array).save(root / "annotations/train/scene1.png")

    def truncate(root):
        path = root / "images/train/scene1.png"
        path.write_bytes(path.read_bytes()[:300])

    def empty(root):
        for path in (root / "images/val").rglob("*.png"):
            path.unlink()

    labels = np.zeros((40, 48), np.uint8)
    return {
        "no root": (
            lambda root: root.rename(root.with_name("gone")),
            ["own", "--data-root", "classes.txt"],
        ),
        "no mask": (lambda root: (root / "annotations/train/scene1.png").unlink(), ["train/scene1.png", "no label"]),
        "sizes": (lambda root: replace_label(root, labels[:30]), ["scene1.png", "48x30", "48x40"]),
        "value": (lambda root: replace_label(root, labels + 7), ["scene1.png", "value 7", "0 to 2"]),
        "rgb": (lambda root: replace_label(root, np.stack([labels] * 3, -1)), ["scene1.png", "8-bit", "RGB"]),
        "truncated": (truncate, ["images/train/scene1.png", "cannot be read"]),
        "empty split": (empty, ["own", "no images", "'val'"]),
        "no classes": (lambda root: (root / "classes.txt").unlink(), ["classes.txt", "missing"]),
        "class twice": (lambda root: (root / "classes.txt").write_text("a\nb\na\n"), ["classes.txt", "line 3"]),
        "class empty": (lambda root: (root / "classes.txt").write_text("a\n\nb\n"), ["classes.txt", "line 2", "empty"]),
    }


def one_line(done, script, words):
    assert "Traceback" not in done.stderr, done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith(f"{script}: error: "), done.stderr
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("what", list(mistakes()))
def test_a_mistake_in_the_data_is_one_line(what, folder, run_script):
    make, words = mistakes()[what]
    make(folder)
    one_line(run_script(*train_arguments(folder, "run", 6), status=2), "train.py", words)


def test_a_checkpoint_that_is_none_is_one_line(folder, run_script, tmp_path):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    model = {"model": {}, "config": {"model": "gcnet", "depth": 18, "classes": []}}
    for name, content in {"text": b"no checkpoint", "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
    for name, state in {"list": [1], "classes": model, "code": {"model": Malicious()}}.items():
        torch.save(state, tmp_path / name)
    words = {"text": "no checkpoint", "empty": "no checkpoint", "list": "no config", "classes": "how many classes"}
    for name, word in {**words, "code": "could run code", "missing": "no such"}.items():
        one_line(run_script("evaluate.py", name, status=2), "evaluate.py", [name, word])
    assert not (tmp_path / "executed").exists()
    one_line(run_script("evaluate.py", status=2), "evaluate.py", ["no run", "train.py"])
