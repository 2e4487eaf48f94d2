"""The figures of an evaluation as a file for other programs, and its confusion matrix as a picture."""

import json
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from support.command import InputError
from support.files import replace
from support.pictures import INK, MARK, PAPER, refuse_to_replace, save_png

OF_CLASSES = ("IoU", "Acc", "Precision", "Fscore")
MEANS = ("mIoU", "mAcc", "mPrecision", "mFscore", "aAcc")


def without_nan(values):
    """A list of the numbers in a tensor (K,), None where there is none: JSON knows no NaN."""
    return [None if math.isnan(value) else value for value in values.tolist()]


class ResultFile:
    """FILE, in JSON, and beside it FILE.png, the picture of the confusion matrix. Raises InputError if one of them
    could not be written, or would take the place of a file that was not written so."""

    def __init__(self, path):
        self.path = path
        self.picture = Path(f"{path}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise InputError(f"--json {path}: cannot be written; name a file in a folder that can be")
        refuse_to_replace([self.path, self.picture])
        if path.exists() and path.read_bytes()[:1] != b"{":  # a page or a picture of these commands
            raise InputError(f"--json {path}: is there already, and is no such file; move it, or name another")

    def write(self, result, names, about):
        """Writes evaluate.metrics(), all in 0..1, after what a dict tells about the evaluation. A matrix's row is the
        labelled class, its column the predicted one; it counts pixels."""
        values = zip(names, *(without_nan(result[name]) for name in OF_CLASSES), strict=True)
        content = {"written by": MARK} | about | {name: result[name] for name in MEANS}
        content["classes"] = [dict(zip(("name", *OF_CLASSES), row, strict=True)) for row in values]
        content["confusion_matrix"] = result["matrix"].tolist()
        replace(self.path, lambda file: file.write(json.dumps(content, indent=1).encode()))
        save_png(confusion_picture(result["matrix"], names), self.picture)


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
