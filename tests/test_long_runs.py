"""What may happen in a week of training: kills, full disks, dying ranks, losses that are not finite, precisions."""

import os
import random
import resource
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, changed, make_folder, read_log, same_weights, start, train_arguments
from PIL import Image

import train

# The real command, but it saves after every step, so that kills hit the writing too.
OFTEN = "import train; from support import command, run; run.SAVE_SECONDS = 0; command.run_command(train.main)"


@pytest.mark.slow
def test_ten_kills(folder, run_script, tmp_path):
    """SIGKILL at random moments, then the same weights, bit for bit, as of a run left alone."""
    run_script(*train_arguments(folder, "whole", 20))
    chance, kills, last = random.Random(0), 0, tmp_path / "parts/last.pt"
    arguments = ["-c", OFTEN, *train_arguments(folder, "parts", 20)[1:]]
    while kills < 10:
        before = changed(last)
        process = start(arguments, tmp_path)
        while process.poll() is None and changed(last) == before:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.25))  # a step takes about as long, half of it the writing
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        kills += 1
        arguments = ["-c", OFTEN, "--resume", "--out", "parts", "--workers", int(kills % 5 == 0)]
    assert kills >= 6
    done = start(["-c", OFTEN, "--resume", "--out", "parts"], tmp_path)
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, out + err
    assert same_weights(tmp_path / "whole/last.pt", last)


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_checkpoint(folder, run_script, tmp_path):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    process = start(["-c", OFTEN, *train_arguments(folder, "run", 200)[1:]], tmp_path)
    while process.poll() is None and not (tmp_path / "run/last.pt").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    before = (tmp_path / "run/last.pt").read_bytes()
    process = start(["train.py", "--resume", "--out", "run"], tmp_path, preexec_fn=limited)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2 and "Traceback" not in err
    message = err.strip().splitlines()[-1]
    assert ".pt: cannot be written" in message and "File too large" in message
    assert (tmp_path / "run/last.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob("*.partial"))


@pytest.mark.slow
def test_a_rank_that_dies_is_started_again(folder, run_script, tmp_path):
    arguments = train_arguments(folder, "whole", 10)
    run_script(*arguments, processes=2)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1"]
    process = start([*launch, ROOT / "train.py", *train_arguments(folder, "parts", 10)[1:], "--resume"], tmp_path)
    while process.poll() is None and not (tmp_path / "parts/last.pt").exists():
        time.sleep(0.05)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert same_weights(tmp_path / "whole/last.pt", tmp_path / "parts/last.pt")


@pytest.mark.slow
def test_a_rank_that_fails_speaks_alone(folder, run_script):
    path = folder / "annotations/train/scene2.png"
    Image.fromarray(np.full((40, 48), 9, np.uint8)).save(path)
    done = run_script(*train_arguments(folder, "run", 10), processes=2, status=1)
    assert done.stderr.count("train.py: error: ") == 1 and "scene2.png: holds the value 9" in done.stderr
    assert 'train.py", line' not in done.stderr


@pytest.mark.slow
def test_gradients_of_two_processes(tmp_path):
    process = start(["-m", "torch.distributed.run", "--nproc_per_node=2", ROOT / "tests/ddp_gradients.py"], tmp_path)
    out, err = process.communicate(timeout=300)
    assert out.count("equal") == 2, err


def test_a_loss_that_is_not_finite_stops_the_run(folder, run_inside, tmp_path, monkeypatch):
    rates = []

    def poly_lr(*arguments, poly_lr=train.poly_lr):
        rates.append(poly_lr(*arguments))
        return rates[-1]

    def loss(*arguments, loss=train.segmentation_loss):
        return loss(*arguments) * (float("nan") if len(rates) > 4 else 1)

    monkeypatch.setattr(train, "poly_lr", poly_lr)
    monkeypatch.setattr(train, "segmentation_loss", loss)
    monkeypatch.setattr(train, "validation_is_due", lambda *arguments: False)
    message = run_inside(train, *train_arguments(folder, "run", 20, workers=0)[1:], fails=True)
    assert "iteration 4: diverged at learning rate 0.0082: the loss is nan" in message
    log = read_log(tmp_path / "run")
    assert max(line["iteration"] for line in log) == 3 and all("NaN" not in str(line) for line in log)
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["iteration"] == 0


LIKE = ("--lr", "0.003", "--workers", 0)


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("exact"))
    start([*train_arguments(folder, "run", 5), *LIKE, "--batch-size", 4], folder).communicate(timeout=300)
    return losses(folder / "run")


def losses(run):
    return np.array([line["loss"] for line in read_log(run) if "loss" in line])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, tolerance",
    [
        (("--batch-size", 4, "--amp", "bf16"), 0.05),
        (("--batch-size", 4, "--amp", "fp16"), 0.05),
        (("--batch-size", 2, "--accumulate", 2), 0.25),  # BatchNorm sees two images, not four
        pytest.param(
            ("--batch-size", 4, "--compile"),
            0.01,
            marks=pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU"),
        ),
    ],
    ids=["bf16", "fp16", "accumulate", "compile"],
)
def test_the_loss_curve_stays(options, tolerance, exact, folder, run_script, tmp_path):
    run_script(*train_arguments(folder, "run", 5), *LIKE, *options)
    assert len(exact) == 5
    np.testing.assert_allclose(losses(tmp_path / "run"), exact, rtol=tolerance)
