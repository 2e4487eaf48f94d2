"""Faults of the machine, the files and the user: one clear line, none hangs, nothing is lost."""

import contextlib
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from conftest import make_folder, one_line, read_log, start, train_arguments
from PIL import Image

import evaluate
import train
from support.command import explain
from support.run import Run
from support.settings import Settings, defaults


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a data set `own` and a run `run` on it, interrupted after a few of its 2000 steps."""
    place = tmp_path_factory.mktemp("trained")
    process = running(place, make_folder(place))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    return place


def running(place, folder):
    """A training process that is past its first steps."""
    process = start(train_arguments(folder, "run", 2000), place)
    wait_for_steps(process, place / "run")
    return process


def wait_for_steps(process, run):
    log = run / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.05)


def children(parent):
    return [int(p) for p in subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True).stdout.split()]


def data_workers(process):
    """The process numbers of the data-loading workers, which are children of a child: the fork server."""
    return [worker for child in children(process) for worker in children(child)]


@pytest.fixture
def own(trained, tmp_path):
    """A copy of it to spoil."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.slow
def test_a_worker_that_dies(folder, tmp_path):
    process = running(tmp_path, folder)
    os.kill(data_workers(process.pid)[0], signal.SIGKILL)  # of training; validation's come after it
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    message = err.strip().splitlines()[-1]
    assert message.startswith("train.py: error: a data-loading worker died") and "lower --workers" in message


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_all_its_processes(number, folder, tmp_path):
    """As torchrun, a scheduler or a terminal that closes send it."""
    process = start(train_arguments(folder, "run", 2000), tmp_path, start_new_session=True)
    wait_for_steps(process, tmp_path / "run")
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=120)  # which would wait for a process that is left over
    assert process.returncode == 128 + number and "continue with --resume" in out and "error" not in err
    assert (tmp_path / "run/last.pt").exists()


@pytest.mark.slow
def test_workers_end_with_a_process_that_is_killed(folder, tmp_path):
    process = running(tmp_path, folder)
    assert len(data_workers(process.pid)) == 2  # one for training, one for validation
    process.kill()
    process.communicate(timeout=120)


@pytest.mark.slow
def test_validation_starts_no_process(folder, tmp_path):
    process = start(train_arguments(folder, "run", 40, workers=2), tmp_path)
    wait_for_steps(process, tmp_path / "run")
    before = {*children(process.pid), *data_workers(process.pid)}
    while process.poll() is None and len(list((tmp_path / "run/samples").glob("*.png"))) < 3:
        time.sleep(0.05)
    assert {*children(process.pid), *data_workers(process.pid)} == before and len(before) == 6
    process.kill()
    process.communicate(timeout=120)


@pytest.mark.slow
def test_a_file_that_vanishes(folder, tmp_path):
    process = running(tmp_path, folder)
    (folder / "images/train/scene3.png").unlink()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in err
    message = err.strip().splitlines()[-1]
    assert message.startswith("train.py: error: ") and "train/scene3.png: cannot be read" in message


def test_any_mode_and_any_size(folder, run_inside):
    place = folder / "images/train"
    for mode, name in (("L", "scene1.png"), ("RGBA", "scene2.png"), ("P", "scene3.png"), ("CMYK", "scene4.jpg")):
        image = Image.open(place / f"{name[:6]}.png").convert(mode)
        (place / f"{name[:6]}.png").unlink()
        image.save(place / name)
    for split in ("train", "val"):
        Image.new("RGB", (1, 1)).save(folder / f"images/{split}/tiny.png")
        Image.new("L", (1, 1)).save(folder / f"annotations/{split}/tiny.png")
    larger = ("--crop-size", 48, 64, "--batch-size", 7)  # than any image; and all of them in each step
    run_inside(train, *train_arguments(folder, "run", 1, workers=0)[1:], *larger)
    assert "mIoU" in run_inside(evaluate, "run/best.pt", "--aug", "--workers", 0)


def edit(path, **values):
    saved = torch.load(path, weights_only=True)
    for name, value in values.items():
        saved["model"][name] = value
    torch.save(saved, path)


FAULTS = {  # what is done to a copy of the trained folder, the command, words of its message
    "resume, other depth": (None, "train.py --resume --out run --depth 50", ["--depth 50", "has 18"]),
    "init, other depth": (
        None,
        "train.py --dataset folder --data-root own --depth 34 --init run/last.pt",
        ["run/last.pt: does not fit the model", "layer"],
    ),
    "out is a file": (lambda own: (own / "file").touch(), "train.py --out file", ["file", "File exists"]),
    "out cannot be made": (None, "train.py --out /proc/run", ["/proc/run"]),
    "save is a file": (
        lambda own: (own / "file").touch(),
        "evaluate.py run/last.pt --save file",
        ["file", "File exists"],
    ),
    "not finite": (
        lambda own: edit(own / "run/last.pt", **{"decode_head.conv_seg.bias": torch.tensor([0, np.nan, 0])}),
        "evaluate.py run/last.pt",
        ["run/last.pt: decode_head.conv_seg.bias holds values that are not finite"],
    ),
    "cut short": (
        lambda own: os.truncate(own / "run/last.pt", 10**6),
        "train.py --resume --out run",
        ["run/last.pt: cannot be read as a checkpoint"],
    ),
}


@pytest.mark.parametrize("what", list(FAULTS))
def test_a_fault_is_one_line(what, own, run_script, run_inside):
    spoil, command, words = FAULTS[what]
    if spoil:
        spoil(own)
    before = {path: path.stat().st_mtime_ns for path in (own / "run").iterdir()}
    script, *arguments = command.split()
    if what == "out cannot be made":
        one_line(run_script(script, *arguments, status=2), script, words)
    else:
        module = {"train.py": train, "evaluate.py": evaluate}[script]
        message = run_inside(module, *arguments, "--workers", 0, fails=True)
        assert "\n" not in message and all(word in message for word in words), message
    assert {path: path.stat().st_mtime_ns for path in (own / "run").iterdir()} == before


DAMAGE = b'{"iteration": 1}\n\0\0\xff\n[1]}\n{"iter'


def test_a_damaged_log_is_repaired(tmp_path):
    settings = Settings(**defaults({}))
    (tmp_path / "log.jsonl").write_bytes(b'{"iteration": 0, "loss": 2}\n' + DAMAGE + b'\n{"iteration": 5}\n')
    with contextlib.closing(Run(tmp_path, settings, 5)) as run:
        run.log(5, loss=1)
    assert read_log(tmp_path) == [{"iteration": 0, "loss": 2}, {"iteration": 1}, {"iteration": 5, "loss": 1}]


@pytest.mark.slow
def test_a_damaged_log_does_not_stop_a_run(own):
    with open(own / "run/log.jsonl", "ab") as file:
        file.write(DAMAGE)
    process = start(["train.py", "--resume", "--out", "run"], own)
    while process.poll() is None and b"\0" in (own / "run/log.jsonl").read_bytes():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=120)[1].count("Traceback") == 0 and process.returncode == 143


@pytest.mark.parametrize(
    "error, status, words",
    [
        pytest.param(
            "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')",
            2,
            "lower --batch-size or --crop-size",
            marks=pytest.mark.slow,
        ),
        pytest.param(  # its traceback is wanted, but no waiting
            "ValueError('a mistake of ours')", 1, "a mistake of ours", marks=pytest.mark.slow
        ),
    ],
    ids=["memory", "ours"],
)
def test_an_error_in_the_step_ends_at_once(error, status, words, folder, tmp_path):
    code = f"""
import torch, train
from support.command import run_command
def step(*arguments): raise {error}
train.training_step = step
run_command(train.main)"""
    process = start(["-c", code, *train_arguments(folder, "run", workers=2)[1:]], tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == status and words in err.splitlines()[-1]
    assert ("Traceback" in err) == (status == 1)


def test_memory_that_is_full_is_named():
    assert "lower --batch-size" in explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert "lower --batch-size" in explain(RuntimeError("GET was unable to find an engine to execute this computation"))
    assert "/dev/shm is full" in explain(RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"))
    assert explain(RuntimeError("another mistake")) is None
