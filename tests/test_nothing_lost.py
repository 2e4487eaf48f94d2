"""No command replaces a file unless told to, nor lets two processes write one, nor saves what has diverged."""

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import contents, read_log, save_model, start, train_arguments
from PIL import Image

import evaluate
import train
from support import run
from support.classes import names_and_colours
from support.command import InputError
from support.files import write_file
from support.pictures import save_png
from support.run import Run
from support.settings import Settings, defaults
from tools import attention

# ------------------------------------------------------------------------------------------------- the run's folder


@pytest.mark.parametrize("name", run.RUN_FILES)
def test_a_folder_with_a_file_of_a_run_is_refused(name, folder, tmp_path, run_inside):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("a state")
    before = contents(tmp_path)
    message = run_inside(train, *train_arguments(folder, "run")[1:], fails=True)
    what = "a run; continue it with --resume, or" if name == "last.pt" else f"{name}, but no last.pt;"
    assert message == f"run: already holds {what} name another folder with --out"
    assert contents(tmp_path) == {**before, tmp_path / "run/.lock": b""}


def test_a_run_can_be_continued_from_its_beginning(folder, tmp_path, run_inside, monkeypatch):
    """last.pt is the first file of a run, so that --resume needs no other settings, whenever it was stopped."""

    def stop(*arguments):
        raise SystemExit

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(train, "training_step", stop)
        run_inside(train, *train_arguments(folder, "run", 2, workers=0)[1:])
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["iteration"] == 0
    assert "gcnet R-18 on folder, 6 images, from iteration 0 to 2" in run_inside(train, "--resume", "--out", "run")


def test_a_kill_during_a_validation_loses_no_step(folder, tmp_path, run_inside, monkeypatch):
    """A scheduler may wait for less time than a validation takes."""

    def stop(*arguments, **options):
        raise SystemExit

    monkeypatch.setattr(train, "evaluate", stop)
    with pytest.raises(SystemExit):
        run_inside(train, *train_arguments(folder, "run", 20, workers=0)[1:])
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["iteration"] == 2


def test_a_damaged_state_names_the_other_one(folder, tmp_path, run_inside):
    run_inside(train, *train_arguments(folder, "run", 1, workers=0)[1:])
    os.truncate(tmp_path / "run/last.pt", 1000)
    message = run_inside(train, "--resume", "--out", "run", fails=True)
    assert (
        message.startswith("run/last.pt: cannot be read as a checkpoint") and "run/best.pt, copied over it" in message
    )
    (tmp_path / "run/best.pt").rename(tmp_path / "run/last.pt")
    assert "from iteration 1 to 1" in run_inside(train, "--resume", "--out", "run", "--workers", 0)


def test_nothing_to_resume(tmp_path, run_inside):
    message = run_inside(train, "--resume", "--out", "typo", fails=True)
    assert message == "typo: holds no run to continue" and not (tmp_path / "typo").exists()


def test_a_run_that_lost_its_state_does_not_start_again(folder, tmp_path, run_inside):
    arguments = train_arguments(folder, "run", 2, workers=0)[1:]
    run_inside(train, *arguments)
    for name, other in (("last.pt", "best.pt"), ("best.pt", "config.json")):
        (tmp_path / "run" / name).unlink()
        before = contents(tmp_path)
        for words in (["--resume", "--out", "run"], [*arguments, "--resume"]):
            message = run_inside(train, *words, fails=True)
            assert message == f"run: already holds {other}, but no last.pt; name another folder with --out"
        assert contents(tmp_path) == before


def test_one_process_at_a_time_writes_to_a_run(tmp_path):
    code = "import sys, time; from pathlib import Path; from support.run import lock"
    code += "; lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    other = start(["-c", code, tmp_path], tmp_path)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"^{tmp_path}: another process is training there"):
        run.lock(tmp_path)
    other.kill()
    other.wait()
    run.lock(tmp_path)


@pytest.mark.slow
def test_resume_beside_the_living_run(folder, tmp_path):
    process = start(train_arguments(folder, "run", 2000), tmp_path)
    log = tmp_path / "run/log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.05)
    second = start(["train.py", "--resume", "--out", "run"], tmp_path)
    _, err = second.communicate(timeout=120)
    assert second.returncode == 2 and "another process is training there" in err
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    iterations = [line["iteration"] for line in read_log(tmp_path / "run") if "loss" in line]
    assert iterations == sorted(set(iterations))


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["before best.pt", "after best.pt"])
def test_killed_between_the_two_writes(before, folder, tmp_path, run_inside, monkeypatch):
    """last.pt is written before a validation, best.pt after it; a run that ends in between continues to both."""

    def save(self, state, name="last.pt", save=Run.save):
        if name == "best.pt" and before:
            raise SystemExit
        save(self, state, name)
        if name == "best.pt":
            raise SystemExit

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(Run, "save", save)
        run_inside(train, *train_arguments(folder, "run", 3, workers=0)[1:])
    run_inside(train, "--resume", "--out", "run", "--workers", 0)
    last, best = (torch.load(tmp_path / f"run/{name}.pt", weights_only=True) for name in ("last", "best"))
    scores = {line["iteration"]: line["mIoU"] for line in read_log(tmp_path / "run") if "mIoU" in line}
    assert list(scores) == [1, 2, 3] and best["best_miou"] == max(scores.values()) == scores[best["iteration"]]
    assert last["iteration"] == 3


def test_a_run_that_another_process_finished_meanwhile(folder, tmp_path, run_inside, monkeypatch):
    """The folder is looked at once it is this process's own."""

    def finished(out, lock=run.lock):
        lock(out)
        (out / "best.pt").touch()

    monkeypatch.setattr(run, "lock", finished)
    message = run_inside(train, *train_arguments(folder, "run")[1:], fails=True)
    assert "run: already holds best.pt" in message


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    def outer(file):
        file.write(b"outer")
        write_file(tmp_path / "a", lambda other: other.write(b"inner"))
        assert (tmp_path / "a").read_bytes() == b"inner"

    write_file(tmp_path / "a", outer)
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"outer"


def test_a_users_partial_files_stay(tmp_path):
    for name in ("movie.mp4.partial", "last.pt.12ab34cd.partial"):
        (tmp_path / name).touch()
    with contextlib.closing(Run(tmp_path, Settings(**defaults({})), 0)):
        pass
    assert [path.name for path in tmp_path.glob("*.partial")] == ["movie.mp4.partial"]


def test_a_training_that_diverges_leaves_its_last_good_state(folder, tmp_path, run_inside):
    """At learning rate 15 the loss stays a number, since BatchNorm divides by the batch's own deviation."""
    message = run_inside(train, *train_arguments(folder, "run", 9, workers=0)[1:], "--lr", 15, fails=True)
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)["iteration"]
    assert re.match(rf"iteration {saved + 1}: diverged at learning rate 1\d: the model's scores are not", message)
    assert message.endswith("start again with a lower --lr; run/last.pt is the last state that was finite")
    assert "mIoU" in run_inside(evaluate, "run/last.pt", "--workers", 0)
    again = run_inside(train, "--resume", "--out", "run", "--workers", 0, fails=True)
    assert again == message  # resumed, and ended at the same place


def test_a_state_that_is_saved_between_validations_can_be_evaluated(folder, tmp_path, run_inside, monkeypatch):
    """Stopped at a moment when the loss is a number, but the model in eval mode gives none."""

    def spoil(model, *arguments, step=train.training_step):
        losses = step(model, *arguments)
        model.backbone.stem[1].running_var.fill_(-1)
        signal.raise_signal(signal.SIGTERM)
        return losses

    monkeypatch.setattr(train, "training_step", spoil)
    message = run_inside(train, *train_arguments(folder, "run", 80, workers=0)[1:], fails=True)
    assert message.startswith("iteration 1: diverged at learning rate 0.01: the model's scores are not numbers")
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["iteration"] == 0


@pytest.mark.slow
def test_the_ablation_ends_its_training(tmp_path):
    process = start(["tools.ablation", "--model", "fcn", "--seeds", 1], tmp_path)
    log = tmp_path / "runs/ablation/context-fcn-0/log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err
    assert (tmp_path / "runs/ablation/context-fcn-0/last.pt").exists()
    assert str(tmp_path) not in subprocess.run(["pgrep", "-af", "train.py"], capture_output=True, text=True).stdout
    run.lock(tmp_path / "runs/ablation/context-fcn-0")


# ----------------------------------------------------------------------------------------------- pictures, label maps


def test_attention_replaces_files_only_if_told_to(tmp_path, run_inside):
    save_model(tmp_path / "model.pt", "gcnet")
    Image.new("RGB", (9, 8), (200, 100, 50)).save(tmp_path / "a.jpg")
    command = ("model.pt", "--images", "a.jpg", "--out", "seen", "--html")
    run_inside(attention, *command)
    before = contents(tmp_path)
    assert "seen/a.png: already exists; --overwrite" in run_inside(attention, *command, fails=True)
    assert contents(tmp_path) == before
    run_inside(attention, *command, "--overwrite")


def test_label_maps_of_equal_names_are_refused(tmp_path, run_inside):
    save_model(tmp_path / "model.pt", "gcnet", names_and_colours("cityscapes")[0])
    for city in "ab":
        place = tmp_path / "city/leftImg8bit/val" / city
        place.mkdir(parents=True)
        Image.new("RGB", (9, 8)).save(place / "0_leftImg8bit.png")
    data = ("--dataset", "cityscapes", "--data-root", "city", "--workers", 0)
    assert "have one name" in run_inside(evaluate, "model.pt", *data, "--save", "maps", fails=True)


def test_label_maps_and_figures_are_replaced_only_if_told_to(folder, tmp_path, run_inside):
    save_model(tmp_path / "model.pt", "gcnet")
    arguments = ("model.pt", "--data-root", folder, "--workers", 0)
    for output, file in ((("--save", "maps"), "maps/scene1.png"), (("--json", "all.json"), "all.json")):
        run_inside(evaluate, *arguments, *output)
        (tmp_path / file).write_text("mine")
        message = run_inside(evaluate, *arguments, *output, fails=True)
        assert "already exists; --overwrite" in message and (tmp_path / file).read_text() == "mine"
        run_inside(evaluate, *arguments, *output, "--overwrite")
        assert (tmp_path / file).read_bytes() != b"mine"


def test_a_disk_without_room_is_named_with_the_file(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"^/proc/a.png: cannot be written to"):
        save_png(Image.new("L", (2, 2)), Path("/proc/a.png"))
