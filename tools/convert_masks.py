"""Turns masks of grey values or colours into masks of class indices, by a table. The masks themselves stay as they are.

    python -m tools.convert_masks masks/                                    # which values there are, as a table
    python -m tools.convert_masks masks/ --propose table.txt                # the same in a new file; edit its names
    python -m tools.convert_masks masks/ --table table.txt --out indices    # indices/**/*.png, and classes.txt

A line of the table is a value and the name of its class; "# " begins a comment:

    0            road    # the classes are numbered from 0, in the order of their first lines
    128,64,128   road    # one name for several values makes them one class
    #ff0000      car     # a colour is R,G,B or hexadecimal, or R,G,B,A if it is not opaque
    255          void    # neither trained on nor counted

Values are grey values, or the indices in palette images. But if one mask has colours, or the palettes of two masks
differ, or the table has colours, then the colours of all masks count.
"""

import math
import re
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from support.command import InputError, Parser, run_command
from support.files import replace
from support.images import INVALID, VOID, open_image
from support.layouts import ENDINGS, files_by_name, note_unused, read_lines

RARE = 0.005  # of all pixels: in smeared masks, a value with fewer is not proposed as a class
LINE = re.compile(r"(#[0-9a-f]{6}|\d{1,3}(?:\s*,\s*\d{1,3}){2,3}|-?\d{1,10})\s+(\S.*)", re.I)


def read_mask(path, colours):
    """The values in a mask as tuples, (grey value or palette index,) or (R, G, B) with A where it is not opaque; int
    (H, W), which of them each pixel has; and its palette. `colours` makes all of 8 bits colours. Raises InputError."""
    image, coding = open_image(path)
    coding = coding if isinstance(coding, str) else coding[0]
    deep = image.mode.startswith("I")  # grey of 16 or 32 bits
    if not deep and (image.mode not in ("1", "L", "P", "LA", "PA", "RGB", "RGBA", "CMYK") or "16" in coding):
        raise InputError(f"{path}: holds {coding}; a mask must hold whole grey values, or colours of 8 bits")
    if deep or image.mode in ("1", "L", "P") and not colours:
        pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
        values, which = np.unique(pixels, return_inverse=True)
        values = values[:, None].tolist()
    else:
        pixels = np.array(image.convert("RGBA"))
        pixels[pixels[..., 3] == 0] = 0  # nobody sees which colour it is
        pixels = pixels.view(np.uint32)[..., 0]
        values, which = np.unique(pixels, return_inverse=True)
        values = [value[:3] if value[3] == 255 else value for value in values.view(np.uint8).reshape(-1, 4).tolist()]
    return [tuple(value) for value in values], which.reshape(pixels.shape), image.getpalette() or []


def scan(paths, colours):
    """{value: [pixels, masks, the first mask with it]}, and whether the values are colours, which they are if
    `colours`, or if the masks need it."""
    found, known = {}, {}
    bar = tqdm(paths, "reading", leave=False, dynamic_ncols=True)
    for path in bar:
        values, which, palette = read_mask(path, colours)
        for value, pixels in zip(values, np.bincount(which.flat).tolist(), strict=True):
            entry = palette[3 * value[0] :][:3]
            if not colours and (len(value) > 1 or entry and known.setdefault(value, entry) != entry):
                bar.close()
                return scan(paths, True)
            seen = found.setdefault(value, [0, 0, path])
            seen[0] += pixels
            seen[1] += 1
    return found, colours


def propose(found, paths):
    """The lines of a table of what scan found."""
    lines = [f"# masks: {len(paths)}, values: {len(found)}. Edit the names; the first is class 0, void is no class."]
    jpegs = sum(path.suffix.lower() in (".jpg", ".jpeg") for path in paths)
    total, values = sum(pixels for pixels, *_ in found.values()), sorted(found)
    if jpegs or len(found) > INVALID:
        values = [value for value in values if found[value][0] >= RARE * total]
        lines += [
            f"# Compression ({jpegs} are JPEG) or smoothing has made most: get the original PNGs. Failing that,",
            "# keep the lines of the classes' true values, add those of rare classes, and convert with --nearest.",
        ]
    names = ["background", "foreground"] if len(values) == 2 else [f"class {i}" for i in range(len(values))]
    if len(values) > 2 and values == [*((i,) for i in range(len(values) - 1)), (VOID,)]:
        names[-1] = "void"
    for value, name in zip(values, names, strict=True):
        pixels, masks, _ = found[value]
        lines.append(f"{written(value):<15} {name:<15} # {100 * pixels / total:.2f} % of the pixels; masks: {masks}")
    return lines


def written(value):
    return ",".join(map(str, value))


def read_table(path):
    """({value: class index}, the classes' names) of a table. Raises InputError if there is a mistake in it."""
    table, names = {}, []
    for number, line in enumerate(read_lines(path), 1):
        line = re.split(r"(?:^|\s)#(?=\s|$)", line)[0].strip()
        if not line:
            continue
        parts = LINE.fullmatch(line)
        if not parts:
            form = "a value (a number, R,G,B or #RRGGBB) and the name of its class"
            raise InputError(f"{path}: line {number}: {line!r} is not {form}")
        text, name = parts.groups()
        value = tuple(bytes.fromhex(text[1:]) if text[0] == "#" else map(int, text.split(",")))
        if len(value) > 1 and max(value) > 255:
            raise InputError(f"{path}: line {number}: {text}: a colour has numbers from 0 to 255")
        if value in table:
            raise InputError(f"{path}: line {number}: a second line for the value {text}")
        if name.lower() != "void" and name not in names:
            names.append(name)
        table[value] = VOID if name.lower() == "void" else names.index(name)
    if not 1 <= len(names) <= INVALID:
        raise InputError(f"{path}: names {len(names)} classes; there may be 1 to {INVALID}")
    return table, names


def complete(table, found, path, nearest):
    """The table with all values of `found`: those that it does not name get the class of the nearest that it names.
    Raises InputError instead without `nearest`, or if it names no value of their kind."""
    unnamed = sorted(found.keys() - table.keys(), key=lambda value: found[value][0], reverse=True)
    added = {}
    for value in unnamed:
        named = [other for other in table if len(other) == len(value)] if nearest else []
        if not named:
            pixels, masks, first = found[value]
            others = f", nor {len(unnamed) - 1} other values" if unnamed[1:] else ""
            raise InputError(
                f"{first}: holds the value {written(value)} ({pixels} pixels, masks: {masks}), which {path} does "
                f"not name{others}; add a line for it, or --nearest if compression (JPEG) or smoothing has made it"
            )
        added[value] = table[min(named, key=lambda other: math.dist(other, value))]
    if added:
        share = sum(found[value][0] for value in added) / sum(pixels for pixels, *_ in found.values())
        print(f"{len(added)} values that {path} does not name, {share:.2%} of the pixels: the class of the nearest")
    return table | added


def convert(args, files):
    """Writes the masks of `files` {name: path} below --out, and classes.txt; first it looks for all that is wrong."""
    table, names = read_table(args.table)
    source, out = args.masks.resolve(), args.out.resolve()
    if source.is_relative_to(out) or out.is_relative_to(source):
        raise InputError(f"{args.out}: the converted masks need a folder apart from {args.masks}")
    # A data set has it beside annotations/; in another folder it waits for tools.split.
    root = next((folder.parent for folder in (args.out, *args.out.parents) if folder.name == "annotations"), None)
    listed = (root or args.out) / "classes.txt"
    if listed.exists() and read_lines(listed) != names:
        raise InputError(f"{listed}: names other classes than {args.table}; move it, or name another folder")
    targets = [args.out / f"{name}.png" for name in files]
    for target in targets:
        if target.exists():
            raise InputError(f"{target}: is there already; name another folder")
    found, colours = scan(files.values(), any(len(value) > 1 for value in table))
    table = complete(table, found, args.table, args.nearest)
    for path, target in zip(tqdm(files.values(), "converting", leave=False, dynamic_ncols=True), targets, strict=True):
        values, which, _ = read_mask(path, colours)
        label = Image.fromarray(np.array([table[value] for value in values], np.uint8)[which])
        target.parent.mkdir(parents=True, exist_ok=True)
        # Without the mark of save_png: no command may take masks for its own, and replace them.
        replace(target, lambda file, label=label: label.save(file, "PNG"), sync=False)
    if not listed.exists():
        listed.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    print(f"{args.out}: {len(files)} masks of {len(names)} classes, which {listed} names")
    following = f"check_data --data-root {root}" if root else f"split IMAGES {args.out} --out DIR"
    print(f"next: python -m tools.{following}")


def main():
    parser = Parser(__doc__)
    parser.add_argument("masks", type=Path, help="the folder of the masks; subfolders are fine")
    parser.add_argument("--propose", type=Path, metavar="FILE", help="write the table to this new file")
    parser.add_argument("--table", type=Path, metavar="FILE", help="convert by this table")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder to write the converted masks to")
    parser.add_argument("--nearest", action="store_true", help="values that the table lacks: the class of the nearest")
    args = parser.parse_args()
    if bool(args.table) != bool(args.out) or (args.propose if args.table else args.nearest):
        raise InputError("give --table and --out to convert, and --nearest only then; or --propose alone before")
    files, others = files_by_name(args.masks, ENDINGS)
    note_unused(others, f"masks end in {', '.join(ENDINGS)}")
    if not files:
        raise InputError(f"{args.masks}: there are no masks there")
    if args.table:
        convert(args, files)
        return
    if args.propose and args.propose.exists():
        raise InputError(f"{args.propose}: is there already; name a new file")
    found, _ = scan(files.values(), False)
    lines = propose(found, files.values())
    print("\n".join(lines))
    if args.propose:
        args.propose.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"# next, when edited: python -m tools.convert_masks {args.masks} --table {args.propose} --out DIR")
    else:
        print("# next: the same with --propose FILE, which writes these lines to a file")


if __name__ == "__main__":
    run_command(main)
