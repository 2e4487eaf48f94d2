"""The data sets that are drawn from a seed: nothing to download.

    shapes   objects in five forms; the form decides the class, the colour is only a hint
    context  a disc is one class by day and another at dusk, and so is a cross. Only the sky, at the far end behind
             empty ground, says which: a model that sees an object and its surroundings can do no better than guess.
    legend   at one end every form stands once, in a colour drawn at random; three grey objects at the other end have
             the class of the coloured one of their form. So where an object must look depends on the object.

The functions of these names take a root, which they do not need, and a split, as those of layouts.py do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch.utils.data import Dataset

from support.images import VOID

COUNTS = {"train": 4000, "val": 50, "test": 50}  # scenes of each split

SHAPES = ("ground", "disc", "square", "triangle", "cross", "ring")
SHAPES_PALETTE = ((70, 70, 70), (230, 80, 60), (240, 200, 60), (90, 190, 90), (80, 140, 230), (190, 100, 220))
SIZE = 64

CONTEXT = ("ground", "dusk", "day", "disc at dusk", "disc by day", "cross at dusk", "cross by day")
CONTEXT_PALETTE = (
    *((70, 70, 70), (240, 150, 60), (110, 190, 250)),
    *((150, 40, 30), (250, 110, 90), (30, 110, 50), (130, 220, 110)),
)
HEIGHT, WIDTH, SKY = 32, 160, 32
SKY_HUES = (20, 150)  # dusk and day, out of 256: opposite, so that no photometric distortion takes one to the other
FORMS = {"disc": 85, "cross": 212}  # and their hues

LEGEND_FORMS = ("disc", "cross", "triangle", "ring")
LEGEND_COLOURS = {"red": 0, "cyan": 128, "green": 64, "violet": 192}  # and their hues
STEP = 27  # pixels from one object to the next
GAP = 32  # more of them between the legend and the objects

CIRCLE = [(np.cos(t), np.sin(t)) for t in np.linspace(0, 2 * np.pi, 24, endpoint=False)]
CROSS = [(1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3), (-1, -3), (-1, -1), (-3, -1), (-3, 1), (-1, 1), (-1, 3)]
OUTLINES = {
    "disc": CIRCLE,
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -1.2), (1.04, 0.6), (-1.04, 0.6)],
    "cross": [(0.38 * x, 0.38 * y) for x, y in CROSS],
    "ring": CIRCLE,
}


@dataclass
class Scenes(Dataset):
    """One split of a drawn data set, to be used as images.Files is. Item i is draw(split, i) as tensors."""

    draw: Callable
    split: str
    classes: Sequence
    palette: Sequence
    name: str = ""
    labelled = True
    tree = None
    submission = None

    def __post_init__(self):
        self.files = [(Path(f"{self.split}{i:05}"), None) for i in range(COUNTS.get(self.split, 0))]  # but names only

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        image, label = self.draw(self.split, i)
        return torch.from_numpy(image), torch.from_numpy(label)


def shapes(root, split):
    return Scenes(draw_shapes, split, SHAPES, SHAPES_PALETTE)


def context(root, split):
    return Scenes(draw_context, split, CONTEXT, CONTEXT_PALETTE)


def legend(forms, colours, root, split):
    """With 2 to 4 forms and as many colours."""
    classes, palette = ["ground"], [(70, 70, 70)]
    for kind, form in enumerate(LEGEND_FORMS[:forms]):
        for colour, hue in list(LEGEND_COLOURS.items())[:colours]:
            swatch = Image.new("HSV", (1, 1), (hue, 240 - 40 * kind, 100 + 50 * kind)).convert("RGB")
            classes.append(f"{colour} {form}")
            palette.append(swatch.getpixel((0, 0)))
    return Scenes(partial(draw_legend, forms, colours), split, classes, palette)


def decided_afar(dataset, image, label):
    """Where the other end of a scene of context or a legend decides the class, and nothing nearer: bool (H, W). image
    is uint8 (H, W, 3), label uint8 (H, W)."""
    if dataset == "context":
        return (label > 2) & (label != VOID)
    grey = image.amax(2).int() - image.amin(2) < 64  # noise included
    return grey & (label > 0) & (label != VOID)


def draw_shapes(split, index):
    """Scene `index` of a split: image uint8 (64, 64, 3) and label uint8 (64, 64), void along the objects' borders."""
    rng = np.random.default_rng((list(COUNTS).index(split), index))
    patches = (rng.integers(50, 170, (8, 8, 1)) + rng.integers(-25, 26, (8, 8, 3))).astype(np.uint8)
    image = Image.fromarray(patches).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    label = Image.new("L", (SIZE, SIZE))
    for _ in range(rng.integers(2, 5)):
        kind = int(rng.integers(1, len(SHAPES)))
        centre = rng.uniform(8, SIZE - 8, 2)
        radius = rng.uniform(11, 19)
        turn = rng.uniform(0, 2 * np.pi)
        hsv = (int(rng.normal(kind * 51, 12)) % 256, *rng.integers(150, 256, 2).tolist())
        place(image, label, SHAPES[kind], kind, centre, radius, turn, hsv)
    return finish(image, label, rng)


def draw_context(split, index, time=None):
    """Scene `index` of a split: image uint8 (32, 160, 3) and label uint8 (32, 160), void along the borders.

    time  0 (dusk) or 1 (day) instead of the one drawn: changes the sky's pixels, the objects' labels, and no more
    """
    rng = np.random.default_rng((list(COUNTS).index(split), index))
    drawn = int(rng.integers(2))
    time = drawn if time is None else time
    patches = (rng.integers(70, 150, (4, 20, 1)) + rng.integers(-25, 26, (4, 20, 3))).astype(np.uint8)
    image = Image.fromarray(patches).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    label = Image.new("L", (WIDTH, HEIGHT))
    sky = (int(rng.normal(SKY_HUES[time], 4)), *rng.integers(180, 256, 2).tolist())
    image.paste(Image.new("HSV", (SKY, HEIGHT), sky).convert("RGB"))
    label.paste(1 + time, (0, 0, SKY, HEIGHT))
    for x in (92.5, 119.5, 146.5):
        kind = int(rng.integers(2))
        radius = rng.uniform(11.5, 12.5)
        turn = rng.uniform(0, 2 * np.pi)
        form, hue = list(FORMS.items())[kind]
        hsv = (int(rng.normal(hue, 8)) % 256, *rng.integers(150, 256, 2).tolist())
        centre = (x, rng.uniform(radius, HEIGHT - radius))
        place(image, label, form, 3 + 2 * kind + time, centre, radius, turn, hsv)
    return mirrored(*finish(image, label, rng), rng)


def draw_legend(forms, colours, split, index, chosen=None):
    """Scene `index` of a split: image uint8 (32, W, 3) and label uint8 (32, W), W = 27 (forms + 3) + 32, void along the
    borders.

    chosen  the colour of each form, from 0 to colours - 1, instead of those drawn: changes the legend's pixels, the
            labels, and no more
    """
    rng = np.random.default_rng((list(COUNTS).index(split), index))
    width = (forms + 3) * STEP + GAP
    patches = rng.integers(70, 150, (4, width // 8)).astype(np.uint8)  # of the ground
    image = Image.fromarray(patches).resize((width, HEIGHT), Image.Resampling.BICUBIC).convert("RGB")
    label = Image.new("L", (width, HEIGHT))
    drawn = rng.integers(colours, size=forms)
    chosen = drawn if chosen is None else chosen
    kinds = [*rng.permutation(forms), *rng.integers(forms, size=3)]  # the legend, then three objects
    for i, kind in enumerate(kinds):
        radius = rng.uniform(11.5, 12.5)
        turn = rng.uniform(0, 2 * np.pi)
        centre = (STEP * (i + 0.5) + GAP * (i >= forms), rng.uniform(radius, HEIGHT - radius))
        hue = int(rng.normal(list(LEGEND_COLOURS.values())[chosen[kind]], 4)) % 256
        saturation, brightness = rng.integers(180, 256, 2).tolist()
        hsv = (hue, saturation if i < forms else 0, brightness)
        place(image, label, LEGEND_FORMS[kind], int(1 + colours * kind + chosen[kind]), centre, radius, turn, hsv)
    return mirrored(*finish(image, label, rng), rng)


def place(image, label, form, kind, centre, radius, turn, hsv):
    """Draws an object of a form and a colour into the image, and its class `kind` into the label (both Pillow's)."""
    rotation = radius * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    outline = OUTLINES[form] @ rotation
    mask = Image.new("1", image.size)
    ImageDraw.Draw(mask).polygon([tuple(p) for p in centre + outline], fill=1)
    if form == "ring":
        ImageDraw.Draw(mask).polygon([tuple(p) for p in centre + 0.5 * outline], fill=0)
    image.paste(Image.new("HSV", image.size, hsv).convert("RGB"), mask=mask)
    label.paste(kind, mask=mask)


def finish(image, label, rng):
    """Pillow's image and label to arrays, with noise on the one and void along the borders in the other."""
    border = np.asarray(label.filter(ImageFilter.MaxFilter(3))) != np.asarray(label.filter(ImageFilter.MinFilter(3)))
    noise = rng.normal(0, 8, (*border.shape, 3))
    return np.clip(image + noise, 0, 255).astype(np.uint8), np.where(border, VOID, label).astype(np.uint8)


def mirrored(image, label, rng):
    """Both as they are, or mirrored, at random."""
    return (image[:, ::-1].copy(), label[:, ::-1].copy()) if rng.random() < 0.5 else (image, label)
