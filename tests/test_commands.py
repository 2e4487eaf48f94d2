"""The commands on a small data set of own images: a run and what it leaves, resuming, mistakes."""

import json
import signal
import time

import numpy as np
import pytest
import torch
from conftest import changed, one_line, read_log, same_weights, save_model, start, train_arguments
from PIL import Image

import evaluate
import train
from data import open_data
from support.command import InputError


def test_a_run_and_its_evaluation(folder, run_script, run_inside, tmp_path):
    done = run_script(*train_arguments(folder, "runs/one", 2))
    run = tmp_path / "runs/one"
    assert "2 images per step: 1 (processes) x 2 (--batch-size) x 1 (--accumulate); BatchNorm" in done.stdout
    assert "house" in done.stdout and "mIoU" in done.stdout
    lines = read_log(run)
    assert [line["iteration"] for line in lines if "mIoU" in line] == [1, 2]
    assert lines[0].keys() == {"iteration", "loss", "aux_loss", "lr", "images_per_second", "skipped"}
    assert json.loads((run / "config.json").read_text())["crop_size"] == [32, 32]
    assert len(list((run / "samples").glob("*.png"))) == 2
    last, best = (torch.load(run / name, weights_only=True) for name in ("last.pt", "best.pt"))
    assert last["iteration"] == 2
    assert best["best_miou"] == max(line["mIoU"] for line in lines if "mIoU" in line)

    result = f"mIoU {best['best_miou']:.2%}"
    whole = run_script("evaluate.py")  # the newest run, best.pt
    assert result in whole.stdout and "tree" in whole.stdout
    assert result in run_inside(evaluate, run / "best.pt", "--workers", 0)
    assert "mIoU" in run_inside(evaluate, "--aug", "--split", "train", "--workers", 0)

    again = run_inside(train, *train_arguments(folder, "runs/one", 2)[1:], fails=True)
    assert again.startswith("runs/one: already holds a run; continue it with --resume, or name another folder")
    other = run_inside(train, "--resume", "--out", "runs/one", "--lr", "0.5", fails=True)
    assert "--lr 0.5" in other and "0.01" in other


def test_interrupted_and_resumed_equals_uninterrupted(folder, run_inside, tmp_path, monkeypatch):
    """Ctrl-C in the first and the third of four steps, of which only the last is validated."""
    monkeypatch.setattr(train, "validation_is_due", lambda iteration, iters: iteration == iters)
    run_inside(train, *train_arguments(folder, "whole", workers=0)[1:])
    steps = []

    def interrupted(*arguments, step=train.training_step):
        steps.append(1)
        if len(steps) in (1, 3):
            signal.raise_signal(signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(train, "training_step", interrupted)
    arguments = train_arguments(folder, "parts", workers=0)[1:]
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            run_inside(train, *arguments)
        assert stopped.value.code == 130
        arguments = ("--resume", "--out", "parts")
    run_inside(train, *arguments)
    assert len(steps) == 4 and same_weights(tmp_path / "whole/last.pt", tmp_path / "parts/last.pt")
    assert same_log(tmp_path / "whole", tmp_path / "parts")


def same_log(*runs):
    """Whether the logs agree but for the speed."""
    one, two = ([{**line, "images_per_second": 0} for line in read_log(run)] for run in runs)
    return one == two


@pytest.mark.slow
def test_a_process_interrupted_and_resumed(folder, run_script, tmp_path):
    run_script(*train_arguments(folder, "whole", 12))
    arguments = train_arguments(folder, "parts", 12)
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        before = changed(tmp_path / "parts/last.pt")
        process = start(arguments, tmp_path)
        while process.poll() is None and changed(tmp_path / "parts/last.pt") == before:
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
        assert process.returncode == status and "--resume" in out and "Traceback" not in err, out + err
        arguments = ["train.py", "--resume", "--out", "parts", "--workers", "0"]
    run_script("train.py", "--resume", "--out", "parts")
    assert same_weights(tmp_path / "whole/last.pt", tmp_path / "parts/last.pt")
    assert same_log(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_two_processes_are_one_run(folder, run_script, run_inside, tmp_path):
    done = run_script(*train_arguments(folder, "two", 1), processes=2)
    assert done.stdout.count("4 images per step: 2 (processes) x 2 (--batch-size) x 1 (--accumulate); ") == 1
    best = torch.load(tmp_path / "two/best.pt", weights_only=True)
    assert best["iteration"] == 1
    result = f"mIoU {best['best_miou']:.2%}"  # of three images, shared by two processes
    assert result in done.stdout and result in run_inside(evaluate, "two/best.pt", "--workers", 0)


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(folder, run_script, tmp_path):
    model = save_model(tmp_path / "model.pt", "gcnet")
    alone = run_script("evaluate.py", model, "--data-root", folder).stdout
    assert "mIoU" in alone and run_script("evaluate.py", model, "--data-root", folder, processes=2).stdout == alone


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


@pytest.mark.parametrize("what", list(mistakes()))
def test_a_mistake_in_the_data_is_one_line(what, folder):
    make, words = mistakes()[what]
    make(folder)
    with pytest.raises(InputError) as error:
        for data in [open_data("folder", folder, split) for split in ("train", "val")]:
            [data[i] for i in range(len(data))]
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("what", ["no mask", "value"])  # found by the process itself, and by a data-loading worker
def test_a_mistake_ends_the_process_in_one_line(what, folder, run_script):
    make, words = mistakes()[what]
    make(folder)
    one_line(run_script(*train_arguments(folder, "run", 1), "--batch-size", 6, status=2), "train.py", words)


def test_a_checkpoint_that_is_none_is_one_line(run_script, run_inside, tmp_path):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    model = {"model": {}, "config": {"model": "gcnet", "depth": 18, "classes": ["a"]}}
    for name, content in {"text": b"no checkpoint", "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
    for name, content in {"list": [1], "classes": model, "code": {"model": Malicious()}}.items():
        torch.save(content, tmp_path / name)
    words = {"text": "cannot be read", "empty": "cannot be read", "list": "needs model", "classes": "does not fit"}
    for name, word in {**words, "code": "could run code", "missing": "no such"}.items():
        message = run_inside(evaluate, name, fails=True)
        assert name in message and word in message and "\n" not in message
    one_line(run_script("evaluate.py", "code", status=2), "evaluate.py", ["code", "could run code"])
    assert not (tmp_path / "executed").exists()
    message = run_inside(evaluate, fails=True)
    assert "no run" in message and "train.py" in message
