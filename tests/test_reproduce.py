"""tools/reproduce.py: what it measures, how it goes on after a stop, the table, what it refuses."""

import http.server
import json
import re
import threading
from functools import partial

import pytest
import torch
from conftest import published, write_scene

import evaluate
from support import zoo
from support.classes import VOC
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
def test_published_files_are_fetched_and_measured(served, run_inside, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "RATIOS", (1, 0.5))
    torch.manual_seed(0)
    file = published("ann", classes=21, dataset="PascalVOC", scale=(64, 48))
    file["meta"]["CLASSES"] = VOC
    torch.save(file, served / "ann.pth")
    message = run_inside(reproduce, *DATA, fails=True)
    assert message == "1 of 2 models could not be evaluated; the same command tries again"
    out, err = capsys.readouterr()
    assert err.count(f"{GC}: http") == 1 and "gcnet.pth: cannot be fetched (HTTP Error 404" in err
    plain, views = lines(tmp_path / "reproduce.jsonl")
    assert (plain["mode"], views["mode"], plain["images"]) == ("plain", "ms+flip", 2)
    for result, aug in ((plain, []), (views, ["--aug"])):
        text = run_inside(evaluate, ANN, *DATA, *aug)
        assert "mIoU {mIoU:.2f}%   mAcc {mAcc:.2f}%   aAcc {aAcc:.2f}%".format(**result) in text
    assert plain["aAcc"] != views["aAcc"]


def test_a_stopped_table_is_completed(served, run_inside, tmp_path, monkeypatch, capsys):
    measured = []

    def measure(name, data, device, workers, aug):
        if name == GC and not (served / "gcnet.pth").exists():
            raise InputError("there is no such file")
        measured.append((name, aug))
        return {"mIoU": 40 + len(measured), "mAcc": 1.0, "aAcc": 1.0}

    monkeypatch.setattr(reproduce, "measure", measure)
    message = run_inside(reproduce, *DATA, fails=True)
    assert message == "1 of 2 models could not be evaluated; the same command tries again"
    out, err = capsys.readouterr()
    assert err == f"{GC}: there is no such file\n"
    assert f"| {ANN} | 41.01 | 41.00 | -0.01 |  | 42.00 |  |\n| {GC} | 41.47 |  |  | 42.85 |  |  |" in out

    (served / "gcnet.pth").touch()
    assert f"{GC}, plain: mIoU 43.00\n" in run_inside(reproduce, *DATA, "--plain")
    assert f"| {GC} | 41.47 | 43.00 | +1.53 | 42.85 | 44.00 | +1.15 |" in run_inside(reproduce, *DATA)
    assert measured == [(ANN, False), (ANN, True), (GC, False), (GC, True)]

    results = tmp_path / "reproduce.jsonl"
    whole = results.read_text()
    for cut in (30, len(whole.splitlines()[-1]) - 3):  # killed while it wrote the last line
        results.write_text(whole[:-cut])
        assert re.findall("(.*): mIoU", run_inside(reproduce, *DATA)) == [f"{GC}, ms+flip"]
        assert "mIoU" not in run_inside(reproduce, "gcnet*", *DATA).partition("|")[0]
    assert len(measured) == 6
    write_voc(tmp_path / "VOC2012", 3)
    message = run_inside(reproduce, *DATA, fails=True)
    assert message == f"reproduce.jsonl: {ANN} was measured on 2 images, not 3; name another --out"


def test_what_is_refused_before_anything_is_fetched(served, run_inside, tmp_path):
    assert "gcnet_r50*: there is no published model" in run_inside(reproduce, "ann*", "gcnet_r50*", *DATA, fails=True)
    assert "data/voc12aug: there is no JPEGImages/ in it" in run_inside(reproduce, "ann*", fails=True)
    assert "data/: holds no data set of the published models" in run_inside(reproduce, fails=True)
    (tmp_path / "other").write_text('{"iteration": 0}\n')
    message = run_inside(reproduce, "ann*", *DATA, "--out", "other", fails=True)
    assert message == "other: holds something else than results of this command; name another --out"
    assert (tmp_path / "other").read_text() == '{"iteration": 0}\n'
    assert not (tmp_path / "hub").exists()
    (tmp_path / "data").mkdir()
    (tmp_path / "VOC2012").rename(tmp_path / "data/voc12aug")  # where it is found without --data-root
    assert "2 of 2 models could not be evaluated" in run_inside(reproduce, "--plain", fails=True)
