"""What people with their own images meet first: masks of 0 and 255, images larger than memory, figures to work with."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, read_log, run_together, save_model, train_arguments
from PIL import Image

import evaluate
import train
from data import normalise
from evaluate import slide_by_rows
from resnet_d8 import FCN
from support.pictures import save_png
from support.scan import never_labelled
from tools import check_data, predict


@pytest.fixture
def binary(folder):
    """The data set with masks of 0 and 255, as drawing programs save them."""
    for path in (folder / "annotations").rglob("*.png"):
        Image.fromarray(np.where(np.asarray(Image.open(path)) > 0, 255, 0).astype(np.uint8)).save(path)
    (folder / "classes.txt").write_text("background\nroof\n")
    return folder


def save_png_at(path):
    """A picture as the commands write it."""
    save_png(Image.new("L", (3, 2)), path)
    return path


# --------------------------------------------------------------------------------------------- classes without labels


def test_what_is_said_of_classes_without_labels():
    names = [f"c{i}" for i in range(8)]
    pixels = np.zeros(256)
    pixels[:8] = 1
    assert never_labelled(pixels, names) == ""
    pixels[3] = 0
    assert never_labelled(pixels, names) == "none shows c3"
    pixels[:7] = 0
    assert never_labelled(pixels, names) == "none shows c0, c1, c2, c3, c4 and 2 others"
    pixels[255] = 9
    assert "255, which means void: python -m tools.convert_masks" in never_labelled(pixels, names)


def test_masks_of_0_and_255_are_explained(binary, run_inside, capsys):
    assert "1 problem must be mended" in run_inside(check_data, "--data-root", binary, "--workers", 0, fails=True)
    assert "train: of the labels none shows roof; all other pixels are 255" in capsys.readouterr().out
    said = run_inside(train, *train_arguments(binary, "run", 2, workers=0)[1:])
    assert said.count("warning: of the training labels so far none shows roof; all other pixels are 255") == 1


def test_padding_of_the_crops_is_no_void(folder, run_inside):
    """Images smaller than the crop whose labels hold neither 255 nor one of the classes."""
    for path in (folder / "annotations").rglob("*.png"):
        Image.fromarray(np.minimum(np.asarray(Image.open(path)) % 255, 0)).save(path)
    arguments = train_arguments(folder, "run", 1, workers=0)[1:]
    said = run_inside(train, *arguments, "--crop-size", 64, 64)
    assert "of the training labels so far none shows house, tree\n" in said


@pytest.mark.slow
def test_a_class_that_only_another_process_has_seen(folder, tmp_path):
    """Each process sees one half of the images; together they see all classes."""
    for split in ("images", "annotations"):
        for i in (2, 3, 4, 5):
            (folder / f"{split}/train/scene{i}.png").unlink()
        shutil.move(folder / f"{split}/train/street/scene0.png", folder / f"{split}/train/scene0.png")
    for i in (0, 1):
        label = np.array([[0, 1 + i]], np.uint8).repeat(24, 1).repeat(40, 0)
        Image.fromarray(label).save(folder / f"annotations/train/scene{i}.png")
    arguments = train_arguments(folder, "run", 1)
    arguments[arguments.index("--batch-size") + 1] = 1
    out, err, status = run_together([ROOT / arguments[0], *arguments[1:]], tmp_path)
    assert status == 0 and "mIoU" in out, err
    assert "warning" not in out


# ------------------------------------------------------------------------------------------------------- large images


def test_windows_by_rows_are_complete_and_take_images_as_they_are():
    torch.manual_seed(0)
    model = FCN(5, depth=18).eval()
    images = torch.randint(0, 256, (2, 3, 75, 90), dtype=torch.uint8)
    with torch.inference_mode():
        whole = evaluate.slide_inference(model, normalise(images), (32, 40), (20, 33))
        rows, parts = zip(*slide_by_rows(model, images, (32, 40), (20, 33)), strict=True)
    assert [(part.start, part.stop) for part in rows] == [(0, 20), (20, 40), (40, 43), (43, 75)]
    torch.testing.assert_close(torch.cat(parts, 2), whole)


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
    assert refused == "--stride 33 8: leaves gaps between windows of [32, 32]"
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
    assert Image.open(tmp_path / "figures/result.json.png").size[0] > 4 * 48


def test_the_json_replaces_its_own_kind_alone(folder, run_inside, tmp_path):
    model = save_model(tmp_path / "model.pt", "fcn")
    arguments = (model, "--data-root", folder, "--workers", 0, "--json", "result.json")
    for _ in range(2):
        run_inside(evaluate, *arguments)
    for name in ("result.json", "result.json.png"):
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(b"mine")
        assert f"{name}: is there already" in run_inside(evaluate, *arguments, fails=True)
        (tmp_path / name).write_bytes(kept)
    label_map = save_png_at(tmp_path / "map.png")
    for name, message in {
        ".": "cannot be written",
        "model.pt/x": "stands where a folder",
        "map.png": "no such file",
    }.items():
        assert message in run_inside(evaluate, *arguments[:-1], name, fails=True)
    assert label_map.read_bytes() == save_png_at(tmp_path / "other.png").read_bytes()
    shutil.rmtree(folder / "annotations/val")
    assert "--json: the split 'val' has no labels" in run_inside(evaluate, *arguments, "--save", "maps", fails=True)


def test_the_log_holds_the_iou_of_each_class(folder, run_inside, tmp_path):
    (folder / "classes.txt").write_text("road\nhouse\ntree\nnever\n")
    run_inside(train, *train_arguments(folder, "run", 2, workers=0)[1:])
    lines = [line for line in read_log(tmp_path / "run") if "IoU" in line]
    assert [line["iteration"] for line in lines] == [1, 2]
    for line in lines:
        known = [iou for iou in line["IoU"] if iou is not None]
        assert len(line["IoU"]) == 4 and line["mIoU"] == pytest.approx(np.mean(known))
