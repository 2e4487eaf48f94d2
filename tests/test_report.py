"""The page of a run: it holds what the log, the pictures and the confusion matrix say, whatever state they are in."""

import base64
import html
import io
import json
import re
import shutil
import subprocess

import pytest
import torch
from conftest import read_log, train_arguments
from PIL import Image

import train
from support import report
from support.command import InputError
from support.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CLASSES = ["</script><script>alert(1)</script>", 'a & "b"', "absent"]
SETTINGS = {"model": "gcnet", "iters": 40, "classes": CLASSES, "palette": [[255, 0, 0], [0, 0, 255], [0, 0, 0]]}
MATRIX = torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
IOU = {10: [0.25, None, None], 20: [6 / 9, 3 / 6, None]}


def make_log():
    """40 steps and two validations."""
    steps = [{"iteration": i, "loss": 1 / (i + 1), "aux_loss": 0.1, "lr": 0.01 - i / 5000} for i in range(40)]
    scores = {"val_loss": 0.5, "mIoU": 0.4, "mAcc": 0.6, "aAcc": 0.75}
    return steps[:20] + [{"iteration": i, **scores, "IoU": iou} for i, iou in IOU.items()] + steps[20:]


@pytest.fixture
def out(tmp_path):
    """A run's folder with the pictures of its two validations."""
    (tmp_path / "run/samples").mkdir(parents=True)
    for i, colour in ((10, "red"), (20, "blue")):
        Image.new("RGB", (30, 20), colour).save(tmp_path / f"run/samples/{i:06}.png")
    return tmp_path / "run"


def write(out, lines):
    """What the page embeds, read as its script reads it."""
    write_report(out, SETTINGS, lines, MATRIX)
    return json.loads(re.search("const DATA = (.*);\n", (out / "report.html").read_text())[1])


def test_the_page_holds_the_figures(out):
    lines = make_log()
    values = write(out, lines)
    assert values["run"] == "run" and values["settings"] == SETTINGS and values["matrix"] == MATRIX.tolist()
    for name in ("loss", "lr", "val_loss", "mIoU", "mAcc", "aAcc"):
        assert values["curves"][name] == [[line["iteration"], line[name]] for line in lines if name in line]
    assert values["IoU"] == [[10, IOU[10]], [20, IOU[20]]]
    assert [i for i, _ in values["pictures"]] == [10, 20]
    first, second = (Image.open(io.BytesIO(base64.b64decode(png))) for _, png in values["pictures"])
    assert first.size == (30, 20) and first.getpixel((15, 10))[0] > 250 and second.getpixel((15, 10))[2] > 250


def test_the_page_is_one_file_whose_names_are_escaped(out):
    write(out, make_log())
    page = (out / "report.html").read_text()
    assert not re.search(r"https?:|<link|src=\"|url\(|import ", page)  # nothing comes from elsewhere
    assert page.count("<script>") == page.count("</script>") == 1


def test_long_curves_are_thinned_evenly_to_their_end():
    lines = [{"iteration": i, "loss": i / 2} for i in range(5001)]
    points = report.curve(lines, "loss")
    assert points[0] == (2, 1.0) and points[-1] == (5000, 2500.0) and len(points) == 1667
    assert {after[0] - before[0] for before, after in zip(points, points[1:], strict=False)} == {3}


def test_what_is_missing_is_left_out(out):
    lines = [{name: line[name] for name in line if name != "IoU"} for line in make_log()]  # of an older version
    lines[0]["loss"], lines[1]["loss"], lines[2]["loss"] = float("nan"), None, "0.1"
    (out / "samples/000010.png").unlink()
    values = write(out, lines)
    assert values["IoU"] == [] and [i for i, _ in values["pictures"]] == [20]
    assert values["curves"]["loss"][0] == [3, 0.25] and len(values["curves"]["lr"]) == 40
    shutil.rmtree(out / "samples")
    assert write(out, [])["pictures"] == []


def test_the_page_before_stays_if_the_disk_is_full(out, monkeypatch):
    write(out, make_log())
    before = (out / "report.html").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(InputError, match="report.html: cannot be written to"):
        write(out, make_log()[:5])
    assert (out / "report.html").read_bytes() == before
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "samples"]


def test_a_run_writes_it(folder, run_inside, tmp_path, monkeypatch):
    monkeypatch.setattr("support.run.write_checkpoint", lambda *_: None)  # 100 MB each time
    run_inside(train, *train_arguments(folder, "run", iters=1, workers=0)[1:])
    text = re.search("const DATA = (.*);\n", (tmp_path / "run/report.html").read_text())[1]
    values = json.loads(text)
    last = read_log(tmp_path / "run")[-1]
    assert values["settings"] == json.loads((tmp_path / "run/config.json").read_text())
    assert values["curves"]["mIoU"][-1] == [1, last["mIoU"]]
    assert [i for i, _ in values["pictures"]] == [1]
    matrix = torch.tensor(values["matrix"])
    assert matrix.diag().sum() / matrix.sum() == pytest.approx(last["aAcc"])


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium (Debian: apt-get install chromium)")
@pytest.mark.parametrize("lines", [make_log(), []], ids=["log", "empty"])
def test_the_page_in_a_browser(out, lines, tmp_path):
    write(out, lines)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--dump-dom", (out / "report.html").as_uri()]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout.split("<script>")
    assert len(page) == 2  # no class became a part of the page
    rows = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", page[0] + page[1], re.S)]
    texts = [[html.unescape(re.sub("<.*?>", "", cell)) for cell in row] for row in rows]
    assert [CLASSES[0], CLASSES[1], "25 %", "2"] in texts and [CLASSES[1], CLASSES[0], "25 %", "1"] in texts
    assert f"{CLASSES[0]}, predicted as such: 75 %, 6 of 8 pixels" in html.unescape(page[0])
    assert ["40"] in texts and page[0].count("<svg") == (6 if lines else 0)  # the settings come last
    if lines:
        by_iou = [row[:2] for row in texts if len(row) == 3]
        assert by_iou == [[CLASSES[0], "66.67 %"], [CLASSES[1], "50 %"], [CLASSES[2], "no pixels"]]
        for text in ("loss 0.025 at 39", "validation loss 0.5 at 20", "mIoU 40 % at 20", "learning rate 0.0022 at 39"):
            assert text in page[0]
        assert "Iteration 20: validation 2 of 2" in page[0]
