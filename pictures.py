"""Pictures of segmentations."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, PAPER = (40, 40, 40), (255, 255, 255)


def colour(label, palette):
    """RGB image of a label map uint8 (H, W); void is black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    return Image.fromarray(table[np.asarray(label)])


def compare(rows, names, palette, tile=256, gap=8):
    """One picture of several (image, label, prediction), a row each, with a legend of the classes that appear."""
    font = ImageFont.load_default(14)
    shown = sorted({int(v) for _, *maps in rows for values in maps for v in np.unique(values) if v < len(names)})
    height, width = rows[0][0].shape[:2]
    size = (max(tile * width // height, 1), tile)
    columns = max(3 * (size[0] + gap) // 150, 1)
    bottom = 24 + len(rows) * (tile + gap)
    canvas = Image.new("RGB", (3 * (size[0] + gap) + gap, bottom + 22 * (-(-len(shown) // columns)) + gap), PAPER)
    pen = ImageDraw.Draw(canvas)
    for column, title in enumerate(("image", "truth (void black)", "prediction")):
        pen.text((gap + column * (size[0] + gap), 4), title, INK, font)
    for row, (image, *maps) in enumerate(rows):
        for column, picture in enumerate([Image.fromarray(np.asarray(image)), *(colour(m, palette) for m in maps)]):
            how = Image.Resampling.NEAREST if column or height < tile else Image.Resampling.BILINEAR
            canvas.paste(picture.resize(size, how), (gap + column * (size[0] + gap), 24 + row * (tile + gap)))
    for i, index in enumerate(shown):
        x, y = gap + i % columns * 150, bottom + i // columns * 22
        pen.rectangle((x, y, x + 14, y + 14), tuple(palette[index]), INK)
        pen.text((x + 20, y - 2), names[index][:16], INK, font)
    return canvas
