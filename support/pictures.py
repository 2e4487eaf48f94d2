"""Pictures of segmentations, label maps as files, and the figures of an evaluation for other programs."""

import json
import math
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from support.command import InputError
from support.files import refuse_existing, refuse_output_folder, write_file

INK, PAPER = (40, 40, 40), (255, 255, 255)
OF_CLASSES = ("IoU", "Acc", "Precision", "Fscore")


def save_png(picture, path):
    """Writes a picture of Pillow, over a file that is there. Raises InputError if it cannot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda file: picture.save(file, "PNG"), sync=False)


def colour_table(palette):
    """The colour of each value in a label map, uint8 (256, 3); black from len(palette) on, and so for void."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    return table


def colour(label, palette):
    """Pillow's RGB image of a label map uint8 (H, W)."""
    return Image.fromarray(colour_table(palette)[np.asarray(label)])


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


def draw_comparison(rows, names, palette, tile=256, gap=8):
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
    """Writes the predictions on a data set as 8-bit PNG below a folder, named as the images are: class indices with the
    palette, or, as a submission, the values that the data set's test server expects.

    Raises InputError before anything is written: if a label map would replace a file and `overwrite` is not given, if
    two would have one path, or if the folder is or holds one of the data set's.
    """

    def __init__(self, folder, data, submission=False, overwrite=False):
        self.folder, self.data = folder, data
        self.values = data.submission if submission else None
        paths = [self.path(image) for image, _ in data.files]
        if len(set(paths)) < len(paths):
            raise InputError(f"{folder}: two images of {data.split!r} have one name, so would their label maps")
        refuse_output_folder(folder, [path for pair in data.files for path in pair if path])
        refuse_existing(paths, overwrite)

    def path(self, image):
        name = image.relative_to(self.data.tree) if self.data.tree else image.name
        return (self.folder / name).with_suffix(".png")

    def save(self, i, prediction):
        """Writes the prediction uint8 (H, W) on item i."""
        if self.values is None:
            picture = Image.fromarray(np.asarray(prediction))
            picture.putpalette(colour_table(self.data.palette).tobytes())
        else:
            picture = Image.fromarray(np.array(self.values, np.uint8)[prediction])
        save_png(picture, self.path(self.data.files[i][0]))


def prepare_results(path, overwrite):
    """Makes the folder for the file of write_results. Raises InputError if it could not be written, or exists and
    `overwrite` is not given: before an evaluation, not after hours of it."""
    refuse_existing([path], overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: cannot be written; name a file in a folder that can be")


def write_results(path, result, names, about):
    """Writes the dict `about` and `result`, evaluate.metrics() of classes with these names, as JSON: figures in 0..1,
    the matrix in pixels."""
    values = zip(names, *(without_nan(result[name]) for name in OF_CLASSES), strict=True)
    content = about | {name: result[name] for name in ("mIoU", "mAcc", "mPrecision", "mFscore", "aAcc")}
    content["classes"] = [dict(zip(("name", *OF_CLASSES), row, strict=True)) for row in values]
    content["confusion_matrix"] = result["matrix"].tolist()
    write_file(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def without_nan(values):
    """A list of the numbers in a tensor (K,), None where there is none: JSON knows no NaN."""
    return [None if math.isnan(value) else value for value in values.tolist()]
