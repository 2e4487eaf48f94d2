"""Commands for data sets, before training: `python data.py check ...` and `python data.py voc-aug ...`.

python data.py check --dataset folder --data-root DIR      # reads every image and label; says what is wrong where
python data.py voc-aug SBD --data-root VOCdevkit/VOC2012   # SBD's .mat files to SegmentationClassAug and aug.txt
"""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import VOID, InputError, SegmentationData
from support import classes
from support.command import Parser, whole_number
from support.layouts import find_root, read_names
from support.settings import PRESETS


class Scan(Dataset):
    """Item i is (pixels of each label value (256,), (height, width), None), or (None, None, what is wrong)."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        try:
            image, label = self.data[i]
        except InputError as error:
            return None, None, str(error)
        if label is None:
            return None, None, f"{self.data.files[i][0]}: has no label; its split has no folder of labels"
        return np.bincount(label.flatten(), minlength=256), tuple(image.shape[:2]), None


def scan(data, workers=0, rank=0, world=1):
    """Scan's items over a data set, or one of `world` shares of it, with a progress bar."""
    share = range(rank, len(data), world)
    loader = DataLoader(Scan(data), sampler=share, collate_fn=lambda items: items[0], num_workers=workers)
    return list(tqdm(loader, f"reading {data.split}", disable=rank > 0, leave=False, dynamic_ncols=True))


def class_weights(given, data, workers=0, rank=0, world=1):
    """The loss's weights, float32 (K,), or None: from K numbers as text, or from ["balanced"] by scanning the data set.

    Balanced is median frequency balancing (Eigen and Fergus, ICCV 2015): the median of the classes'
    frequencies over each one's, a frequency being the share of a class in the images that show it; 1 if none does.
    """
    if given is None:
        return None
    if given != ["balanced"]:
        try:
            weights = torch.tensor([float(weight) for weight in given])
        except ValueError:
            weights = torch.empty(0)
        usable = weights.isfinite().all() and (weights >= 0).all() and weights.any()
        if len(weights) != len(data.classes) or not usable:
            raise InputError(f"--class-weights: takes 'balanced' or {len(data.classes)} numbers from 0, one per class")
        return weights
    seen = torch.zeros(2, len(data.classes), dtype=torch.float64)
    for pixels, _, problem in scan(data, workers, rank, world):
        if problem:
            raise InputError(problem)
        pixels = torch.tensor(pixels[: len(data.classes)], dtype=torch.float64)
        seen += torch.stack([pixels, (pixels > 0) * pixels.sum()])
    if world > 1:
        torch.distributed.all_reduce(seen)
    frequency = seen[0] / seen[1]
    return (frequency.nanquantile(0.5) / frequency).nan_to_num(1.0).float()


def check(args):
    wrong, splits = 0, ("train", "val") if args.split is None else (args.split,)
    for split in splits:
        data = SegmentationData(args.dataset, args.data_root, split)
        items = scan(data, args.workers)
        problems = [problem for *_, problem in items if problem]
        good = [(pixels, size) for pixels, size, problem in items if not problem]
        for problem in problems[:20]:
            print(problem)
        if len(problems) > 20:
            print(f"... and {len(problems) - 20} more")
        wrong += len(problems)
        if not good:
            continue
        sizes = Counter(size for _, size in good)
        common = ", ".join(f"{w}x{h} ({count})" for (h, w), count in sizes.most_common(3))
        print(f"{split}: {len(good)} of {len(items)} pairs are good; {len(sizes)} sizes (width x height): {common}")
        pixels = np.sum([pixels for pixels, _ in good], axis=0)
        images = np.sum([pixels > 0 for pixels, _ in good], axis=0)
        if not pixels[: len(data.classes)].any():
            print(f"{split}: all labels are void")
            wrong += 1
        print(f"{'class':<24}{'pixels %':>10}{'images':>9}")
        for index, name in [*enumerate(data.classes), (VOID, "void")]:
            absent = "   never labelled" if pixels[index] == 0 and index != VOID else ""
            print(f"{name:<24}{100 * pixels[index] / max(pixels.sum(), 1):>10.2f}{images[index]:>9}{absent}")
    if wrong:
        raise InputError(f"{wrong} problems must be mended before training")
    print("good: nothing in the way of training")


def voc_aug(args):
    try:
        from scipy.io import loadmat
    except ImportError:
        raise InputError("SBD's files need scipy: pip install scipy") from None
    voc = find_root(
        Path(args.data_root or "data/voc12aug").expanduser(), "JPEGImages", ("VOCdevkit/VOC2012", "VOC2012"), "voc12aug"
    )
    sbd = find_root(Path(args.sbd).expanduser(), "cls", ("dataset", "benchmark_RELEASE/dataset"))
    listed = voc / "ImageSets" / "Segmentation"
    known = {name for split in ("train", "val") for name in read_names(listed / f"{split}.txt")}
    names = sorted({path.stem for path in (sbd / "cls").glob("*.mat")} - known)
    if not any((sbd / "cls").glob("*.mat")):
        raise InputError(f"{sbd / 'cls'}: holds none of SBD's .mat files")
    (voc / "SegmentationClassAug").mkdir(exist_ok=True)
    for name in tqdm(names, "SBD", dynamic_ncols=True):
        path = sbd / "cls" / f"{name}.mat"
        try:
            label = Image.fromarray(loadmat(path)["GTcls"][0]["Segmentation"][0].astype(np.uint8))
        except Exception as error:  # whatever loadmat meets in a damaged file
            raise InputError(f"{path}: is not one of SBD's label files ({error})") from None
        label.putpalette(np.array(classes.bit_colours(256), np.uint8).tobytes())
        label.save(voc / "SegmentationClassAug" / f"{name}.png")
    (listed / "aug.txt").write_text("".join(f"{name}\n" for name in names))
    print(f"{listed / 'aug.txt'}: {len(names)} images beside VOC's own {len(known)} (SBD adds 9,118 in all)")


def main():
    parser = Parser(__doc__, prog="data.py")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("check", help="read every image and label of a data set")
    command.add_argument("--dataset", choices=PRESETS, default="folder")
    command.add_argument("--data-root", help="default: data/DATASET")
    command.add_argument("--split", help="default: train and val")
    command.add_argument("--workers", type=whole_number, default=2, help="processes that read (default: 2)")
    command.set_defaults(call=check)
    command = commands.add_parser("voc-aug", help="turn SBD's labels into VOC's form")
    command.add_argument("sbd", help="SBD's folder, the one that holds cls/ or dataset/")
    command.add_argument("--data-root", help="VOC's folder (default: data/voc12aug)")
    command.set_defaults(call=voc_aug)
    args = parser.parse_args()
    args.call(args)
