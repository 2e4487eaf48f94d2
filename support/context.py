"""The embedded data set of the ablation: scenes whose objects cannot be told from what surrounds them.

A disc is one class by day and another at dusk, and so is a cross. Only the sky says which, and it lies at the far end
of the scene, behind empty ground: a model that sees an object and its surroundings can do no better than guess.
"""

import numpy as np
from PIL import Image

from support.scenes import COUNTS, finish, place

CLASSES = ("ground", "dusk", "day", "disc at dusk", "disc by day", "cross at dusk", "cross by day")
PALETTE = ((70, 70, 70), (240, 150, 60), (110, 190, 250), (150, 40, 30), (250, 110, 90), (30, 110, 50), (130, 220, 110))
HEIGHT, WIDTH, SKY = 32, 160, 32
SKY_HUES = (20, 150)  # dusk and day, out of 256: opposite, so that no photometric distortion takes one to the other
FORMS = {"disc": 85, "cross": 212}  # and their hues


def draw(split, index, time=None):
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
        kind, radius, turn = int(rng.integers(2)), rng.uniform(11.5, 12.5), rng.uniform(0, 2 * np.pi)
        form, hue = list(FORMS.items())[kind]
        hsv = (int(rng.normal(hue, 8)) % 256, *rng.integers(150, 256, 2).tolist())
        place(image, label, form, 3 + 2 * kind + time, (x, rng.uniform(radius, HEIGHT - radius)), radius, turn, hsv)
    image, label = finish(image, label, rng)
    if rng.random() < 0.5:
        image, label = image[:, ::-1].copy(), label[:, ::-1].copy()
    return image, label
