"""The page of a run: one HTML file, which needs no network. Its form and its script are in report.html."""

import base64
import json
import math
from pathlib import Path

from support.files import write_file

CURVES = ("loss", "val_loss", "lr", "mIoU", "mAcc", "aAcc")
POINTS = 2000  # of a curve, at most


def write_report(out, settings, lines, matrix):
    """Writes OUT/report.html: a run's curves, IoU of each class, confusion matrix, pictures and settings. Takes dicts
    as in config.json and log.jsonl, and the confusion matrix int64 (K, K) of the last validation."""
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
    step = len(points) // POINTS + 1
    return points[(len(points) - 1) % step :: step]


def pictures(folder, iterations):
    """[(iteration, base64 of a PNG)] of the pictures of validations that are there."""
    files = {iteration: folder / f"{iteration:06}.png" for iteration in iterations}
    return [(at, base64.b64encode(file.read_bytes()).decode()) for at, file in files.items() if file.is_file()]
