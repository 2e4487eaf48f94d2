"""No command replaces a file that it did not write, nor lets two processes write one, nor saves what has diverged."""

import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_log, save_model, start, train_arguments
from PIL import Image

import evaluate
import train
from support import run
from support.checkpoint import State
from support.classes import CITYSCAPES
from support.command import InputError
from support.files import replace
from support.images import read_image
from support.layouts import find_images
from support.pictures import save_png
from support.run import Run
from support.settings import Settings, defaults
from tools import attention, predict


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------------------- the run's folder


@pytest.mark.parametrize("name", run.FILES)
def test_a_folder_with_any_file_of_a_run_is_refused(name, folder, tmp_path, run_inside):
    path = tmp_path / "run" / (f"{name}/000024.png" if name == "samples" else name)
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    before = contents(tmp_path)
    message = run_inside(train, *train_arguments(folder, "run")[1:], fails=True)
    assert f"run: already holds a run ({name})" in message
    assert contents(tmp_path) == {**before, tmp_path / "run/.lock": b""}


def test_a_run_that_lost_its_state_does_not_begin_anew(folder, tmp_path, run_inside):
    run_inside(train, *train_arguments(folder, "run", 2, workers=0)[1:])
    (tmp_path / "run/last.pt").unlink()
    before = contents(tmp_path)
    message = run_inside(train, "--resume", "--out", "run", fails=True)
    assert "run: holds no last.pt to continue from" in message and "--init run/best.pt" in message
    assert contents(tmp_path) == before
    (tmp_path / "run/best.pt").unlink()  # stopped before its first validation: nothing to lose
    assert "from iteration 0 to 2" in run_inside(train, "--resume", "--out", "run", "--workers", 0)


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
    _, err = second.communicate(timeout=60)
    assert second.returncode == 2 and "another process is training there" in err
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    iterations = [line["iteration"] for line in read_log(tmp_path / "run") if "loss" in line]
    assert iterations == sorted(set(iterations))


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["before best.pt", "after best.pt"])
def test_killed_between_the_two_writes(before, folder, tmp_path, run_inside, monkeypatch):
    """last.pt is written, then the validation, then best.pt: a run that ends in between continues to the same two."""

    def save(self, name, state, save=Run.save):
        if name == "best.pt" and before:
            raise SystemExit
        save(self, name, state)
        if name == "best.pt":
            raise SystemExit

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(Run, "save", save)
        run_inside(train, *train_arguments(folder, "run", 3, workers=0)[1:])
    run_inside(train, "--resume", "--out", "run", "--workers", 0)
    last, best = (torch.load(tmp_path / f"run/{name}.pt", weights_only=True) for name in ("last", "best"))
    scores = {line["iteration"]: line["mIoU"] for line in read_log(tmp_path / "run") if "mIoU" in line}
    assert list(scores) == [1, 2, 3] and best["best_miou"] == max(scores.values()) == scores[best["iteration"]]
    assert last["iteration"] == 3 and last["best_miou"] == max(scores[1], scores[2])


def test_a_run_that_another_process_finished_meanwhile(folder, tmp_path, run_inside, monkeypatch):
    """The folder is looked at once it is this process's own."""

    def finished(out, lock=run.lock):
        lock(out)
        (out / "best.pt").touch()

    monkeypatch.setattr(run, "lock", finished)
    message = run_inside(train, *train_arguments(folder, "run")[1:], fails=True)
    assert "run: already holds a run (best.pt)" in message


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    def outer(file):
        file.write(b"outer")
        replace(tmp_path / "a", lambda other: other.write(b"inner"))
        assert (tmp_path / "a").read_bytes() == b"inner"

    replace(tmp_path / "a", outer)
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"outer"


def test_a_users_partial_files_stay(tmp_path):
    for name in ("movie.mp4.partial", "last.pt.12ab.partial"):
        (tmp_path / name).touch()
    with Run(tmp_path, Settings(**defaults({})), 0):
        pass
    assert [path.name for path in tmp_path.glob("*.partial")] == ["movie.mp4.partial"]


@pytest.mark.parametrize("value", [5e29, float("inf"), float("nan")])
def test_weights_that_diverged_are_not_saved(value, tmp_path):
    model = torch.nn.BatchNorm2d(3)
    state = State(model, torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", enabled=False), 7)
    with Run(tmp_path, Settings(**defaults({})), 0) as folder:
        folder.save("last.pt", state)
        before = (tmp_path / "last.pt").read_bytes()
        model.running_var[1] = value
        with pytest.raises(InputError, match=f"iteration 7: .* diverged.*{tmp_path}/last.pt is as before"):
            folder.save("last.pt", state)
        with pytest.raises(InputError, match="diverged"):
            folder.save("best.pt", state)
    assert (tmp_path / "last.pt").read_bytes() == before and not (tmp_path / "best.pt").exists()


def test_a_step_that_diverges_ends_the_run_with_its_last_good_state(folder, tmp_path, run_inside):
    arguments = train_arguments(folder, "run", 3, workers=0)[1:]
    message = run_inside(train, *arguments, "--lr", 1e30, fails=True)
    assert "diverged" in message or "the loss is" in message
    assert not (tmp_path / "run/last.pt").exists() and not (tmp_path / "run/best.pt").exists()


@pytest.mark.slow
def test_the_ablation_ends_its_training(tmp_path):
    process = start(["tools.ablation", "--model", "fcn", "--seeds", 1], tmp_path)
    log = tmp_path / "runs/ablation/context-fcn-0/log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert (tmp_path / "runs/ablation/context-fcn-0/last.pt").exists()
    assert str(tmp_path) not in subprocess.run(["pgrep", "-af", "train.py"], capture_output=True, text=True).stdout
    run.lock(tmp_path / "runs/ablation/context-fcn-0")


# ----------------------------------------------------------------------------------------------- pictures, label maps


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("a.jpg", "a_labels.png"):
        Image.new("RGB", (9, 8), (200, 100, 50)).save(tmp_path / "photos" / name)
    save_model(tmp_path / "model.pt", "gcnet")
    return tmp_path / "photos"


def test_predict_replaces_no_file_of_others(photos, run_inside):
    before = contents(photos)
    message = run_inside(predict, "photos", "--checkpoint", "model.pt", "--out", "photos", fails=True)
    assert message.startswith("photos/a_labels.png: is there already, and was not written by this command")
    assert contents(photos) == before


def test_predict_does_not_predict_its_predictions(photos, tmp_path, run_inside):
    for _ in range(3):
        assert "2 images: " in run_inside(predict, ".", "--checkpoint", "model.pt")
    (photos / "a_labels.png").unlink()
    for _ in range(2):
        assert "1 images: " in run_inside(predict, "photos/*", "--checkpoint", "model.pt", "--out", "photos")
    assert len(contents(photos)) == 4
    with pytest.raises(InputError, match="written by these commands"):
        find_images([str(photos / "a_labels.png")])


def test_attention_replaces_no_file_of_others(photos, run_inside):
    Image.new("RGB", (9, 8)).save(photos / "a.png")
    before = contents(photos)
    message = run_inside(attention, "model.pt", "photos/*.jpg", "--out", "photos", fails=True)
    assert message.startswith("photos/a.png: is there already") and contents(photos) == before
    (photos / "attention.html").write_text("mine")
    (photos / "a.png").unlink()
    message = run_inside(attention, "model.pt", "photos/a.jpg", "--out", "photos", "--html", fails=True)
    assert message.startswith("photos/attention.html: is there already")
    (photos / "attention.html").unlink()
    for _ in range(2):
        run_inside(attention, "model.pt", "photos/a.jpg", "--out", "photos", "--html")


def test_label_maps_of_equal_names_or_among_the_data(folder, tmp_path, run_inside):
    save_model(tmp_path / "model.pt", "gcnet", CITYSCAPES)
    for city in "ab":
        place = tmp_path / "city/leftImg8bit/val" / city
        place.mkdir(parents=True)
        Image.new("RGB", (9, 8)).save(place / "0_leftImg8bit.png")
    data = ("--dataset", "cityscapes", "--data-root", "city", "--workers", 0)
    assert "have one name" in run_inside(evaluate, "model.pt", *data, "--save", "maps", fails=True)
    (folder / "images/val/scene1.png").rename(folder / "images/val/scene1.jpg")
    save_model(tmp_path / "model.pt", "gcnet")
    save = ("model.pt", "--data-root", folder, "--save", folder / "images/val")
    before = contents(folder)
    run_inside(evaluate, *save, fails=True)
    assert contents(folder) == before


def test_label_maps_replace_their_like_alone(folder, tmp_path, run_inside):
    save_model(tmp_path / "model.pt", "gcnet")
    arguments = ("model.pt", "--data-root", folder, "--workers", 0, "--save", "maps")
    for _ in range(2):
        run_inside(evaluate, *arguments)
    Image.new("L", (48, 40)).save(tmp_path / "maps/scene1.png")
    before = contents(tmp_path / "maps")
    assert "maps/scene1.png: is there already" in run_inside(evaluate, *arguments, fails=True)
    assert contents(tmp_path / "maps") == before


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_the_mark_does_not_change_a_picture(mode, tmp_path):
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8)).convert(mode)
    if mode == "P":
        picture.putpalette(list(range(256)) * 3)
    save_png(picture, tmp_path / "a.png")
    save_png(picture, tmp_path / "a.png")
    read = Image.open(tmp_path / "a.png")
    assert read.mode == mode and (np.asarray(read) == np.asarray(picture)).all()
    assert read_image(tmp_path / "a.png").shape == (6, 8, 3)


def test_a_disk_without_room_is_named_with_the_file(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"^/proc/a.png: cannot be written to"):
        save_png(Image.new("L", (2, 2)), Path("/proc/a.png"))
    with Run(tmp_path, Settings(**defaults({})), 0) as folder:
        (tmp_path / "log.jsonl").unlink()
        (tmp_path / "log.jsonl").symlink_to("/dev/full")
        with pytest.raises(InputError, match=rf"^{tmp_path}/log.jsonl: cannot be written to \(No space left"):
            folder.log(0, loss=1)
