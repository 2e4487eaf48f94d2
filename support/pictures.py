"""Pictures of segmentations, label maps as files, and the figures of an evaluation for other programs."""

import json
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from support.command import InputError
from support.files import refuse_existing, refuse_output_folder, write_file

INK, PAPER = (40, 40, 40), (255, 255, 255)
OF_CLASSES = ("IoU", "Acc", "Precision", "Fscore")
MEANS = ("mIoU", "mAcc", "mPrecision", "mFscore", "aAcc")


def save_png(picture, path):
    """Writes a picture of Pillow, over a file that is there. Raises InputError if it cannot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda file: picture.save(file, "PNG"), sync=False)


# ------------------------------------------------------------------------------------------------------------ pictures


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


def confusion_picture(matrix, names):
    """Pillow's picture of a confusion matrix (K, K): each row in percent of its pixels, dark if many."""
    counts = np.asarray(matrix, float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    cell = min(max(1200 // len(names), 10), 48)
    font = ImageFont.load_default(min(cell - 2, 14))
    names = [name if len(name) <= 24 else f"{name[:22]} ..." for name in names]
    margin = 12 + max(int(font.getlength(name)) for name in names)
    side = margin + cell * len(names) + 8
    canvas = Image.new("RGB", (side, side), PAPER)
    column_names = Image.new("RGB", (side, margin), PAPER)  # as rows, to be turned
    pen = ImageDraw.Draw(canvas)
    for i, name in enumerate(names):
        place = margin + (i + 0.5) * cell
        pen.text((margin - 6, place), name, INK, font, anchor="rm")
        column = Image.new("RGB", (margin, cell), PAPER)
        ImageDraw.Draw(column).text((6, cell / 2), name, INK, font, anchor="lm")
        column_names.paste(column.rotate(90, expand=True), (margin + i * cell, 0))
    canvas.paste(column_names)
    for (row, column), share in np.ndenumerate(shares):
        left, top = margin + column * cell, margin + row * cell
        shade = tuple(int(255 - share * (255 - full)) for full in (20, 70, 140))
        pen.rectangle((left, top, left + cell - 1, top + cell - 1), shade, (235, 235, 235) if cell > 16 else None)
        if cell >= 30 and share >= 0.005:
            ink = PAPER if share > 0.5 else INK
            pen.text((left + cell / 2, top + cell / 2), f"{100 * share:.0f}", ink, font, anchor="mm")
    return canvas


# ---------------------------------------------------------------------------------------------------------- label maps


class LabelMaps:
    """Writes the predictions on a data set as 8-bit PNG below a folder, named as the images are.

    submission  write the values that the data set's test server expects, instead of class indices with the palette
    overwrite   replace files that are there

    Raises InputError before anything is written: if a label map would replace a file, if two would have one path, or
    if the folder is or holds one of the data set's. Where several processes evaluate, rank 0 makes it for all: another
    one might find what rank 0 has written by then.
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
            table = np.zeros((256, 3), np.uint8)  # of fewer colours Pillow would make fewer bits
            table[: len(self.data.palette)] = self.data.palette
            picture.putpalette(table.tobytes())
        else:
            picture = Image.fromarray(np.array(self.values, np.uint8)[prediction])
        save_png(picture, self.path(self.data.files[i][0]))


# ----------------------------------------------------------------------------------------- the figures of an evaluation


def prepare_results(path, overwrite):
    """Makes the folder for the files that write_results will write. Raises InputError if they could not be written, or
    are there already and `overwrite` is not given: before an evaluation, not after hours of it."""
    refuse_existing([path, Path(f"{path}.png")], overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: cannot be written; name a file in a folder that can be")


def write_results(path, result, names, about):
    """Writes evaluate.metrics(), all in 0..1, as JSON, and PATH.png, the picture of the confusion matrix.

    result  evaluate.metrics(); a row of its matrix is the labelled class, a column the predicted one; it counts pixels
    names   of the classes
    about   dict: what is said of the evaluation, at the top of the file
    """
    values = zip(names, *(without_nan(result[name]) for name in OF_CLASSES), strict=True)
    content = about | {name: result[name] for name in MEANS}
    content["classes"] = [dict(zip(("name", *OF_CLASSES), row, strict=True)) for row in values]
    content["confusion_matrix"] = result["matrix"].tolist()
    write_file(path, lambda file: file.write(json.dumps(content, indent=1).encode()))
    save_png(confusion_picture(result["matrix"], names), Path(f"{path}.png"))


def without_nan(values):
    """A list of the numbers in a tensor (K,), None where there is none: JSON knows no NaN."""
    return [None if math.isnan(value) else value for value in values.tolist()]
