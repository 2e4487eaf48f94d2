"""tools/reproduce.py: what it measures, how it goes on after a stop, the table, what it refuses."""

import http.server
import json
import threading
from functools import partial

import pytest
import torch
from conftest import published, write_scene

import evaluate
from support import zoo
from support.classes import names_and_colours
from support.command import InputError
from tools import reproduce

ANN, GC = "ann_r18_voc12aug", "gcnet_r18_voc12aug"
DATA = ("--data-root", "VOC2012", "--workers", 0)


def write_voc(root, count):
    """A VOC whose list of images to validate on names this many."""
    (root / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        write_scene(root / "JPEGImages", root / "SegmentationClass", i, seed=i)
        (root / f"JPEGImages/{i}.png").rename(root / f"JPEGImages/{i}.jpg")
    (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(map(str, range(count))))


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A small VOC; and the folder of a server, from which zoo.json would have two models."""
    write_voc(tmp_path / "VOC2012", 2)
    folder = tmp_path / "served"
    folder.mkdir()

    class Server(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    models = {
        ANN: {"url": f"{url}/ann.pth", "mIoU": 41.01, "mIoU_ms_flip": None},
        GC: {"url": f"{url}/gcnet.pth", "mIoU": 41.47, "mIoU_ms_flip": 42.85},
    }
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(zoo, "published", lambda: models)
    yield folder
    server.shutdown()
    server.server_close()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_published_files_are_fetched_and_measured(served, run_inside, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "RATIOS", (1, 0.5))
    torch.manual_seed(0)
    file = published("ann", classes=21, dataset="PascalVOC", scale=(64, 48))
    file["meta"]["CLASSES"] = names_and_colours("voc12aug")[0]
    torch.save(file, served / "ann.pth")
    message = run_inside(reproduce, *DATA, fails=True)
    assert "gcnet.pth: cannot be fetched (HTTP Error 404" in message
    plain, views = lines(tmp_path / "reproduce.jsonl")
    assert (plain["mode"], views["mode"], plain["images"]) == ("plain", "ms+flip", 2)
    for result, aug in ((plain, []), (views, ["--aug"])):
        text = run_inside(evaluate, ANN, *DATA, *aug)
        assert "mIoU {mIoU:.2f}%   mAcc {mAcc:.2f}%   aAcc {aAcc:.2f}%".format(**result) in text
    assert plain["aAcc"] != views["aAcc"]


def test_a_stopped_table_is_completed(served, run_inside, tmp_path, monkeypatch):
    measured = []

    def measure(name, data, device, workers, aug):
        if name == GC and not (served / "gcnet.pth").exists():
            raise InputError("there is no such file")
        measured.append((name, aug))
        return {"mIoU": 40 + len(measured), "mAcc": 1.0, "aAcc": 1.0}

    monkeypatch.setattr(reproduce, "measure", measure)
    assert run_inside(reproduce, *DATA, "--out", "new/results.jsonl", fails=True) == "there is no such file"
    (tmp_path / "new/results.jsonl").rename(tmp_path / "reproduce.jsonl")
    assert f"| {ANN} | 41.01 | 41.00 | -0.01 |  | 42.00 |  |" in run_inside(reproduce, ANN, *DATA)

    (served / "gcnet.pth").touch()
    assert f"{GC}, plain, 2 images: mIoU 43.00\n" in run_inside(reproduce, *DATA, "--plain")
    assert f"| {GC} | 41.47 | 43.00 | +1.53 | 42.85 | 44.00 | +1.15 |" in run_inside(reproduce, *DATA)
    assert measured == [(ANN, False), (ANN, True), (GC, False), (GC, True)]

    write_voc(tmp_path / "VOC2012", 3)
    message = run_inside(reproduce, *DATA, fails=True)
    assert message == f"reproduce.jsonl: {ANN} was measured on 2 images, not 3; name another --out"


def test_what_is_refused_before_anything_is_fetched(served, run_inside, tmp_path):
    assert "gcnet_r50*: there is no published model" in run_inside(reproduce, "ann*", "gcnet_r50*", *DATA, fails=True)
    assert "data/voc12aug: there is no JPEGImages/ in it" in run_inside(reproduce, "ann*", fails=True)
    assert "data/: holds no data set of the published models" in run_inside(reproduce, fails=True)
    for text in ('{"iteration": 0}\n', "notes\n", "[1]\n"):
        (tmp_path / "other").write_text(text)
        message = run_inside(reproduce, "ann*", *DATA, "--out", "other", fails=True)
        assert message == "other: holds something else than results of this command; name another --out"
        assert (tmp_path / "other").read_text() == text
    assert not (tmp_path / "hub").exists()
    (tmp_path / "data").mkdir()
    (tmp_path / "VOC2012").rename(tmp_path / "data/voc12aug")  # where it is found without --data-root
    assert "cannot be fetched" in run_inside(reproduce, "--plain", fails=True)
