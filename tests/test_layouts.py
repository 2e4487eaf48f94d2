"""Small trees in each data set's own layout, right and wrong; the tools that prepare and check them."""

import numpy as np
import pytest
import torch
from conftest import train_arguments
from PIL import Image

import train
from data import open_data
from support.command import InputError
from support.images import VOID
from support.layouts import find_images
from tools import check_data


def image(path, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (50, 100, 150)).save(path)


def label(path, values, palette=False):
    """A label file whose first row starts with `values`, the rest is their first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.full((4, 6), values[0], np.uint8)
    array[0, : len(values)] = values
    file = Image.fromarray(array)
    if palette:
        file.putpalette(list(range(256)) * 3)
    file.save(path)


@pytest.fixture
def cityscapes(tmp_path):
    for split, cities in {"train": ("aachen", "bonn"), "val": ("lindau",), "test": ("berlin",)}.items():
        for city in cities:
            stem = f"{split}/{city}/{city}_000000_000019"
            image(tmp_path / f"leftImg8bit/{stem}_leftImg8bit.png")
            label(tmp_path / f"gtFine/{stem}_gtFine_labelIds.png", (7, 8, 33, 0, 6, 29))
            (tmp_path / f"gtFine/{stem}_gtFine_polygons.json").write_text("{}")
    return tmp_path


def test_cityscapes(cityscapes):
    data = open_data("cityscapes", cityscapes, "train")
    assert [path.name for path, _ in data.files] == [
        "aachen_000000_000019_leftImg8bit.png",
        "bonn_000000_000019_leftImg8bit.png",
    ]
    assert data[0][1][0].tolist() == [0, 1, 18, VOID, VOID, VOID]
    assert [data.submission[i] for i in (0, 13, 18)] == [7, 26, 33]
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert [data.table[i] for i in ids] == list(range(19)) and (np.delete(data.table, ids) == VOID).all()
    assert (
        len(data.classes) == len(data.palette) == 19 and data.classes[13] == "car" and data.palette[0] == (128, 64, 128)
    )
    assert len(open_data("cityscapes769", cityscapes, "val")) == 1

    for path in cityscapes.rglob("*_labelIds.png"):
        label(path.with_name(path.name.replace("labelIds", "labelTrainIds")), (0, 18, 255))
        path.unlink()
    data = open_data("cityscapes", cityscapes, "val")
    assert data[0][1][0].tolist() == [0, 18, VOID, 0, 0, 0]
    label(data.files[0][1], (19,))
    with pytest.raises(InputError, match="labelTrainIds.png: holds the value 19"):
        data[0]
    data.files[0][1].unlink()
    with pytest.raises(InputError, match="lindau_000000_000019_leftImg8bit.png: has no label"):
        open_data("cityscapes", cityscapes, "val")


def test_ade20k(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for split in ("training", "validation"):
        image(root / f"images/{split}/ADE_1.jpg")
        label(root / f"annotations/{split}/ADE_1.png", (0, 1, 150, 255))
    data = open_data("ade20k", tmp_path, "val")
    assert data[0][1][0].tolist() == [VOID, 0, 149, VOID, VOID, VOID]
    assert len(data.classes) == len(data.palette) == 150 and data.classes[0] == "wall" and data.classes[149] == "flag"
    label(data.files[0][1], (151,))
    with pytest.raises(InputError, match="holds the value 151"):
        data[0]


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOCdevkit/VOC2012"
    lists = {
        "train": ["2007_1", "2007_2"],
        "val": ["2007_3"],
        "test": ["2008_9"],
        "aug": ["2007_2", "2007_3", "2009_4"],
    }
    for split, names in lists.items():
        (root / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            image(root / f"JPEGImages/{name}.jpg")
            if split in ("train", "val"):
                label(root / f"SegmentationClass/{name}.png", (0, 20, 255), palette=True)
    label(root / "SegmentationClassAug/2009_4.png", (5,))
    return root


def test_voc12aug(voc):
    data = open_data("voc12aug", voc.parent.parent, "train")
    assert [str(path.relative_to(voc)) for _, path in data.files] == [
        "SegmentationClass/2007_1.png",
        "SegmentationClass/2007_2.png",
        "SegmentationClassAug/2009_4.png",
    ]
    assert data[0][1][0].tolist() == [0, 20, VOID, 0, 0, 0] and data[2][1].unique().tolist() == [5]
    assert data.palette[1] == (128, 0, 0) and data.palette[20] == (0, 64, 128) and data.classes[20] == "tvmonitor"
    assert len(open_data("voc12aug", voc, "val")) == 1
    assert open_data("voc12aug", voc, "test")[0][1] is None
    (voc / "ImageSets/Segmentation/aug.txt").unlink()
    with pytest.raises(InputError, match="aug.txt: missing; make it with: python -m tools.download voc12aug"):
        open_data("voc12aug", voc, "train")


@pytest.mark.parametrize("name", ["cityscapes", "cityscapes769", "ade20k", "voc12aug", "folder"])
def test_a_wrong_root_is_told_the_layout(name, tmp_path):
    remedy = "images/, annotations/ and classes.txt" if name == "folder" else "it .python -m tools.download"
    with pytest.raises(InputError, match=rf"there is no \w+/ in it; --data-root names the folder that holds {remedy}"):
        open_data(name, tmp_path / "nowhere", "train")


def test_images_are_found_but_not_in_the_output_folder(tmp_path, capsys):
    for name in ("a.jpg", "sub/b.TIF", "c.txt", "out/a_labels.png", "out/sub/b_labels.png", "outside/d.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()
    photos, out = tmp_path / "photos", tmp_path / "photos/out"
    (tmp_path / "link").symlink_to(out)
    for way_to_out in (out, tmp_path / "link", photos / "sub/../out"):
        found = find_images([str(photos)], way_to_out)
        assert found == {"a": photos / "a.jpg", "sub/b": photos / "sub/b.TIF", "outside/d": photos / "outside/d.png"}
        notes = capsys.readouterr().err.splitlines()
        assert notes[0].startswith(f"note: not used: {photos}/c.txt; images end in .jpg")
        assert notes[1] == f"note: not used: {out}/a_labels.png and 1 more; in the output folder {way_to_out}"
    assert list(find_images([f"{photos}/**/*.png"], out)) == ["d"]
    assert list(find_images([f"{photos}/[as]*"], out)) == ["a"]  # but not the folder sub
    assert list(find_images([f"{photos}/*.jpg", str(out / "a_labels.png"), str(out)], out)) == ["a"]
    assert len(find_images([str(photos)], tmp_path / "not/yet/there")) == 5


def test_an_output_folder_that_is_or_holds_that_of_the_images(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").touch()
    for given in ("photos", "photos/a.jpg", "photos/*"):
        for out in (tmp_path / "photos", tmp_path, tmp_path / "photos/.."):
            with pytest.raises(InputError, match=f"^{out}: is, or holds, {tmp_path}/photos, where images"):
                find_images([str(tmp_path / given)], out)
    with pytest.raises(InputError, match="there are no images there"):
        find_images([str(tmp_path / "photos/*.png")], tmp_path / "out")


def test_check_command(folder, run_script, run_inside, capsys):
    done = run_inside(check_data, "--data-root", folder, "--workers", 0)
    assert "train: 6 of 6 pairs are good; 1 size(s), height x width: 40x48 (6 images)" in done
    assert "house" in done and "good: no problems found" in done
    label(folder / "annotations/train/scene1.png", (7,))
    (folder / "images/val/scene1.png").write_bytes(b"")
    done = run_script("tools.check_data", "--data-root", folder, status=2)
    assert "scene1.png: holds the value 7" in done.stdout and "val/scene1.png: cannot be read" in done.stdout
    assert "check_data.py: error: 2 problems to correct" in done.stderr


def test_check_finds_what_train_would_refuse(folder, run_inside, capsys):
    for path in (folder / "annotations/val").rglob("*.png"):
        label(path, (255,))
        image = folder / "images/val" / path.relative_to(folder / "annotations/val")
        Image.new("RGB", (6, 4)).save(image)
    arguments = ("--data-root", folder, "--workers", 0)
    assert "1 problem to correct" in run_inside(check_data, *arguments, fails=True)
    assert "val: all labels are void" in capsys.readouterr().out
    (folder / "annotations/train").rename(folder / "annotations/other")
    run_inside(check_data, *arguments, "--split", "train", fails=True)
    assert "has no label; its split has no folder of labels" in capsys.readouterr().out


def test_palettes_that_contradict_each_other_are_found(folder, run_inside, capsys):
    """One colour as two classes; not other colours, nor one colour twice in a palette."""
    colours = [(0, 0, 0), (200, 0, 0), (0, 200, 0)]
    paths = sorted((folder / "annotations").rglob("*.png"))
    arguments = ("--data-root", folder, "--workers", 0)
    for order, wrong in (((0, 1, 2), 0), ((0, 1, 2, 0), 0), ((0, 2, 1), 1)):
        for path, palette in zip(paths, [colours, [colours[i] for i in order]] * len(paths), strict=False):
            mask = Image.fromarray(np.asarray(Image.open(path)))
            mask.putpalette(np.array(palette, np.uint8).tobytes().ljust(768, b"\0"))
            mask.save(path)
        said = run_inside(check_data, *arguments, "--split", "train", fails=bool(wrong))
        assert ("1 problem to correct" if wrong else "good: no problems found") in said
    assert "[0, 200, 0] is class 1 here, and class 2 in " in capsys.readouterr().out


def test_one_class_is_refused(folder, run_inside):
    (folder / "classes.txt").write_text("roof\n")
    for command in (check_data, train):
        words = ("--dataset", "folder", "--data-root", folder)
        assert "classes.txt: names 1 classes, not 2 to 254; name the" in run_inside(command, *words, fails=True)


def test_images_without_a_label(folder):
    """The message lists them, and says what to do; also where the label has another format."""
    labels = folder / "annotations/train"
    for number in (1, 2, 3):
        (labels / f"scene{number}.png").unlink()
    with pytest.raises(InputError) as raised:
        open_data("folder", folder, "train")
    assert str(raised.value) == (
        f"{folder}/images/train/scene1.png: has no label {labels}/scene1.png (nor have 2 more: scene2, scene3); "
        "add it, or remove the image"
    )
    (labels / "scene1.jpg").touch()
    with pytest.raises(InputError, match=f"; {labels}/scene1.jpg is not .png: python -m tools.convert_masks makes one"):
        open_data("folder", folder, "train")


def test_accents_are_one_letter_or_two(folder):
    (folder / "images/train/scene1.png").rename(folder / "images/train/caf\u00e9.png")
    (folder / "annotations/train/scene1.png").rename(folder / "annotations/train/cafe\u0301.png")
    assert len(open_data("folder", folder, "train")) == 6


def test_class_weights(folder, run_inside):
    path = folder / "annotations/train/scene1.png"
    array = np.array(Image.open(path))
    array[:30] = 0  # else the classes are equally frequent
    Image.fromarray(array).save(path)
    data = open_data("folder", folder, "train")
    labels = torch.stack([data[i][1] for i in range(len(data))])
    share = torch.tensor(
        [(labels == c).sum() / sum((y != VOID).sum() for y in labels if (y == c).any()) for c in range(3)]
    )
    said = run_inside(check_data, "--data-root", folder, "--workers", 0)
    (line,) = (line for line in said.splitlines() if line.startswith("to balance the classes: "))
    flag, *weights = line.partition(": ")[2].split()
    torch.testing.assert_close(torch.tensor([float(w) for w in weights]), share.median() / share, rtol=0.005, atol=0)
    arguments = train_arguments(folder, "run", 1, workers=0)[1:]
    assert "mIoU" in run_inside(train, *arguments, flag, *weights)
    for given, message in (
        (["1", "2"], "folder has 3 classes; give as many"),
        (["1", "x", "2"], "invalid number_above_0 value"),
    ):
        assert message in run_inside(train, *train_arguments(folder, "new", 1)[1:], flag, *given, fails=True)
