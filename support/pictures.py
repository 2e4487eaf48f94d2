"""Pictures of segmentations, and label maps as files.

What is written here carries a mark, so that no command replaces a file of others, nor takes its own pictures for
images to segment.
"""

import math
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from support.command import InputError
from support.files import replace

INK, PAPER = (40, 40, 40), (255, 255, 255)
MARK = "Written by: How does a pixel get to see the whole image?"  # in the first bytes of every picture and page


def is_own(path):
    """Whether a file begins as those that are written here."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return MARK.encode() in file.read(4096)


def refuse_to_replace(paths):
    """Raises InputError if one of the paths is a file that was not written here."""
    for path in paths:
        if path.exists() and not is_own(path):
            raise InputError(
                f"{path}: is there already, and was not written by this command; move it, or name another folder"
            )


def save_png(picture, path):
    """Writes a picture of Pillow. Raises InputError if it cannot, or would replace a file that was not written here."""
    refuse_to_replace([path])
    write_png(picture, path)


def write_png(picture, path):
    """Writes a picture of Pillow, with the mark, in the place of whatever is there. Raises InputError if it cannot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", MARK)
    replace(path, lambda file: picture.save(file, "PNG", pnginfo=mark), sync=False)


def colour(label, palette):
    """Pillow's RGB image of a label map uint8 (H, W); void is black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    return Image.fromarray(table[np.asarray(label)])


def with_legend(picture, shown, names, palette, gap=8, cell=150):
    """The picture, and below it the names and colours of the classes in `shown`."""
    shown = [int(index) for index in shown if index < len(names)]
    columns = max((picture.width - gap) // cell, 1)
    height = 22 * math.ceil(len(shown) / columns) + gap
    canvas = Image.new("RGB", (max(picture.width, cell + gap), picture.height + gap + height), PAPER)
    canvas.paste(picture)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for i, index in enumerate(shown):
        x, y = gap + i % columns * cell, picture.height + gap + i // columns * 22
        pen.rectangle((x, y, x + 14, y + 14), tuple(palette[index]), INK)
        pen.text((x + 20, y - 2), names[index][:16], INK, font)
    return canvas


def compare(rows, names, palette, tile=256, gap=8):
    """One picture of several (image uint8 (H, W, 3), label, prediction uint8 (H, W)), a row each, with a legend of the
    classes they show."""
    font = ImageFont.load_default(14)
    aspect = max(image.shape[1] / image.shape[0] for image, _, _ in rows)
    width = min(max(int(tile * aspect), 120), 4 * tile)
    canvas = Image.new("RGB", (3 * (width + gap) + gap, 24 + len(rows) * (tile + gap)), PAPER)
    pen = ImageDraw.Draw(canvas)
    for column, title in enumerate(("image", "truth (void black)", "prediction")):
        pen.text((gap + column * (width + gap), 4), title, INK, font)
    for row, (image, *maps) in enumerate(rows):
        for column, picture in enumerate([Image.fromarray(np.asarray(image)), *(colour(m, palette) for m in maps)]):
            factor = min(width / picture.width, tile / picture.height)
            size = [max(int(side * factor), 1) for side in picture.size]
            how = Image.Resampling.NEAREST if column or factor > 1 else Image.Resampling.BILINEAR
            canvas.paste(picture.resize(size, how), (gap + column * (width + gap), 24 + row * (tile + gap)))
    shown = set().union(*(np.unique(m).tolist() for _, *maps in rows for m in maps))
    return with_legend(canvas, sorted(shown), names, palette)


class LabelMaps:
    """Writes the predictions on a data set as 8-bit PNG below a folder, named as the images are.

    submission  write the values that the data set's test server expects, instead of class indices with the palette

    Raises InputError if a label map would take the place of a file that was not written so.
    """

    def __init__(self, folder, data, submission=False):
        self.folder, self.data = folder, data
        self.values = data.submission if submission else None
        paths = [self.path(image) for image, _ in data.files]
        refuse_to_replace(paths)
        if len(set(paths)) < len(paths):
            raise InputError(
                f"{folder}: two images of the split {data.split!r} have one name, so would their label maps"
            )
        of_data = {os.path.realpath(path.parent) for pair in data.files for path in pair if path}
        if of_data & {os.path.realpath(path.parent) for path in paths}:
            raise InputError(f"{folder}: is a folder of the data set; name another one")

    def path(self, image):
        name = image.relative_to(self.data.tree) if self.data.tree else image.name
        return (self.folder / name).with_suffix(".png")

    def save(self, i, prediction):
        """Writes the prediction uint8 (H, W) on item i."""
        if self.values is None:
            picture = Image.fromarray(np.asarray(prediction))
            table = np.zeros((256, 3), np.uint8)  # of fewer colours Pillow would make fewer bits
            table[: len(self.data.palette)] = self.data.palette
            picture.putpalette(table.tobytes())
        else:
            picture = Image.fromarray(np.array(self.values, np.uint8)[prediction])
        save_png(picture, self.path(self.data.files[i][0]))
