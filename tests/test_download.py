"""tools/download.py, from small archives of the published form on a local server."""

import hashlib
import http.server
import io
import shutil
import tarfile
import threading
import zipfile
from functools import partial

import numpy as np
import pytest
from PIL import Image

from data import open_data
from tools import download


def content(save, *arguments, **options):
    file = io.BytesIO()
    save(file, *arguments, **options)
    return file.getvalue()


def picture(value, form):
    return content(Image.fromarray(np.full((4, 6), value, np.uint8)).save, form)


def write_zip(path, files, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def write_tar(path, files, mode):
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The served folder, whose files are what the addresses in tools/download.py name; and a list of what was asked."""
    folder, asked = tmp_path / "served", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "ADE20K_URL", f"{url}/ADEChallengeData2016.zip")
    monkeypatch.setitem(download.DATASET_YEAR_DICT["2012"], "url", f"{url}/voc.tar")
    monkeypatch.setattr(download.SBDataset, "url", f"{url}/benchmark.tgz")
    yield folder, asked
    server.shutdown()
    server.server_close()


@pytest.fixture
def ade20k(server):
    names = {"images": ("JPEG", "jpg", 90), "annotations": ("PNG", "png", 3)}
    files = {
        f"ADEChallengeData2016/{kind}/{split}/a.{ending}": picture(value, form)
        for kind, (form, ending, value) in names.items()
        for split in ("training", "validation")
    }
    write_zip(server[0] / "ADEChallengeData2016.zip", files)
    return server[0] / "ADEChallengeData2016.zip"


def test_ade20k(ade20k, run_inside, tmp_path):
    assert "python train.py --dataset ade20k\n" in run_inside(download, "ade20k")
    assert open_data("ade20k", None, "train")[0][1].unique().tolist() == [2]
    assert [path.name for path in (tmp_path / "data/ade20k").iterdir()] == ["ADEChallengeData2016"]
    assert "already exists, there is nothing to fetch" in run_inside(download, "ade20k", fails=True)


def test_a_damaged_archive_is_no_data_set(ade20k, run_inside, tmp_path):
    root = tmp_path / "root"
    whole = ade20k.read_bytes()
    write_zip(ade20k, {"a": bytes(range(256)) * 99}, zipfile.ZIP_DEFLATED)
    deflated = bytearray(ade20k.read_bytes())
    deflated[40:60] = bytes(range(20))
    for damage in (
        whole[:-300],
        whole.replace(picture(3, "PNG"), picture(4, "PNG")),
        b"<html>not found</html>",
        deflated,
    ):
        ade20k.write_bytes(damage)
        message = run_inside(download, "ade20k", "--data-root", root, fails=True)
        assert message.startswith(f"{root}/ADEChallengeData2016.zip: is damaged, or not the published archive; delete")
        assert [path.name for path in root.iterdir()] == ["ADEChallengeData2016.zip"]
        (root / "ADEChallengeData2016.zip").unlink()
    ade20k.unlink()
    assert "cannot be fetched (HTTP Error 404" in run_inside(download, "ade20k", "--data-root", root, fails=True)
    (root / ".partial-killed").mkdir()
    (root / "ADEChallengeData2016.zip").write_bytes(whole)  # fetched by hand
    run_inside(download, "ade20k", "--data-root", root)
    assert len(open_data("ade20k", root, "val")) == 1 and not (root / ".partial-killed").exists()


def test_a_full_disk_is_seen_before(ade20k, server, run_inside, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = run_inside(download, "ade20k", fails=True)
    assert message == "data/ade20k: has 1.0 GB of space, not 2; name another --data-root" and not server[1]


def test_cityscapes_is_explained(run_inside):
    text = run_inside(download, "cityscapes", "--data-root", "elsewhere")
    assert "csDownload -d elsewhere leftImg8bit_trainvaltest.zip gtFine_trainvaltest.zip" in text


def test_voc12aug(server, run_inside, tmp_path, monkeypatch):
    savemat = pytest.importorskip("scipy.io", reason="SBD's files are made and read with scipy").savemat
    folder, asked = server
    voc = {f"JPEGImages/{name}.jpg": picture(90, "JPEG") for name in "abcd"}
    voc |= {f"SegmentationClass/{name}.png": picture(1, "PNG") for name in "ab"}
    voc |= {"ImageSets/Segmentation/train.txt": b"a\n", "ImageSets/Segmentation/val.txt": b"b\n"}
    md5 = write_tar(folder / "voc.tar", {f"VOCdevkit/VOC2012/{name}": data for name, data in voc.items()}, "w")
    monkeypatch.setitem(download.DATASET_YEAR_DICT["2012"], "md5", md5)
    labels = {name: {"GTcls": {"Segmentation": np.full((4, 6), 5, np.uint8), "Boundaries": 0}} for name in "abcd"}
    sbd = {f"benchmark_RELEASE/dataset/cls/{name}.mat": content(savemat, label) for name, label in labels.items()}
    message = run_inside(download, "voc12aug", fails=True)
    assert "benchmark.tgz: cannot be fetched" in message
    monkeypatch.setattr(download.SBDataset, "md5", write_tar(folder / "benchmark.tgz", sbd, "w:gz"))
    run_inside(download, "voc12aug")  # begins where a file is missing
    assert [path.rpartition("/")[2] for path in asked if "404" not in path].count("voc.tar") == 1
    data = open_data("voc12aug", None, "train")
    assert [path.stem for path, _ in data.files] == ["a", "c", "d"]  # b is to validate on
    assert [label.unique().tolist() for _, label in data] == [[1], [5], [5]]
    assert [path.name for path in (tmp_path / "data/voc12aug").iterdir()] == ["VOCdevkit"]
    assert "aug.txt: already exists" in run_inside(download, "voc12aug", fails=True)
