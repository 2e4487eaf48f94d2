"""Copies a folder of images and one of masks of class indices to a data set, divided at random into train, val, test.

    python -m tools.split photos/ indices/ --out own                      # a fifth to validate on
    python -m tools.split photos/ indices/ --out own --val 0.1 --test 0.1

A mask has its image's name, apart from the ending, and lies in the same subfolder. The division depends on the names
and the seed alone. Masks of other values (0 and 255, colours) or formats go through tools.convert_masks first.
"""

import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from support.command import BAR, InputError, Parser, run_command, whole_number
from support.layouts import IMAGE_ENDS, pair_files


def assign_splits(names, val, test, seed):
    """{name: split}, the shares rounded to whole images, but at least one to validate on and one to train on."""
    if not (0 <= val < 1 and 0 <= test < 1):
        raise InputError(f"--val {val} --test {test}: each must be a number from 0 to less than 1")
    drawn = random.Random(seed).sample(sorted(names), len(names))
    to_val = max(round(val * len(drawn)), 1)
    to_test = round(test * len(drawn))
    if to_val + to_test >= len(drawn):
        raise InputError(f"{len(drawn)} images: with --val {val} --test {test} none would be left to train on")
    splits = ["val"] * to_val + ["test"] * to_test + ["train"] * (len(drawn) - to_val - to_test)
    return dict(zip(drawn, splits, strict=True))


def main():
    parser = Parser(__doc__)
    parser.add_argument("images", type=Path, help="the folder of the images")
    parser.add_argument("masks", type=Path, help="the folder of the masks: .png")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make, for the data set")
    parser.add_argument("--val", type=float, default=0.2, help="share of the images to validate on (default: 0.2)")
    parser.add_argument("--test", type=float, default=0, help="share of the images to test on (default: 0)")
    parser.add_argument("--seed", type=whole_number, default=0, help="another divides them differently (default: 0)")
    args = parser.parse_args()

    for folder in (args.images, args.masks):
        if not folder.is_dir():
            raise InputError(f"{folder}: there is no such folder")
    if args.out.exists():
        raise InputError(f"{args.out}: already exists; name another folder")
    pairs = {
        image.relative_to(args.images).with_suffix("").as_posix(): (image, mask)
        for image, mask in pair_files(args.images, IMAGE_ENDS, args.masks, (".png",))
    }
    splits = assign_splits(pairs, args.val, args.test, args.seed)

    args.out.parent.mkdir(parents=True, exist_ok=True)
    # Its folder appears when it is complete: a part of a data set could be mistaken for all of it.
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=".split-") as partial:
        made = Path(partial, "made")
        for name, split in tqdm(splits.items(), "splitting", leave=False, **BAR):
            for kind, path in zip(("images", "annotations"), pairs[name], strict=True):
                target = made / kind / split / f"{name}{path.suffix}"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        listed = (args.masks / "classes.txt").exists()
        if listed:
            shutil.copyfile(args.masks / "classes.txt", made / "classes.txt")
        made.rename(args.out)
    counts = Counter(splits.values())
    print(f"{args.out}: {counts['train']} to train on, {counts['val']} to validate on, {counts['test']} to test on")
    if not listed:
        print(f"next: write {args.out / 'classes.txt'}: one class name a line, the first is class 0")
    print(f"next: python -m tools.check_data --data-root {args.out}")


if __name__ == "__main__":
    run_command(main)
