"""tools/predict.py on images of every kind; the label maps that evaluate.py saves and submits."""

import numpy as np
import pytest
import torch
from conftest import save_model, write_scene
from PIL import Image

import evaluate
from support.classes import names_and_colours
from support.command import InputError
from support.images import read_image
from support.layouts import CITYSCAPES_IDS, find_images
from tools import predict


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model.pt", "gcnet", names_and_colours("cityscapes")[0])


def test_images_of_every_kind(tmp_path):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (5, 8, 3)).astype(np.uint8))
    rgb.save(tmp_path / "rgb.png")
    exact = np.asarray(rgb)
    assert read_image(tmp_path / "rgb.png").equal(torch.tensor(exact))
    grey = np.array(rgb.convert("L"))
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").equal(torch.tensor(grey)[..., None].expand(-1, -1, 3))
    rgb.convert("RGBA").save(tmp_path / "alpha.png")
    assert read_image(tmp_path / "alpha.png").equal(torch.tensor(exact))
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(read_image(tmp_path / "cmyk.jpg").numpy().astype(int) - exact).mean() < 40
    turned = rgb.getexif()
    turned[0x112] = 6  # to be shown turned by 90 degrees
    rgb.save(tmp_path / "turned.png", exif=turned)
    assert read_image(tmp_path / "turned.png").equal(torch.tensor(np.rot90(exact, -1).copy()))


def test_predict(model, run_script, run_inside, tmp_path):
    (tmp_path / "photos/sub").mkdir(parents=True)
    for name, size in {"photos/a.jpg": (70, 40), "photos/sub/a.png": (1, 1), "b.PNG": (33, 47)}.items():
        Image.new("RGB", size, (200, 100, 50)).save(tmp_path / name)
    done = run_script("tools.predict", "photos", "*.PNG", "--checkpoint", model, "--out", "out")
    assert "3 images: out/*_overlay.png" in done.stdout
    for name, size in {"a": (70, 40), "sub/a": (1, 1), "b": (33, 47)}.items():
        labels = Image.open(tmp_path / f"out/{name}_labels.png")
        assert labels.mode == "L" and labels.size == size and np.max(labels) < 19
        coloured = np.asarray(Image.open(tmp_path / f"out/{name}_colour.png"))
        assert (coloured[..., 0] == np.asarray(labels)).all()
        overlay = Image.open(tmp_path / f"out/{name}_overlay.png")
        assert overlay.height > size[1]  # the legend below
        shade = np.asarray(overlay)[0, 0, 0]
        assert abs(int(shade) - (200 + coloured[0, 0, 0]) / 2) <= 3
    missing = run_inside(predict, "nothing*.jpg", "--checkpoint", model, fails=True)
    assert missing == "nothing*.jpg: there are no images there"


def test_nothing_is_overwritten(model, run_inside, tmp_path):
    for name in ("one/a.jpg", "two/a.png", "one/a_labels.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 8)).save(tmp_path / name)
    with pytest.raises(InputError, match="would overwrite"):
        find_images([str(tmp_path / "one"), str(tmp_path / "two")], tmp_path / "out")
    before = (tmp_path / "one/a_labels.png").read_bytes()
    command = ("--checkpoint", model, "--out", "one")
    for images in ("one", "one/a.jpg"):
        refused = run_inside(predict, images, *command, "--overwrite", fails=True)
        assert refused == "one: is, or holds, one, where images or labels are; name another folder"
    assert (
        run_inside(predict, "two", *command, fails=True) == "one/a_labels.png: already exists; --overwrite replaces it"
    )
    assert (tmp_path / "one/a_labels.png").read_bytes() == before and len(list((tmp_path / "one").iterdir())) == 2
    assert "1 images: one/" in run_inside(predict, "two", *command, "--overwrite")
    assert (tmp_path / "one/a_labels.png").read_bytes() != before


def test_a_damaged_image_is_found_before_anything_is_written(model, run_inside, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (9, 8)).save(tmp_path / "photos/a.png")
    (tmp_path / "photos/b.png").write_bytes((tmp_path / "photos/a.png").read_bytes()[:40])
    message = run_inside(predict, "photos", "--checkpoint", model, fails=True)
    assert message.startswith("photos/b.png: cannot be read as JPEG, PNG")
    assert not (tmp_path / "predictions").exists()


def test_predict_does_not_predict_its_predictions(model, run_inside, tmp_path):
    Image.new("RGB", (9, 8)).save(tmp_path / "a.png")
    for _ in range(2):
        assert "1 images: predictions/" in run_inside(predict, ".", "--checkpoint", model, "--overwrite")
    assert len(list(tmp_path.rglob("*.png"))) == 4


def test_save_and_submit(model, run_inside, tmp_path):
    write_scene(tmp_path / "own/images/test", tmp_path / "unused", "deep/x", 0)
    (tmp_path / "own/classes.txt").write_text("\n".join(names_and_colours("cityscapes")[0]))
    data = ("--dataset", "folder", "--data-root", "own", "--split", "test", "--workers", 0)
    assert "no labels; --save or --submit DIR" in run_inside(evaluate, model, *data, fails=True)
    assert "not allowed with" in run_inside(evaluate, model, "--save", "a", "--submit", "b", fails=True)
    done = run_inside(evaluate, model, *data, "--save", "maps")
    assert "mIoU" not in done and "1 label maps in maps/" in done
    saved = Image.open(tmp_path / "maps/deep/x.png")  # below the folder as the image is below its own
    labels = np.asarray(saved)
    assert labels.shape == (40, 48) and labels.max() < 19
    assert saved.mode == "P" and saved.getpalette()[:6] == [128, 0, 0, 0, 128, 0]

    city = tmp_path / "city/leftImg8bit/test/berlin/berlin_000000_000019_leftImg8bit.png"
    city.parent.mkdir(parents=True)
    Image.open(tmp_path / "own/images/test/deep/x.png").save(city)
    data = ("--dataset", "cityscapes", "--data-root", "city", "--split", "test", "--workers", 0)
    run_inside(evaluate, model, *data, "--submit", "ids")
    submitted = np.asarray(Image.open(tmp_path / f"ids/{city.name}"))
    assert (submitted == np.array(CITYSCAPES_IDS)[labels]).all()
