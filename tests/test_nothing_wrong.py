"""Input that was once taken for something else, or that made a command hang: now it is read rightly, or refused."""

import os
import random
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, save_model, write_scene
from PIL import Image

import evaluate
import train
from data import open_data
from support.checkpoint import load_model
from support.command import InputError, explain
from support.images import FORMATS, read_image, read_label
from support.layouts import find_images, label_table
from support.zoo import newest_checkpoint
from tools import check_data

# ----------------------------------------------------------------------------------------------------------- images


def png(path, bits, rows, extra=b""):
    """A grey PNG of less than 8 bits, which Pillow does not write: rows of bytes as they are packed."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 8 // bits * len(rows[0]), len(rows), bits, 0, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b""))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_labels_of_few_bits_of_grey_are_refused(bits, tmp_path):
    png(tmp_path / "a.png", bits, [b"\x01\x23"] * 2)
    with pytest.raises(InputError, match=r"a.png: a label must be an 8-bit grey or palette PNG"):
        read_label(tmp_path / "a.png", label_table(range(200)))


def test_palette_labels_of_few_bits_are_indices(tmp_path):
    values = np.array([[0, 1, 2, 3]], np.uint8)
    picture = Image.fromarray(values)
    picture.putpalette([9, 9, 9] * 4)
    picture.save(tmp_path / "a.png", bits=2)
    assert (tmp_path / "a.png").read_bytes()[24] == 2
    assert read_label(tmp_path / "a.png", label_table(range(4))).tolist() == values.tolist()


def test_a_label_is_turned_as_its_own_exif_says(tmp_path):
    picture = Image.fromarray(np.array([[0, 1, 2], [3, 4, 5]], np.uint8))
    turned = picture.getexif()
    turned[0x112] = 3  # by half a turn
    picture.save(tmp_path / "a.png", exif=turned)
    assert read_label(tmp_path / "a.png", label_table(range(6))).tolist() == [[5, 4, 3], [2, 1, 0]]


@pytest.mark.parametrize("kind", ["uint16", "int32", "float32"])
def test_values_of_unknown_range_are_refused(kind, tmp_path):
    Image.fromarray(np.arange(12).reshape(3, 4).astype(kind)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="a.tif: has more than 8 bits a channel"):
        read_image(tmp_path / "a.tif")


def test_a_bmp_of_16_bits_has_few_bits_a_channel(tmp_path):
    masks = struct.pack("<III", 0xF800, 0x7E0, 0x1F)  # 5, 6 and 5 bits
    header = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 66 + 16, 0, 0, 66, 40, 2, 4, 1, 16, 3, 16, 0, 0, 0, 0)
    (tmp_path / "a.bmp").write_bytes(header + masks + bytes(16))
    assert read_image(tmp_path / "a.bmp").shape == (4, 2, 3)


def png_row(bits, colours, row):
    """The content of a PNG of one row, of the colour type `colours`."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colours]
    header = struct.pack(">IIBBBBB", len(row) * 8 // bits // channels, 1, bits, colours, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b""))
    chunks = (struct.pack(">I", len(b)) + a + b + struct.pack(">I", zlib.crc32(a + b)) for a, b in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("colours", [0, 2, 4, 6], ids=["grey", "rgb", "grey and alpha", "rgba"])
def test_png_of_16_bits_is_refused(colours, tmp_path):
    (tmp_path / "a.png").write_bytes(png_row(16, colours, bytes(48)))
    with pytest.raises(InputError, match="a.png: has more than 8 bits a channel.*value . 255"):
        read_image(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(png_row(8, colours, bytes(48)))
    assert read_image(tmp_path / "a.png").shape[2] == 3


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_is_read(kind, tmp_path):
    exact = np.full((16, 24, 3), (200, 100, 50), np.uint8)
    Image.fromarray(exact).save(tmp_path / "a.any", kind)
    assert np.abs(read_image(tmp_path / "a.any").numpy().astype(int) - exact).max() < 5


@pytest.mark.parametrize("kind", ["EPS", "PDF", "DDS", "GIF", "PPM", "JPEG2000", "AVIF", "BLP"])
def test_other_formats_are_not_opened(kind, tmp_path):
    picture = Image.new("P" if kind == "BLP" else "RGB", (8, 8))
    try:
        picture.save(tmp_path / "a.jpg", kind)
    except (KeyError, OSError, ValueError):
        pytest.skip(f"this Pillow writes no {kind}")
    with pytest.raises(InputError, match="a.jpg: cannot be read as JPEG, PNG"):
        read_image(tmp_path / "a.jpg")


def test_a_synthetic_data_set_has_no_folder(folder, run_inside):
    for module in (train, check_data):
        message = run_inside(module, "--dataset", "shapes", "--data-root", folder, fails=True)
        assert "goes with --dataset folder" in message and str(folder) in message


def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for read in (read_image, lambda path: read_label(path, label_table(range(3)))):
        with pytest.raises(InputError, match="a.png: cannot be read as JPEG, PNG"):
            read(tmp_path / "a.png")


@pytest.mark.filterwarnings("ignore")  # of Pillow's, on the damage
def test_damaged_images_are_an_array_or_refused(tmp_path):
    """Truncated at, and with flipped bytes at, places drawn from a seed."""
    exif = Image.Exif()
    exif[0x112], exif[0x10E] = 6, "a description"
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 15, 3)).astype(np.uint8))
    originals = []
    for kind in ("PNG", "JPEG", "TIFF", "WEBP", "BMP"):
        rgb.save(tmp_path / "a", kind, **({} if kind == "BMP" else {"exif": exif}))
        originals.append((tmp_path / "a").read_bytes())
    label = Image.fromarray(np.asarray(rgb)[..., 0] % 3)
    label.save(tmp_path / "a", "PNG", exif=exif)
    originals.append((tmp_path / "a").read_bytes())
    rng = random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    for original in originals:
        for _ in range(100):
            spoilt = bytearray(original)
            for _ in range(rng.choice((0, 1, 1, 2, 8))):
                spoilt[rng.randrange(len(spoilt))] ^= rng.randrange(1, 256)
            del spoilt[rng.choice((len(spoilt), rng.randrange(len(spoilt)))) :]
            (tmp_path / "a").write_bytes(spoilt)
            for read in (read_image, lambda path: read_label(path, label_table(range(3)))):
                try:
                    array = read(tmp_path / "a")
                    assert array.dtype == torch.uint8 and array.ndim in (2, 3)
                    outcomes["read"] += 1
                except InputError as error:
                    assert str(error).startswith(f"{tmp_path}/a: ")
                    outcomes["refused"] += 1
    assert min(outcomes.values()) > 100, outcomes


# ---------------------------------------------------------------------------------------------------------- folders


def test_files_that_are_not_used_are_named(folder, capsys):
    for name in ("images/train/x.gif", "images/train/y.txt", "images/train/.hidden.png", "annotations/val/z.png"):
        (folder / name).touch()
    assert len(open_data("folder", folder, "train")) == 6
    notes = capsys.readouterr().err
    assert notes.count("note: not used: ") == 1 and "x.gif and 1 more; images end in .jpg, .jpeg, .png, .bmp" in notes
    assert len(open_data("folder", folder, "val")) == 3
    assert f"z.png; there is no such image in {folder}/images/val" in capsys.readouterr().err


def test_a_folder_that_cannot_be_read_is_not_left_out(folder, monkeypatch):
    def deny(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.iterdir", deny)
    with pytest.raises(PermissionError) as raised:
        open_data("folder", folder, "train")
    assert "images/train" in explain(raised.value)


def test_links_in_circles_end(folder, tmp_path):
    for name in ("a", "b", "street/c"):
        (folder / "images/train" / name).symlink_to(folder / "images/train")
    assert len(open_data("folder", folder, "train")) == 6
    assert len(find_images([str(folder / "images/train")], tmp_path / "out")) == 6
    (tmp_path / "elsewhere").mkdir()
    write_scene(tmp_path / "elsewhere", tmp_path / "elsewhere_labels", "far", 0)
    (folder / "images/train/linked").symlink_to(tmp_path / "elsewhere")  # a link that adds files still does
    (folder / "annotations/train/linked").symlink_to(tmp_path / "elsewhere_labels")
    assert len(open_data("folder", folder, "train")) == 7


def test_resource_forks_of_macos_are_left_out(tmp_path):
    for name in ("a.jpg", "._a.jpg", ".b/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(find_images([str(tmp_path)], tmp_path / "out")) == ["a"]


@pytest.mark.parametrize("option", ["--data-root", "--split", "--save", "--dataset"])
def test_an_empty_option_is_a_mistake(option, run_inside):
    message = run_inside(evaluate, option, "", fails=True)
    assert message == f"{option}: is empty; a variable that is not set?"
    assert run_inside(evaluate, f"{option}=", fails=True) == f"{option}=: is empty; a variable that is not set?"


@pytest.mark.parametrize("root", ["~nosuchuser/data", "nothing"])
def test_a_root_that_is_not_there(root):
    with pytest.raises(InputError, match=f"^{root}: there is no images/ in it"):
        open_data("folder", root, "train")


def test_a_name_that_is_not_text(folder, tmp_path):
    """In UTF-8; with --cache, too."""
    name = os.fsdecode(b"caf\xe9.png")
    for kind in ("images", "annotations"):
        place = folder / kind / "train"
        (place / "scene1.png").rename(place / name)
    data = open_data("folder", folder, "train", tmp_path / "cache")
    for _ in range(2):
        assert [len(data[i]) for i in range(6)] == [2] * 6


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_a_flipped_bit_is_found(tmp_path):
    path = save_model(tmp_path / "model.pt", "gcnet")
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda part: part.file_size)
    spoilt = bytearray(path.read_bytes())
    spoilt[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(spoilt)
    with pytest.raises(InputError, match=f"^{path}: is damaged"):
        load_model(path)


def edited(path, change):
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)
    return path


def test_scores_that_are_no_numbers_are_no_classes(folder, tmp_path, run_inside):
    def change(saved):
        saved["model"]["backbone.stem.1.running_var"].fill_(-1)

    edited(save_model(tmp_path / "model.pt", "gcnet"), change)
    message = run_inside(evaluate, "model.pt", "--data-root", folder, "--workers", 0, fails=True)
    assert message.startswith("the model's scores are not numbers")


@pytest.mark.parametrize(
    "name, value",
    [("model", "unet"), ("depth", 20), ("blocks", ["nl", "res5"]), ("classes", None), ("learning_rate", 1)],
)
def test_a_config_that_builds_no_model(name, value, tmp_path):
    path = edited(save_model(tmp_path / "model.pt", "gcnet"), lambda saved: saved["config"].update({name: value}))
    with pytest.raises(InputError, match=rf"^{path}: its config builds no model here \("):
        load_model(path)


def test_a_checkpoint_of_the_weights_alone_is_no_run(folder, tmp_path, run_inside):
    (tmp_path / "run").mkdir()
    save_model(tmp_path / "run/last.pt", "gcnet")
    message = run_inside(train, "--resume", "--out", "run", "--data-root", folder, fails=True)
    assert message == "run/last.pt: holds no state that can be continued; --init starts from its weights"


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def deny(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    path = save_model(tmp_path / "model.pt", "gcnet")
    monkeypatch.setattr(torch, "load", deny)
    with pytest.raises(InputError, match=rf"^{path}: cannot be read .*Permission denied"):
        load_model(path)


def test_the_newest_run_is_named_and_may_be_a_link(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for place, seconds in (("runs/a", 100), ("runs/b/c", 200), ("elsewhere", 300)):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "best.pt").touch()
        os.utime(tmp_path / place / "best.pt", (seconds, seconds))
    assert str(newest_checkpoint()) == "runs/b/c/best.pt"
    assert capsys.readouterr().out == "checkpoint: runs/b/c/best.pt\n"
    (tmp_path / "runs/d").symlink_to(tmp_path / "elsewhere")
    assert str(newest_checkpoint()) == "runs/d/best.pt"
    (tmp_path / "runs/b/c/last.pt").touch()
    assert str(newest_checkpoint()) == "runs/b/c/best.pt"  # of the run that was written last
    (tmp_path / "runs/b/c/best.pt").unlink()
    assert str(newest_checkpoint()) == "runs/b/c/last.pt"  # not yet validated


# --------------------------------------------------------------------------------------------------------- messages


def test_a_message_from_a_worker_is_whole():
    path = "a\nInputError: b/support.command.InputError: c.png"
    caught = "Caught InputError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
    caught += f'  File "x.py", line 3\n    raise InputError\nsupport.command.InputError: {path}: is no file\n'
    assert explain(InputError(caught)).strip() == f"{path}: is no file"
    assert explain(InputError(f"{path}: is no file")) == f"{path}: is no file"


def test_a_name_with_a_line_break_is_one_line(run_script):
    name = "a\nInputError: b.png"
    done = run_script("tools.predict", name, status=2)
    assert done.stderr == "predict.py: error: a\\nInputError: b.png: there are no images there\n"


def test_an_output_that_nobody_reads(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    code = "from support.command import run_command; run_command(lambda: [print('a line') for _ in range(10**5)])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writing)
    assert done.returncode == 2 and done.stderr == "-c: error: the output was closed\n"
