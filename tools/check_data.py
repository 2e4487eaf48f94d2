"""Reads every image and label of a data set, and says what is wrong where, before a training begins.

    python -m tools.check_data --data-root DIR                    # your own images and masks
    python -m tools.check_data --dataset cityscapes --split val

Also prints class weights that balance the classes, for train.py. Ends with status 2 if something is wrong.
"""

from collections import Counter

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import open_data
from support.command import BAR, InputError, Parser, run_command, whole_number
from support.images import VOID
from support.processes import worker_options
from support.settings import PRESETS


class Scan(Dataset):
    """Item i is (what is wrong or None, pixels of each class int64 (256,), (height, width), the palette or None)."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        image_path, label_path = self.data.files[i]
        try:
            image, label = self.data[i]
        except InputError as error:
            return str(error), None, None, None
        if label is None:
            return f"{image_path}: has no label; its split has no folder of labels", None, None, None
        palette = None
        if label_path:
            with Image.open(label_path) as file:
                palette = bytes(file.getpalette()) if file.mode == "P" else None
        return None, np.bincount(label.flatten(), minlength=256), tuple(image.shape[:2]), palette


def check_split(data, workers):
    """Prints what a split holds, and what is wrong with it. Returns the number of problems."""
    # `tuple` keeps an item's numpy arrays: as a tensor, each from a worker would be an open file.
    loader = DataLoader(Scan(data), batch_size=None, collate_fn=tuple, **worker_options(workers))
    items = list(tqdm(loader, f"reading {data.split}", leave=False, **BAR))
    problems = [problem for problem, *_ in items if problem] + palette_conflict(items, data.files)
    for problem in problems[:20]:
        print(problem)
    if len(problems) > 20:
        print(f"... and {len(problems) - 20} more")
    good = [(pixels, size) for problem, pixels, size, _ in items if not problem]
    if not good:
        return len(problems)
    sizes = Counter(size for _, size in good)
    common = ", ".join(f"{h}x{w} ({count} images)" for (h, w), count in sizes.most_common(3))
    print(f"{data.split}: {len(good)} of {len(items)} pairs are good; {len(sizes)} size(s), height x width: {common}")
    counts = np.array([pixels for pixels, _ in good])  # (images, 256)
    print_classes(counts, data.classes)
    if not counts[:, : len(data.classes)].any():
        print(f"{data.split}: all labels are void")
        return len(problems) + 1
    if data.split != "train":
        return len(problems)
    missing = never_labelled(counts.sum(0), data.classes)
    if missing:
        print(f"{data.split}: {missing}")
    elif not problems:
        weights = balanced_weights(counts[:, : len(data.classes)])
        print("to balance the classes: --class-weights", *(f"{weight:.3g}" for weight in weights))
    return len(problems) + bool(missing)


def palette_conflict(items, files):
    """[A sentence about the first two label files in whose palettes one colour stands for different classes]; or []."""
    known = {}  # colour -> the class, palette and path of the first file that shows it
    for (problem, pixels, _, palette), (_, path) in zip(items, files, strict=True):
        for value in () if problem or not palette else pixels.nonzero()[0].tolist():
            colour = palette[3 * value : 3 * value + 3]
            other, other_palette, other_path = known.setdefault(colour, (value, palette, path))
            alike = other_palette[3 * value : 3 * value + 3], palette[3 * other : 3 * other + 3]
            if other != value and colour not in alike:  # a palette may hold a colour twice
                text = f"the colour {list(colour)} is class {value} here, and class {other} in {other_path}"
                return [f"{path}: {text}; python -m tools.convert_masks goes by colour"]
    return []


def print_classes(counts, names):
    """Prints the share of each class and of void in the pixels of all images, and in how many images it is."""
    pixels, images = counts.sum(0), (counts > 0).sum(0)
    print(f"{'class':<24}{'pixels %':>10}{'images':>9}")
    for index, name in [*enumerate(names), (VOID, "void")]:
        absent = "   never labelled" if pixels[index] == 0 and index != VOID else ""
        print(f"{name:<24}{100 * pixels[index] / max(pixels.sum(), 1):>10.2f}{images[index]:>9}{absent}")


def never_labelled(pixels, names):
    """A sentence about those of the K classes `names` that have none of the `pixels` (256,); "" if all have some."""
    missing = [name for name, count in zip(names, pixels, strict=False) if not count]
    if not missing:
        return ""
    text = f"no label shows {', '.join(missing[:5])}" + (f" and {len(missing) - 5} others" if missing[5:] else "")
    if len(missing) == len(names) - 1 and pixels[VOID]:
        text += "; all other pixels are 255, which means void: python -m tools.convert_masks makes them a class"
    return text


def balanced_weights(counts):
    """(K,) from the pixels (images, K) of each class: median(f) / f (Eigen and Fergus, ICCV 2015), f being a class's
    share of the pixels of the images that show it; 1 for a class that none shows."""
    shown = (counts > 0) * counts.sum(1, keepdims=True)  # the pixels of the images that show a class
    frequency = counts.sum(0) / np.maximum(shown.sum(0), 1)
    seen = frequency > 0
    return np.where(seen, np.median(frequency[seen]) / np.where(seen, frequency, 1), 1)


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
