"""What people with their own images meet first: masks of 0 and 255, images larger than memory, figures to work with."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import read_log, save_model, train_arguments
from PIL import Image

import evaluate
import train
from resnet_d8 import FCN
from support import layouts
from support.command import InputError
from support.fast import slide_labels
from support.images import normalise
from support.pictures import LabelMaps
from tools import check_data, predict
from tools.check_data import never_labelled


@pytest.fixture
def binary(folder):
    """The data set with masks of 0 and 255, as drawing programs save them."""
    for path in (folder / "annotations").rglob("*.png"):
        Image.fromarray(np.where(np.asarray(Image.open(path)) > 0, 255, 0).astype(np.uint8)).save(path)
    (folder / "classes.txt").write_text("background\nroof\n")
    return folder


# --------------------------------------------------------------------------------------------- classes without labels


def test_what_is_said_of_classes_without_labels():
    names = [f"c{i}" for i in range(8)]
    pixels = np.zeros(256)
    pixels[:8] = 1
    assert never_labelled(pixels, names) == ""
    pixels[3] = 0
    assert never_labelled(pixels, names) == "no label shows c3"
    pixels[:7] = 0
    assert never_labelled(pixels, names) == "no label shows c0, c1, c2, c3, c4 and 2 others"
    pixels[255] = 9
    assert "255, which means void: python -m tools.convert_masks" in never_labelled(pixels, names)


def test_masks_of_0_and_255_are_explained(binary, run_inside, capsys):
    assert "1 problem to correct" in run_inside(check_data, "--data-root", binary, "--workers", 0, fails=True)
    assert "train: no label shows roof; all other pixels are 255" in capsys.readouterr().out
    said = run_inside(train, *train_arguments(binary, "run", 2, workers=0)[1:])
    assert said.count("warning: no validation label shows roof; python -m tools.check_data reads all labels") == 1


# ------------------------------------------------------------------------------------------------------- large images


def test_the_class_map_of_a_large_image_is_that_of_its_windows_logits():
    torch.manual_seed(0)
    model = FCN(5, depth=18).eval()
    image = torch.randint(0, 256, (75, 90, 3), dtype=torch.uint8)
    label = torch.randint(0, 5, (75, 90), dtype=torch.uint8)
    label[:9] = 255
    for crop_size, stride in (((32, 40), (20, 33)), ((80, 100), (40, 50))):
        with torch.inference_mode():
            logits = evaluate.slide_inference(model, normalise(image.permute(2, 0, 1)[None]), crop_size, stride)
        classes, loss = slide_labels(model, image, crop_size, stride, label)
        assert classes.equal(logits[0].argmax(0).byte())
        expected = torch.nn.functional.cross_entropy(logits, label[None].long(), ignore_index=255, reduction="sum")
        assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_stride_of_commands(folder, run_inside, tmp_path):
    run_inside(train, *train_arguments(folder, "run", 1, workers=0)[1:], "--stride", 16, 24)
    assert json.loads((tmp_path / "run/config.json").read_text())["stride"] == [16, 24]
    model = save_model(tmp_path / "model.pt", "fcn")
    image = folder / "images/val/scene1.png"
    maps = []
    for i, stride in enumerate([(), ("--stride", 8, 8), ("--stride", 32, 32)]):
        run_inside(predict, image, "--checkpoint", model, "--out", tmp_path / f"out{i}", *stride)
        maps.append(np.asarray(Image.open(tmp_path / f"out{i}/scene1_labels.png")))
    assert not (maps[0] == maps[1]).all() and not (maps[1] == maps[2]).all()
    refused = run_inside(predict, image, "--checkpoint", model, "--stride", 33, 8, fails=True)
    assert refused == "--stride 33 8: leaves gaps between windows of 32 32"
    saved = torch.load(model)
    saved["config"]["crop_size"] = None
    torch.save(saved, model)
    assert "does not say how large its crops were" in run_inside(evaluate, model, "--stride", 8, 8, fails=True)


@pytest.mark.parametrize("module", [train, evaluate], ids=lambda module: module.__name__)
def test_a_device_that_is_not_there(module, run_inside):
    name = "mps" if torch.xpu.is_available() else "xpu"
    assert run_inside(module, "--device", name, fails=True) == f"--device {name}: torch finds none here"


# ------------------------------------------------------------------------------------------------- figures to work with


def recomputed(folder, maps, count):
    """The confusion matrix of label maps against the annotations, pixel by pixel."""
    matrix = np.zeros((count, count), int)
    for path in (folder / "annotations/val").rglob("*.png"):
        label = np.asarray(Image.open(path))
        saved = Image.open(maps / path.relative_to(folder / "annotations/val"))
        assert saved.tile[0][3] == "P"  # of 8 bits; "P;2" has 2
        predicted = np.asarray(saved)
        for row, column in zip(label[label < 255], predicted[label < 255], strict=True):
            matrix[row, column] += 1
    return matrix


def test_every_figure_of_the_json_can_be_recomputed(folder, run_inside, tmp_path):
    model = save_model(tmp_path / "model.pt", "fcn", ("road", "house", "tree", "never"))
    (folder / "classes.txt").write_text("road\nhouse\ntree\nnever\n")
    arguments = (model, "--data-root", folder, "--workers", 0)
    run_inside(evaluate, *arguments, "--save", "maps", "--json", "figures/result.json")
    result = json.loads((tmp_path / "figures/result.json").read_text())
    matrix = recomputed(folder, tmp_path / "maps", 4)
    assert result["confusion_matrix"] == matrix.tolist()
    assert result["images"] == 3 and result["split"] == "val" and result["checkpoint"] == str(model)
    means = {}
    for i, each in enumerate(result["classes"]):
        correct, labelled, predicted = matrix[i, i], matrix[i].sum(), matrix[:, i].sum()
        expected = {
            "IoU": (correct, labelled + predicted - correct),
            "Acc": (correct, labelled),
            "Precision": (correct, predicted),
            "Fscore": (2 * correct, labelled + predicted),
        }
        for name, (part, of) in expected.items():
            assert each[name] == (pytest.approx(part / of) if of else None), (each, name)
            means.setdefault(name, []).extend([part / of] if of else [])
    for name, values in means.items():
        assert result[f"m{name}"] == pytest.approx(np.mean(values))
    assert result["aAcc"] == pytest.approx(matrix.trace() / matrix.sum())


def test_what_cannot_be_written_is_found_before_the_evaluation(folder, run_inside, tmp_path, monkeypatch):
    model = save_model(tmp_path / "model.pt", "fcn")
    arguments = (model, "--data-root", folder, "--workers", 0)
    monkeypatch.setattr(evaluate, "evaluate", None)
    for name, message in {".": "is a folder; name a file", "model.pt/x": "File exists: 'model.pt'"}.items():
        assert message in run_inside(evaluate, *arguments, "--json", name, fails=True)
    monkeypatch.setattr("os.access", lambda *_: False)  # as in a folder of others
    assert "a/b.json: cannot be written; name a file" in run_inside(
        evaluate, *arguments, "--json", "a/b.json", fails=True
    )
    shutil.rmtree(folder / "annotations/val")
    arguments = (*arguments, "--save", "maps", "--json", "result.json")
    assert "--json: the split 'val' has no labels" in run_inside(evaluate, *arguments, fails=True)


def test_label_maps_are_refused_before_they_lose_something(folder, tmp_path):
    data = layouts.folder(folder, "val")
    before = {path: path.read_bytes() for path in folder.rglob("*.png")}
    for place in ("annotations/val", "annotations", "images/val", "images/val/street", ".."):
        with pytest.raises(InputError, match="is, or holds, .*where images or labels are"):
            LabelMaps(folder / place, data, overwrite=True)
    (tmp_path / "maps/street").mkdir(parents=True)
    (tmp_path / "maps/street/scene0.png").write_bytes(b"mine")
    with pytest.raises(InputError, match="maps/street/scene0.png: already exists; --overwrite replaces it"):
        LabelMaps(tmp_path / "maps", data)
    assert before == {path: path.read_bytes() for path in folder.rglob("*.png")}
    labels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for place, overwrite in ((tmp_path / "maps", True), (folder / "images/val/new", False)):
        maps = LabelMaps(place, data, overwrite=overwrite)
        for i in range(3):
            maps.save(i, torch.from_numpy(labels))
        assert (np.asarray(Image.open(place / "street/scene0.png")) == labels).all()
        assert sorted(path.name for path in place.rglob("*.png")) == ["scene0.png", "scene1.png", "scene2.png"]


def test_the_log_holds_the_iou_of_each_class(folder, run_inside, tmp_path):
    (folder / "classes.txt").write_text("road\nhouse\ntree\nnever\n")
    run_inside(train, *train_arguments(folder, "run", 2, workers=0)[1:])
    lines = [line for line in read_log(tmp_path / "run") if "IoU" in line]
    assert [line["iteration"] for line in lines] == [1, 2]
    for line in lines:
        known = [iou for iou in line["IoU"] if iou is not None]
        assert len(line["IoU"]) == 4 and line["mIoU"] == pytest.approx(np.mean(known))
