"""Turns masks of grey values or colours into masks of class indices, by a table. The masks themselves are not changed.

    python -m tools.convert_masks masks/   # writes table.txt, the values in the masks; edit the names there
    python -m tools.convert_masks masks/   # now that table.txt exists: writes indices/**/*.png and indices/classes.txt

A line of the table is a value and the name of its class; # begins a comment:

    0            road    # the classes are numbered from 0, in the order of their first lines
    128,64,128   road    # one name for several values makes them one class
    255          void    # neither trained on nor counted

A value is a pixel's grey value, or its colour R,G,B if the mask has colours or a palette. A transparent pixel has a
fourth number, A (alpha).
"""

import math
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from support.command import BAR, InputError, Parser, run_command
from support.files import refuse_existing
from support.images import INVALID, VOID, open_image
from support.layouts import find_images, read_lines
from support.pictures import save_png

RARE = 0.005  # of all pixels: in masks that compression has changed, a value with fewer is not proposed as a class


def read_mask(path):
    """The values in a mask, as tuples (grey value,), (R, G, B) or (R, G, B, A); and int (H, W), which of them each
    pixel has. Raises InputError if it cannot be read."""
    image, _ = open_image(path)
    if image.mode == "F":
        raise InputError(f"{path}: holds fractions; a mask must hold whole grey values, or colours")
    if image.mode in ("1", "L") or image.mode.startswith("I"):  # of 1, 8, or 16 and 32 bits
        pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
        values, which = np.unique(pixels, return_inverse=True)
        return [(value,) for value in values.tolist()], which.reshape(pixels.shape)
    pixels = np.array(image.convert("RGBA"))
    pixels[pixels[..., 3] == 0] = 0  # whatever colour a pixel has that is not seen
    pixels = pixels.view(np.uint32)[..., 0]  # one number for each colour, which np.unique sorts faster
    colours, which = np.unique(pixels, return_inverse=True)
    colours = colours.view(np.uint8).reshape(-1, 4).tolist()
    return [tuple(colour[:3] if colour[3] == 255 else colour) for colour in colours], which.reshape(pixels.shape)


def count_values(paths):
    """(Counter of the pixels that have each value, {value: the first mask that holds it}) of all masks together."""
    pixels, first = Counter(), {}
    for path in tqdm(paths, "reading", leave=False, **BAR):
        values, which = read_mask(path)
        pixels.update(dict(zip(values, np.bincount(which.flat).tolist(), strict=True)))
        first.update({value: path for value in values if value not in first})
    return pixels, first


def as_text(value):
    return ",".join(map(str, value))


def propose_table(paths):
    """The text of a table of the values in the masks."""
    pixels, first = count_values(paths)
    values = sorted(pixels)
    lines = [f"# {len(paths)} masks, {len(values)} values. Edit the names: the first is class 0, void is no class."]
    grey = [value for value in values if len(value) == 1]
    if 0 < len(grey) < len(values):
        lines.append(f"# Not all masks have colours: {first[grey[0]]} has grey values.")
    jpegs = sum(path.suffix.lower() in (".jpg", ".jpeg") for path in paths)
    if jpegs or len(values) > INVALID:
        values = [value for value in values if pixels[value] >= RARE * pixels.total()]
        lines += [
            f"# Compression ({jpegs} are JPEG) or smoothing has made most values: use the original PNGs if you can,",
            "# else keep the lines of the classes' true values, add those of rare classes, and convert with --nearest.",
        ]
    names = ["background", "foreground"] if len(values) == 2 else [f"class {i}" for i in range(len(values))]
    for value, name in zip(values, names, strict=True):
        lines.append(f"{as_text(value):<15} {name:<15} # {pixels[value] / pixels.total():.2%} of the pixels")
    return "".join(f"{line}\n" for line in lines)


def read_table(path):
    """({value: class index}, the classes' names) of a table. Raises InputError if there is a mistake in it."""
    table, names = {}, []
    for number, line in enumerate(read_lines(path), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        try:
            text, name = line.split(maxsplit=1)
            value = tuple(int(part) for part in text.split(","))
        except ValueError:
            form = "a value (a number, or R,G,B without spaces) and the name of its class"
            raise InputError(f"{path}: line {number}: {line!r} is not {form}") from None
        if value in table:
            raise InputError(f"{path}: line {number}: a second line for the value {text}")
        if name.lower() == "void":
            table[value] = VOID
            continue
        if name not in names:
            names.append(name)
        table[value] = names.index(name)
    if not 2 <= len(names) <= INVALID:
        raise InputError(f"{path}: names {len(names)} classes, not 2 to {INVALID}; name the background")
    return table, names


def add_unnamed_values(table, path, masks, nearest):
    """The table in the file `path` with all values in the masks: one that it does not name gets the class of the
    nearest that it names. Without `nearest` a value that it does not name raises InputError."""
    pixels, first = count_values(masks)
    unnamed = [value for value, _ in pixels.most_common() if value not in table]
    added = {}
    for value in unnamed:
        alike = [other for other in table if len(other) == len(value)]  # grey values, colours, or colours with alpha
        if not (nearest and alike):
            others = f", nor {len(unnamed) - 1} more" if unnamed[1:] else ""
            raise InputError(
                f"{first[value]}: holds the value {as_text(value)} ({pixels[value]} pixels in all masks), which {path} "
                f"does not name{others}; add a line for it, or --nearest if compression (JPEG) or smoothing has made it"
            )
        added[value] = table[min(alike, key=lambda other: math.dist(other, value))]
    if added:
        part = sum(pixels[value] for value in added) / pixels.total()
        text = f"{len(added)} values that {path} does not name ({part:.2%} of the pixels; see {first[unnamed[0]]})"
        print(f"{text}: given the class of the nearest value")
    return table | added


def convert(args, masks):
    """Writes the masks {name: path} as class indices below --out, and the classes' names to classes.txt."""
    table, names = read_table(args.table)
    listed = args.out / "classes.txt"
    if listed.resolve() == args.table.resolve():
        raise InputError(f"{listed}: the list of the classes would replace the table; name another --out")
    refuse_existing([listed, *(args.out / f"{name}.png" for name in masks)], args.overwrite)
    table = add_unnamed_values(table, args.table, masks.values(), args.nearest)
    for name, path in tqdm(masks.items(), "converting", leave=False, **BAR):
        values, which = read_mask(path)
        indices = np.array([table[value] for value in values], np.uint8)
        save_png(Image.fromarray(indices[which]), args.out / f"{name}.png")
    listed.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    print(f"{args.out}: {len(masks)} masks of {len(names)} classes by {args.table}; {listed} names them")
    print(f"next: python -m tools.split IMAGES {args.out} --out DIR")


def main():
    parser = Parser(__doc__)
    parser.add_argument("masks", help="the folder of the masks; subfolders are fine")
    text = "convert by this table; write it if there is none (default: table.txt)"
    parser.add_argument("--table", type=Path, default=Path("table.txt"), metavar="FILE", help=text)
    text = "the folder for the converted masks (default: indices)"
    parser.add_argument("--out", type=Path, default=Path("indices"), metavar="DIR", help=text)
    parser.add_argument("--nearest", action="store_true", help="values that the table lacks get the nearest's class")
    parser.add_overwrite()
    args = parser.parse_args()
    masks = find_images([args.masks], args.out)
    if args.table.exists():
        convert(args, masks)
        return
    table = propose_table(masks.values())
    args.table.write_text(table, encoding="utf-8")
    print(f"{table}{args.table}: this table; edit the names there, then give the same command again")


if __name__ == "__main__":
    run_command(main)
