"""Makes a data set of a folder of images and one of masks of class indices: draws what is to train and to validate on.

    python -m tools.split photos/ indices/ --out own                      # a fifth to validate on
    python -m tools.split photos/ indices/ --out own --val 0.1 --test 0.1

A mask has its image's name up to the ending, and the same subfolder. What is drawn depends on the names and the seed
alone. Masks of other values (0 and 255, colours) or formats go through tools.convert_masks before.
"""

import argparse
import hashlib
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from support.command import InputError, Parser, run_command, whole_number
from support.layouts import match, read_lines


def share(text):
    """A number from 0 to less than 1, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to less than 1")
    return value


def draw(names, val, test, seed):
    """{name: split}, the shares rounded to whole images, but at least one to validate on and one to train on."""
    # By hashes: the order of the names does not matter, and more images later change little.
    drawn = sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    to_val = max(round(val * len(drawn)), 1)
    to_test = round(test * len(drawn))
    if to_val + to_test >= len(drawn):
        raise InputError(f"{len(drawn)} images: too few, none would be left to train on")
    splits = ["val"] * to_val + ["test"] * to_test + ["train"] * (len(drawn) - to_val - to_test)
    return dict(zip(drawn, splits, strict=True))


def place(path, target, copy):
    """Makes `target` the same file as `path`, or a copy of it. Raises InputError if the disk knows no such links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if copy:
        shutil.copy2(path, target)
        return
    try:
        # A hard link takes no room, stays right when a folder is moved, and needs no rights on Windows as symlinks do.
        os.link(os.path.realpath(path), target)
    except OSError as error:
        raise InputError(f"{path}: cannot be linked from another folder ({error.strerror}); add --copy") from None


def main():
    parser = Parser(__doc__)
    parser.add_argument("images", type=Path, help="the folder of the images: .jpg, .jpeg, .png")
    parser.add_argument("masks", type=Path, help="the folder of the masks: .png")
    parser.add_argument("--out", type=Path, required=True, help="the data set's folder, to be made or filled")
    parser.add_argument("--val", type=share, default=0.2, help="share of the images to validate on (default: 0.2)")
    parser.add_argument("--test", type=share, default=0, help="share of the images to test on (default: 0)")
    parser.add_argument("--seed", type=whole_number, default=0, help="another one draws others (default: 0)")
    parser.add_argument(
        "--copy", action="store_true", help="copy the files (default: hard links: no room, but one file)"
    )
    args = parser.parse_args()

    for folder in (args.images, args.masks):
        if not folder.is_dir():
            raise InputError(f"{folder}: there is no such folder")
        if args.out.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{args.out}: lies in {folder}; the data set needs a folder apart")
    if args.images.resolve() == args.masks.resolve():
        raise InputError(f"{args.masks}: is the folder of the images, too; masks need one of their own")
    for folder in (args.out / "images", args.out / "annotations"):
        if folder.exists():
            raise InputError(f"{folder}: is there already; name another folder than {args.out}")
    given, listed = args.masks / "classes.txt", args.out / "classes.txt"
    if given.exists() and listed.exists() and read_lines(given) != read_lines(listed):
        raise InputError(f"{listed}: names other classes than {given}; move the one that is wrong")
    ends = (".jpg", ".jpeg", ".png")  # what --dataset folder reads
    pairs = {
        image.relative_to(args.images).with_suffix("").as_posix(): (image, mask)
        for image, mask in match(args.images, ends, args.masks, (".png",))
    }
    splits = draw(pairs, args.val, args.test, args.seed)

    args.out.mkdir(parents=True, exist_ok=True)
    # All or nothing: what has failed would be refused as a folder that is there already.
    with tempfile.TemporaryDirectory(dir=args.out, prefix=".split-") as partial:
        for name, split in tqdm(splits.items(), "placing", leave=False, dynamic_ncols=True):
            for kind, path in zip(("images", "annotations"), pairs[name], strict=True):
                place(path, Path(partial, kind, split, name + path.suffix), args.copy)
        for kind in ("images", "annotations"):
            os.rename(Path(partial, kind), args.out / kind)
    if given.exists() and not listed.exists():
        shutil.copyfile(given, listed)
    counts = Counter(splits.values())
    print(f"{args.out}: {counts['train']} to train on, {counts['val']} to validate on, {counts['test']} to test on")
    if not listed.exists():
        print(f"next: write {listed}: one class name a line, the first is class 0")
    print(f"next: python -m tools.check_data --data-root {args.out}")
    print(f"then: python train.py --dataset folder --data-root {args.out}")


if __name__ == "__main__":
    run_command(main)
