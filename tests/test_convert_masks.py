"""tools/convert_masks.py: masks of every kind become class indices; its refusals, which write nothing."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tools import convert_masks

ROWS = np.array([[0, 1, 1, 0], [1, 1, 1, 255], [2, 0, 0, 2]], np.uint8)  # classes, and 255 for void
COLOURS = np.array([(128, 64, 128), (0, 0, 142), (70, 70, 70)], np.uint8)
COLOUR_TABLE = "128,64,128 road\n#00008E car # blue\n70, 70, 70\tgrey house\n# no line\n\n0,0,0 Void\n"


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
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        done = run_inside(convert_masks, "masks", "--table", "table.txt", "--out", out, *options, fails=fails)
        after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert before == (after if fails else {path: after[path] for path in before})
        return done

    return run


def converted(path):
    image = Image.open(path)
    assert image.mode == "L"
    return np.asarray(image)


def test_from_scan_to_masks(tmp_path, run_inside):
    binary = np.where(ROWS == 1, 255, 0).astype(np.uint8)
    save(tmp_path / "masks/a.png", binary)
    save(tmp_path / "masks/sub/a.b.tif", binary > 0)  # of one bit
    shown = run_inside(convert_masks, "masks", "--propose", "table.txt")
    text = (tmp_path / "table.txt").read_text()
    assert text in shown and "--table table.txt --out DIR" in shown
    _, first, second = text.splitlines()
    assert first.split("#")[0].split() == ["0", "background"] and "58.33 % of the pixels; masks: 2" in first
    assert second.split("#")[0].split() == ["255", "foreground"]
    assert "is there already" in run_inside(convert_masks, "masks", "--propose", "table.txt", fails=True)
    assert text == (tmp_path / "table.txt").read_text() and len(list(tmp_path.iterdir())) == 2
    done = run_inside(convert_masks, "masks", "--table", "table.txt", "--out", "out")
    assert "out: 2 masks of 2 classes" in done and "tools.split IMAGES out --out DIR" in done
    for name in ("a", "sub/a.b"):
        assert (converted(tmp_path / f"out/{name}.png") == (ROWS == 1)).all()
    assert (tmp_path / "out/classes.txt").read_text() == "background\nforeground\n"


def test_colours_however_they_are_coded(tmp_path, convert):
    rgb = coloured(ROWS)
    save(tmp_path / "masks/rgb.png", rgb)
    save(tmp_path / "masks/rgb.bmp.bmp", rgb)
    save(tmp_path / "masks/opaque.png", np.dstack([rgb, np.full_like(ROWS, 255)]))
    for name, order in (("one", (0, 1, 2, 3)), ("two", (3, 2, 0, 1))):
        save_palette(tmp_path / f"masks/{name}.png", order)
    assert "5 masks of 3 classes" in convert(COLOUR_TABLE)
    for path in (tmp_path / "masks").iterdir():
        assert (converted(tmp_path / "out" / f"{path.stem}.png") == ROWS).all(), path
    assert (tmp_path / "out/classes.txt").read_text() == "road\ncar\ngrey house\n"


def test_transparency_is_told_apart(tmp_path, convert):
    rgba = np.dstack([coloured(ROWS), np.full_like(ROWS, 255)])
    rgba[0, 0] = 9, 9, 9, 0
    rgba[0, 3, 3] = 7
    save(tmp_path / "masks/a.png", rgba)
    table = COLOUR_TABLE.replace("#00008E", "0,0,142")
    assert "holds the value" in convert(table, fails=True)
    convert(table + "0,0,0,0 void\n128,64,128,7 road\n")
    expected = ROWS.copy()
    expected[0, 0] = 255
    assert (converted(tmp_path / "out/a.png") == expected).all()


def test_palettes_that_agree_count_by_index(tmp_path, run_inside, convert):
    for name in ("a", "b"):
        save_palette(tmp_path / f"masks/{name}.png", (2, 1, 0, 3))
    assert "\n3  " in run_inside(convert_masks, "masks")
    convert("2 road\n1 car\n0 house\n3 void")
    assert (converted(tmp_path / "out/a.png") == ROWS).all()
    convert(COLOUR_TABLE, out="colours")  # what the table has decides
    assert (converted(tmp_path / "colours/b.png") == ROWS).all()
    save_palette(tmp_path / "masks/c.png", (0, 1, 2, 3))  # the same indices, other colours
    assert "\n128,64,128  " in run_inside(convert_masks, "masks")
    assert "holds the value 0,0,142 (" in convert("2 road\n1 car\n0 house\n3 void", out="new", fails=True)


def test_deep_grey_and_one_name_for_two_values(tmp_path, run_inside, convert):
    values = np.array([0, 1000, 40000] + [0] * 252 + [65535], np.uint16)
    save(tmp_path / "masks/a.png", values[ROWS])
    save(tmp_path / "masks/b.tif", values[ROWS].astype(np.int32))
    assert "40000 " in run_inside(convert_masks, "masks")
    convert("0 road\n1000 car\n40000 road\n65535 void", out="own/annotations/train")
    for name in ("a", "b"):
        expected = np.where(ROWS == 2, 0, ROWS)
        assert (converted(tmp_path / f"own/annotations/train/{name}.png") == expected).all()
    assert (tmp_path / "own/classes.txt").read_text() == "road\ncar\n"
    save(tmp_path / "masks/b.tif", np.float32(ROWS))
    assert "b.tif: holds F;32F; a mask must hold whole grey values" in convert("0 road", fails=True)
    parts = [
        (b"IHDR", bytes.fromhex("00000001 00000001 10 02 000000")),
        (b"IDAT", zlib.compress(bytes(7))),
        (b"IEND", b""),
    ]
    chunks = [struct.pack(">I", len(b)) + kind + b + struct.pack(">I", zlib.crc32(kind + b)) for kind, b in parts]
    (tmp_path / "masks/b.tif").unlink()
    (tmp_path / "masks/a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))  # one black pixel
    assert "a.png: holds RGB;16B; a mask must hold" in convert("0,0,0 road", out="new", fails=True)


def test_jpeg(tmp_path, run_inside, convert):
    truth = np.zeros((64, 64), np.uint8)
    truth[9:50, 13:41] = 1
    save(tmp_path / "masks/a.jpg", 255 * truth, quality=75)
    shown = run_inside(convert_masks, "masks")
    assert "(1 are JPEG)" in shown and "--nearest" in shown
    (tmp_path / "masks/notes.txt").write_text("")
    table = "0 background\n255 foreground"
    assert "nor" in convert(table, fails=True)
    assert "the class of the nearest" in convert(table, "--nearest")
    assert (converted(tmp_path / "out/a.png") == truth).all()
    assert "does not name" in convert("0,0,0,0 void\n1,2,3,4 road", "--nearest", out="new", fails=True)


def test_indices_with_void_are_proposed_as_they_are(tmp_path, run_inside):
    save(tmp_path / "masks/a.png", ROWS)
    lines = run_inside(convert_masks, "masks").splitlines()[1:5]
    assert [line.split("#")[0].split(maxsplit=1)[1].strip() for line in lines] == [
        "class 0",
        "class 1",
        "class 2",
        "void",
    ]


@pytest.mark.parametrize(
    "table, words",
    [
        ("0 road\n1 car\n\n2", "table.txt: line 4: '2' is not a value"),
        ("0 road\n1,2 car", "table.txt: line 2: '1,2 car' is not a value"),
        ("0 road\n0,0,300 car", "table.txt: line 2: 0,0,300: a colour has numbers from 0 to 255"),
        (f"0 road\n{5000 * '9'} car", "table.txt: line 2: "),
        ("0 road\n#12345 car", "table.txt: line 2: "),
        ("0 road\n0 car", "table.txt: line 2: a second line for the value 0"),
        ("# nothing\n0 void", "table.txt: names 0 classes"),
        ("\n".join(f"{i} class {i}" for i in range(255)), "table.txt: names 255 classes"),
        (
            "0 road\n1 car\n255 void",
            "masks/a.png: holds the value 2 (2 pixels, masks: 1), which table.txt does not name;",
        ),
    ],
)
def test_mistakes_in_the_table(table, words, tmp_path, convert):
    save(tmp_path / "masks/a.png", ROWS)
    assert words in convert(table, fails=True)


def test_nothing_is_replaced(tmp_path, convert, run_inside):
    save(tmp_path / "masks/sub/a.png", ROWS)
    table = "0 road\n1 car\n2 house\n255 void"
    for out in ("masks", "masks/sub", "masks/new", "."):
        assert "need a folder apart from masks" in convert(table, out=out, fails=True)
    (tmp_path / "link").symlink_to(tmp_path / "masks")
    assert "need a folder apart" in convert(table, out="link/new", fails=True)
    save(tmp_path / "out/sub/a.png", 0 * ROWS)
    assert "out/sub/a.png: is there already" in convert(table, fails=True)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/classes.txt").write_text("car\nroad\nhouse\n")
    assert "own/classes.txt: names other classes" in convert(table, out="own/annotations", fails=True)
    (tmp_path / "own/classes.txt").write_text("road\ncar\nhouse\n")
    assert "check_data --data-root own" in convert(table, out="own/annotations")
    (tmp_path / "masks/sub/a.png").rename(tmp_path / "masks/sub/a.txt")
    assert "there are no masks there" in convert(table, out="new", fails=True)
    assert "give --table and --out" in run_inside(convert_masks, "masks", "--out", "new", fails=True)
