"""Reads every image and label of a data set, and says what is wrong where, before a training begins.

    python -m tools.check_data --data-root DIR                    # your own images and masks
    python -m tools.check_data --dataset cityscapes --split val

Ends with status 2 if something is wrong.
"""

from collections import Counter

import numpy as np

from data import open_data
from support.command import InputError, Parser, run_command, whole_number
from support.images import VOID
from support.scan import never_labelled, scan
from support.settings import PRESETS


def check_split(data, workers):
    """Prints what a split holds, and what is wrong with it. Returns the number of problems."""
    items = scan(data, workers)
    problems = [problem for *_, problem in items if problem]
    for problem in problems[:20]:
        print(problem)
    if len(problems) > 20:
        print(f"... and {len(problems) - 20} more")
    good = [(pixels, size) for pixels, size, problem in items if not problem]
    if not good:
        return len(problems)
    sizes = Counter(size for _, size in good)
    common = ", ".join(f"{w}x{h} ({count})" for (h, w), count in sizes.most_common(3))
    print(f"{data.split}: {len(good)} of {len(items)} pairs are good; {len(sizes)} sizes (width x height): {common}")
    pixels = np.sum([pixels for pixels, _ in good], axis=0)
    images = np.sum([pixels > 0 for pixels, _ in good], axis=0)
    print(f"{'class':<24}{'pixels %':>10}{'images':>9}")
    for index, name in [*enumerate(data.classes), (VOID, "void")]:
        absent = "   never labelled" if pixels[index] == 0 and index != VOID else ""
        print(f"{name:<24}{100 * pixels[index] / max(pixels.sum(), 1):>10.2f}{images[index]:>9}{absent}")
    if not pixels[: len(data.classes)].any():
        print(f"{data.split}: all labels are void")
        return len(problems) + 1
    missing = never_labelled(pixels, data.classes) if data.split == "train" else ""
    if missing:
        print(f"{data.split}: {missing}")
    return len(problems) + bool(missing)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--dataset", choices=PRESETS, default="folder", help="default: folder")
    parser.add_argument("--data-root", help="the data set's folder (default: its name below data/)")
    parser.add_argument("--split", help="default: train and val")
    parser.add_argument("--workers", type=whole_number, default=2, help="processes that read (default: 2)")
    args = parser.parse_args()
    splits = ("train", "val") if args.split is None else (args.split,)
    wrong = sum(check_split(open_data(args.dataset, args.data_root, split), args.workers) for split in splits)
    if wrong:
        raise InputError(f"{wrong} problem{'s' * (wrong > 1)} to correct before training")
    print("good: no problems found")


if __name__ == "__main__":
    run_command(main)
