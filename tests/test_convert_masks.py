"""tools/convert_masks.py: masks of every kind become class indices; its refusals, which write nothing."""

import numpy as np
import pytest
from conftest import contents
from PIL import Image

from tools import convert_masks

ROWS = np.array([[0, 1, 1, 0], [1, 1, 1, 255], [2, 0, 0, 2]], np.uint8)  # classes, and 255 for void
COLOURS = np.array([(128, 64, 128), (0, 0, 142), (70, 70, 70)], np.uint8)
COLOUR_TABLE = "128,64,128 road\n0,0,142 car # blue\n70,70,70\tgrey house\n# no line\n#\n\n0,0,0 Void\n"


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def coloured(rows):
    return np.concatenate([COLOURS, np.zeros((253, 3), np.uint8)])[rows]


def save_palette(path, order):
    """A palette image of ROWS' colours, whose palette has them, and black, in an order."""
    image = Image.fromarray(np.argsort(order).astype(np.uint8)[np.minimum(ROWS, 3)])
    image.putpalette(coloured(np.array(order)).tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def convert(tmp_path, run_inside):
    """Converts masks/ by a table's text to out/; gives what the command prints, or with fails=True its refusal, which
    must leave all files as they were."""

    def run(table, *options, out="out", fails=False):
        (tmp_path / "table.txt").write_text(table)
        before = contents(tmp_path)
        done = run_inside(convert_masks, "masks", "--table", "table.txt", "--out", out, *options, fails=fails)
        assert not fails or before == contents(tmp_path)
        return done

    return run


def converted(path):
    image = Image.open(path)
    assert image.mode == "L"
    return np.asarray(image)


def test_from_proposed_table_to_masks(tmp_path, run_inside):
    binary = np.where(ROWS == 1, 255, 0).astype(np.uint8)
    save(tmp_path / "masks/a.png", binary)
    save(tmp_path / "masks/sub/a.b.tif", binary > 0)  # of one bit
    shown = run_inside(convert_masks, "masks")
    text = (tmp_path / "table.txt").read_text()
    assert shown.startswith(text) and "give the same command again" in shown and len(list(tmp_path.iterdir())) == 2
    _, first, second = text.splitlines()
    assert first.split("#")[0].split() == ["0", "background"] and "58.33% of the pixels" in first
    assert second.split("#")[0].split() == ["255", "foreground"]
    for _ in range(2):  # what it has written below masks/ is not looked at
        arguments = ("masks", "--out", "masks/out", "--overwrite")
        done = run_inside(convert_masks, *arguments)
        assert "masks/out: 2 masks of 2 classes" in done and "tools.split IMAGES masks/out --out DIR" in done
    for name in ("a", "sub/a.b"):
        assert (converted(tmp_path / f"masks/out/{name}.png") == (ROWS == 1)).all()
    assert (tmp_path / "masks/out/classes.txt").read_text() == "background\nforeground\n"
    assert (np.asarray(Image.open(tmp_path / "masks/a.png")) == binary).all()


def test_colours_however_they_are_coded(tmp_path, run_inside, convert):
    rgb = coloured(ROWS)
    save(tmp_path / "masks/rgb.png", rgb)
    save(tmp_path / "masks/rgb.bmp.bmp", rgb)
    save(tmp_path / "masks/opaque.png", np.dstack([rgb, np.full_like(ROWS, 255)]))
    for name, order in (("one", (0, 1, 2, 3)), ("two", (3, 2, 0, 1))):
        save_palette(tmp_path / f"masks/{name}.png", order)
    assert "5 masks, 4 values" in run_inside(convert_masks, "masks")
    assert "5 masks of 3 classes" in convert(COLOUR_TABLE)
    for path in (tmp_path / "masks").iterdir():
        assert (converted(tmp_path / "out" / f"{path.stem}.png") == ROWS).all(), path
    assert (tmp_path / "out/classes.txt").read_text() == "road\ncar\ngrey house\n"
    save(tmp_path / "masks/grey.png", ROWS)
    shown = run_inside(convert_masks, "masks", "--table", "new.txt")
    assert "# Not all masks have colours: masks/grey.png has grey values." in shown
    table = COLOUR_TABLE + "0 road\n1 car\n2 grey house\n"
    assert "grey.png: holds the value 255 (1 pixels in all masks), which" in convert(table, "--overwrite", fails=True)
    convert(table + "255 void\n", "--overwrite")
    assert (converted(tmp_path / "out/grey.png") == ROWS).all()


def test_transparency_is_told_apart(tmp_path, convert):
    rgba = np.dstack([coloured(ROWS), np.full_like(ROWS, 255)])
    rgba[0, 0] = 9, 9, 9, 0
    rgba[0, 3, 3] = 7
    save(tmp_path / "masks/a.png", rgba)
    assert "holds the value" in convert(COLOUR_TABLE, fails=True)
    convert(COLOUR_TABLE + "0,0,0,0 void\n128,64,128,7 road\n")
    expected = ROWS.copy()
    expected[0, 0] = 255
    assert (converted(tmp_path / "out/a.png") == expected).all()


def test_deep_grey_and_one_name_for_two_values(tmp_path, run_inside, convert):
    values = np.array([0, 1000, 40000] + [0] * 252 + [65535], np.uint16)
    save(tmp_path / "masks/a.png", values[ROWS])
    save(tmp_path / "masks/b.tif", values[ROWS].astype(np.int32))
    assert "40000 " in run_inside(convert_masks, "masks")
    convert("0 road\n1000 car\n40000 road\n65535 void")
    for name in ("a", "b"):
        expected = np.where(ROWS == 2, 0, ROWS)
        assert (converted(tmp_path / f"out/{name}.png") == expected).all()
    assert (tmp_path / "out/classes.txt").read_text() == "road\ncar\n"
    save(tmp_path / "masks/b.tif", np.float32(ROWS))
    assert "b.tif: holds fractions; a mask must hold whole grey values" in convert(
        "0 road\n1 car", out="new", fails=True
    )


def test_jpeg(tmp_path, run_inside, convert):
    truth = np.zeros((64, 64), np.uint8)
    truth[9:50, 13:41] = 1
    save(tmp_path / "masks/a.jpg", 255 * truth, quality=75)
    shown = run_inside(convert_masks, "masks")
    assert "(1 are JPEG)" in shown and "--nearest" in shown
    assert len([line for line in shown.splitlines() if line[0] != "#"]) < len(np.unique(Image.open("masks/a.jpg")))
    table = "0 background\n255 foreground"
    assert "nor" in convert(table, fails=True)
    assert "see masks/a.jpg): given the class of the nearest value" in convert(table, "--nearest")
    assert (converted(tmp_path / "out/a.png") == truth).all()
    assert "does not name" in convert("0,0,1 car\n1,2,3 road", "--nearest", out="new", fails=True)


@pytest.mark.parametrize(
    "table, words",
    [
        ("0 road\n1 car\n\n2", "table.txt: line 4: '2' is not a value"),
        ("0 road\n1, 2, 3 car", "table.txt: line 2: '1, 2, 3 car' is not a value (a number, or R,G,B without spaces)"),
        ("0 road\n0 car", "table.txt: line 2: a second line for the value 0"),
        ("# nothing\n0 void", "table.txt: names 0 classes"),
        ("\n".join(f"{i} class {i}" for i in range(255)), "table.txt: names 255 classes"),
        ("0 road\n1 car\n255 void", "masks/a.png: holds the value 2 (2 pixels in all masks), which table.txt does not"),
    ],
)
def test_mistakes_in_the_table(table, words, tmp_path, convert):
    save(tmp_path / "masks/a.png", ROWS)
    assert words in convert(table, fails=True)


def test_nothing_is_replaced_without_overwrite(tmp_path, convert, run_inside):
    save(tmp_path / "masks/sub/a.png", ROWS)
    table = "0 road\n1 car\n2 house\n255 void"
    (tmp_path / "link").symlink_to(tmp_path / "masks")
    for out in ("masks", "masks/sub", ".", "link"):
        assert convert(table, "--overwrite", out=out, fails=True).startswith(f"{out}: is, or holds, masks/sub, where")
    save(tmp_path / "out/sub/a.png", 0 * ROWS)
    assert convert(table, fails=True) == "out/sub/a.png: already exists; --overwrite replaces it"
    (tmp_path / "out/sub/a.png").unlink()
    (tmp_path / "out/classes.txt").write_text("mine")
    assert convert(table, fails=True) == "out/classes.txt: already exists; --overwrite replaces it"
    convert(table, "--overwrite")
    assert (converted(tmp_path / "out/sub/a.png") == ROWS).all()
    assert (tmp_path / "out/classes.txt").read_text() == "road\ncar\nhouse\n"
    (tmp_path / "out/classes.txt").write_text(table)
    words = ("masks", "--table", "out/classes.txt", "--out", "out", "--overwrite")
    assert "would replace the table; name another --out" in run_inside(convert_masks, *words, fails=True)
    assert (tmp_path / "out/classes.txt").read_text() == table
    (tmp_path / "masks/sub/a.png").rename(tmp_path / "masks/sub/a.txt")
    assert convert(table, out="new", fails=True) == "masks: there are no images there"
