"""The page of a run: one HTML file, which needs no network. Its form and its script are in report.html."""

import base64
import io
import json
import math
from pathlib import Path

from support.command import InputError
from support.files import write_file
from support.images import open_image

CURVES = ("loss", "val_loss", "lr", "mIoU", "mAcc", "aAcc")
POINTS = 2000  # of a curve, at most


def write_report(out, settings, lines, matrix):
    """Writes OUT/report.html: a run's curves, IoU of each class, confusion matrix, pictures and settings.

    out       the run's folder; the pictures are those in its samples/ of the validations in `lines`
    settings  dict, as in config.json
    lines     dicts, as in log.jsonl
    matrix    int64 (K, K): the confusion matrix of the last validation

    Raises InputError if it cannot be written. A picture that cannot be read is left out.
    """
    values = {
        "run": out.resolve().name,
        "settings": settings,
        "curves": {name: curve(lines, name) for name in CURVES},
        "IoU": [(line["iteration"], line["IoU"]) for line in lines if line.get("IoU")],
        "matrix": matrix.tolist(),
        "pictures": pictures(out / "samples", [line["iteration"] for line in lines if "val_loss" in line]),
    }
    text = json.dumps(values).replace("<", "\\u003c")  # a class may be named </script>
    page = Path(__file__).with_suffix(".html").read_text().replace("DATA_HERE", text)
    write_file(out / "report.html", lambda file: file.write(page.encode()), sync=False)


def curve(lines, name):
    """[(iteration, value)] of what the log holds under a name, evenly thinned to POINTS; the last one stays."""
    values = [(line["iteration"], line.get(name)) for line in lines]
    points = [(at, value) for at, value in values if isinstance(value, (int, float)) and math.isfinite(value)]
    return points[:: -(len(points) // POINTS + 1)][::-1]


def pictures(folder, iterations):
    """[(iteration, base64 of a JPEG)] of the pictures of validations that can be read."""
    found = []
    for iteration in iterations:
        try:
            picture, _ = open_image(folder / f"{iteration:06}.png")
        except InputError:
            continue
        jpeg = io.BytesIO()
        picture.convert("RGB").save(jpeg, "JPEG", quality=75, subsampling=0)  # the label maps' borders stay sharp
        found.append((iteration, base64.b64encode(jpeg.getvalue()).decode()))
    return found
