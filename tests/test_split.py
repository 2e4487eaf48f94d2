"""tools/split.py: what is drawn, where it goes, and its refusals, which leave all as it was."""

import random

import pytest
from conftest import write_scene

from data import open_data
from tools import check_data, split

COMMAND = ("photos", "masks", "--out", "own")


@pytest.fixture
def names(tmp_path):
    """The names of ten images in photos/ whose masks are in masks/, some of them in a subfolder."""
    names = [f"{'deep/' if i % 3 == 0 else ''}scene.{i}" for i in range(10)]
    for seed, name in enumerate(names):
        write_scene(tmp_path / "photos", tmp_path / "masks", name, seed)
    return names


def drawn(root):
    """{kind and split: the names there}."""
    found = {}
    for path in root.rglob("*.png"):
        kind, part, *name = path.relative_to(root).with_suffix("").parts
        found.setdefault((kind, part), set()).add("/".join(name))
    return found


def test_split(names, tmp_path, run_inside):
    (tmp_path / "masks/classes.txt").write_text("road\nhouse\ntree\n")
    done = run_inside(split, *COMMAND, "--test", 0.1)
    assert "own: 7 to train on, 2 to validate on, 1 to test on" in done
    assert "check_data --data-root own" in done and "write own/classes.txt" not in done
    parts = drawn(tmp_path / "own")
    for part, count in {"train": 7, "val": 2, "test": 1}.items():
        assert parts["images", part] == parts["annotations", part] and len(parts["images", part]) == count
    assert set.union(*parts.values()) == set(names)
    data = open_data("folder", tmp_path / "own", "train")
    for image, mask in data.files:
        name = image.relative_to(tmp_path / "own/images/train")
        for path, original in ((image, tmp_path / "photos" / name), (mask, tmp_path / "masks" / name)):
            assert path.read_bytes() == original.read_bytes() and not path.samefile(original)
    assert "good: no problems" in run_inside(check_data, "--data-root", "own", "--workers", 0)
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == ["annotations", "classes.txt", "images"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["masks", "own", "photos"]


def test_a_link_is_copied_as_the_file(names, tmp_path, run_inside):
    first = tmp_path / f"photos/{names[0]}.png"
    first.rename(tmp_path / "elsewhere.png")
    first.symlink_to("../../elsewhere.png")
    assert "write own/classes.txt: one class name a line" in run_inside(split, *COMMAND)
    (copy,) = (tmp_path / "own/images").rglob(f"*/{names[0]}.png")
    assert copy.read_bytes() == first.read_bytes() and not copy.is_symlink()


def test_the_draw_depends_on_names_and_seed_alone():
    names = [f"scene{i}" for i in range(100)]
    one = split.assign_splits(names, 0.2, 0.1, 0)
    assert split.assign_splits(random.sample(names, 100), 0.2, 0.1, 0) == one != split.assign_splits(names, 0.2, 0.1, 1)
    assert [list(one.values()).count(part) for part in ("train", "val", "test")] == [70, 20, 10]
    assert sorted(name for name, part in one.items() if part == "test")[:3] == ["scene17", "scene25", "scene44"]
    assert list(split.assign_splits(names[:2], 0, 0, 0).values()) == ["val", "train"]


def test_refusals(names, tmp_path, run_inside, monkeypatch):
    def refuses(*arguments):
        before = sorted(tmp_path.rglob("*"))
        message = run_inside(split, *arguments, fails=True)
        assert sorted(tmp_path.rglob("*")) == before
        return message

    assert "nowhere: there is no such folder" in refuses("photos", "nowhere", "--out", "own")
    assert "none would be left to train on" in refuses(*COMMAND, "--val", 0.9, "--test", 0.1)
    for value in (2, "nan", -0.1):
        for option in ("--val", "--test"):
            assert "must be a number from 0 to less than 1" in refuses(*COMMAND, f"{option}={value}")

    (tmp_path / "own").mkdir()
    for out in ("own", "photos", "."):
        assert refuses("photos", "masks", "--out", out) == f"{out}: already exists; name another folder"
    (tmp_path / f"masks/{names[0]}.png").unlink()
    assert f"{names[0]}.png: has no label" in refuses("photos", "masks", "--out", "new")
