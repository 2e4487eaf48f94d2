"""Synthetic data sets, drawn from a seed: nothing to download.

    shapes   objects in five forms; the form decides the class, the colour is only a hint
    context  a disc is one class by day and another at dusk, and so is a cross. Only the sky, at the far end behind
             empty ground, says which: a model that sees an object and its surroundings can do no better than guess.
    legend   at one end every form stands once, red or cyan at random; three grey objects at the other end have the
             class of the coloured one of their form. So where an object must look depends on the object.

Each of these, at the end of the file, takes a root, which must be None, and a split.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch.utils.data import Dataset

from support.command import InputError
from support.images import VOID

COUNTS = {"train": 4000, "val": 50, "test": 50}  # scenes of each split
GREY = (70, 70, 70)  # the ground in all palettes

SHAPES = ("ground", "disc", "square", "triangle", "cross", "ring")
SHAPES_PALETTE = (GREY, (230, 80, 60), (240, 200, 60), (90, 190, 90), (80, 140, 230), (190, 100, 220))
SIZE = 64

CONTEXT = ("ground", "dusk", "day", "disc at dusk", "disc by day", "cross at dusk", "cross by day")
CONTEXT_PALETTE = (GREY, (240, 150, 60), (110, 190, 250), (150, 40, 30), (250, 110, 90), (30, 110, 50), (130, 220, 110))
HEIGHT, WIDTH, SKY = 32, 160, 32
SKY_HUES = (20, 150)  # dusk and day, out of 256: opposite, so that no photometric distortion takes one to the other
FORMS = {"disc": 85, "cross": 212}  # and their hues

LEGEND_FORMS = ("disc", "cross", "triangle", "ring")
LEGEND = ("ground", *(f"{colour} {form}" for form in LEGEND_FORMS for colour in ("red", "cyan")))
LEGEND_PALETTE = (
    *(GREY, (100, 6, 6), (6, 99, 100), (150, 32, 32), (32, 149, 150)),
    *((200, 75, 75), (75, 199, 200), (250, 132, 132), (132, 249, 250)),
)
LEGEND_HUES = (0, 128)  # red and cyan
STEP = 27  # pixels from one object to the next
GAP = 32  # pixels more between the legend's four objects and the three others
LEGEND_WIDTH = 7 * STEP + GAP

CIRCLE = [(np.cos(t), np.sin(t)) for t in np.linspace(0, 2 * np.pi, 24, endpoint=False)]
CROSS = [(1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3), (-1, -3), (-1, -1), (-3, -1), (-3, 1), (-1, 1), (-1, 3)]
OUTLINES = {
    "disc": CIRCLE,
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -1.2), (1.04, 0.6), (-1.04, 0.6)],
    "cross": [(0.38 * x, 0.38 * y) for x, y in CROSS],
    "ring": CIRCLE,
}


class Scenes(Dataset):
    """One split of a synthetic data set, used as images.Files is. Item i is draw(split, i) as tensors."""

    labelled = True
    tree = submission = None  # of Files, where these say how label maps are saved

    def __init__(self, draw, classes, palette, root, split):
        if root:
            raise InputError(f"--data-root {root}: goes with --dataset folder, for own images; this one is synthetic")
        self.draw, self.split, self.classes, self.palette = draw, split, classes, palette
        self.files = [(Path(f"{split}{i:05}"), None) for i in range(COUNTS.get(split, 0))]  # names only, no files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        image, label = self.draw(self.split, i)
        return torch.from_numpy(image), torch.from_numpy(label)


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
    return add_noise_and_borders(image, label, rng)


def draw_context(split, index, time=None):
    """Scene `index` of a split: image uint8 (32, 160, 3) and label uint8 (32, 160), void along the borders.

    time  0 (dusk) or 1 (day) instead of the random one: changes the sky's pixels, the objects' labels, and no more
    """
    rng = np.random.default_rng((list(COUNTS).index(split), index))
    random_time = int(rng.integers(2))
    time = random_time if time is None else time
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
    return add_noise_and_borders(image, label, rng, mirror=True)


def draw_legend(split, index, chosen=None):
    """Scene `index` of a split: image uint8 (32, 221, 3) and label uint8 (32, 221), void along the borders.

    chosen  the colour of each form, 0 (red) or 1 (cyan), instead of random ones: changes the legend's pixels, the
            labels, and no more
    """
    rng = np.random.default_rng((list(COUNTS).index(split), index))
    patches = rng.integers(70, 150, (4, LEGEND_WIDTH // 8)).astype(np.uint8)
    image = Image.fromarray(patches).resize((LEGEND_WIDTH, HEIGHT), Image.Resampling.BICUBIC).convert("RGB")
    label = Image.new("L", (LEGEND_WIDTH, HEIGHT))
    random_colours = rng.integers(2, size=4)
    chosen = random_colours if chosen is None else chosen
    for i, kind in enumerate([*rng.permutation(4), *rng.integers(4, size=3)]):  # the legend, then three objects
        radius = rng.uniform(11.5, 12.5)
        turn = rng.uniform(0, 2 * np.pi)
        centre = (STEP * (i + 0.5) + GAP * (i >= 4), rng.uniform(radius, HEIGHT - radius))
        hue = int(rng.normal(LEGEND_HUES[chosen[kind]], 4)) % 256
        saturation, brightness = rng.integers(180, 256, 2).tolist()
        hsv = (hue, saturation if i < 4 else 0, brightness)
        place(image, label, LEGEND_FORMS[kind], int(1 + 2 * kind + chosen[kind]), centre, radius, turn, hsv)
    return add_noise_and_borders(image, label, rng, mirror=True)


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


def add_noise_and_borders(image, label, rng, mirror=False):
    """Pillow's image and label to arrays, with noise on the one and void along the borders in the other. If `mirror`,
    half of the scenes are mirrored."""
    border = np.asarray(label.filter(ImageFilter.MaxFilter(3))) != np.asarray(label.filter(ImageFilter.MinFilter(3)))
    noise = rng.normal(0, 8, (*border.shape, 3))
    image = np.clip(image + noise, 0, 255).astype(np.uint8)
    label = np.where(border, VOID, label).astype(np.uint8)
    if mirror and rng.random() < 0.5:
        image, label = image[:, ::-1].copy(), label[:, ::-1].copy()
    return image, label


shapes = partial(Scenes, draw_shapes, SHAPES, SHAPES_PALETTE)
context = partial(Scenes, draw_context, CONTEXT, CONTEXT_PALETTE)
legend = partial(Scenes, draw_legend, LEGEND, LEGEND_PALETTE)
