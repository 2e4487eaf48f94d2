"""The embedded data set: scenes of objects in five forms, drawn from a seed. Nothing to download."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

CLASSES = ("ground", "disc", "square", "triangle", "cross", "ring")
PALETTE = ((70, 70, 70), (230, 80, 60), (240, 200, 60), (90, 190, 90), (80, 140, 230), (190, 100, 220))
COUNTS = {"train": 4000, "val": 50, "test": 50}
SIZE = 64
VOID = 255

CIRCLE = [(np.cos(t), np.sin(t)) for t in np.linspace(0, 2 * np.pi, 24, endpoint=False)]
CROSS = [(1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3), (-1, -3), (-1, -1), (-3, -1), (-3, 1), (-1, 1), (-1, 3)]
OUTLINES = {
    "disc": CIRCLE,
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -1.2), (1.04, 0.6), (-1.04, 0.6)],
    "cross": [(0.38 * x, 0.38 * y) for x, y in CROSS],
    "ring": CIRCLE,
}


def draw(split, index):
    """Scene `index` of a split: image uint8 (64, 64, 3) and label uint8 (64, 64), void along the objects' borders.

    The form decides the class; the colour is only a hint, since the hues of the classes overlap.
    """
    rng = np.random.default_rng((list(COUNTS).index(split), index))
    patches = (rng.integers(50, 170, (8, 8, 1)) + rng.integers(-25, 26, (8, 8, 3))).astype(np.uint8)
    image = Image.fromarray(patches).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    label = Image.new("L", (SIZE, SIZE))
    for _ in range(rng.integers(2, 5)):
        kind = int(rng.integers(1, len(CLASSES)))
        centre, radius, turn = rng.uniform(8, SIZE - 8, 2), rng.uniform(11, 19), rng.uniform(0, 2 * np.pi)
        hue, saturation, value = int(rng.normal(kind * 51, 12)) % 256, *rng.integers(150, 256, 2).tolist()
        place(image, label, CLASSES[kind], kind, centre, radius, turn, (hue, saturation, value))
    return finish(image, label, rng)


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
