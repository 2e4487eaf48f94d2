"""Turns SBD's labels into the form of VOC's: SegmentationClassAug/*.png, and aug.txt beside train.txt and val.txt.

    python -m tools.voc_aug SBD --data-root VOCdevkit/VOC2012

SBD is the folder that holds cls/ or dataset/. Needs scipy, which reads SBD's .mat files.
"""

import numpy as np
from PIL import Image
from tqdm import tqdm

from support.classes import bit_colours
from support.command import InputError, Parser, run_command
from support.files import refuse_existing, write_file
from support.layouts import find_root, read_lines
from support.pictures import save_png


def convert(loadmat, path, out):
    """Writes the label map of one of SBD's .mat files as a PNG with VOC's palette. Raises InputError if it has none."""
    try:
        label = Image.fromarray(loadmat(path)["GTcls"][0]["Segmentation"][0])  # uint8 (H, W)
    except Exception as error:  # a damaged file can meet any of them
        raise InputError(f"{path}: is not one of SBD's label files ({error})") from None
    label.putpalette(np.array(bit_colours(256), np.uint8).tobytes())
    save_png(label, out)


def main():
    parser = Parser(__doc__)
    parser.add_argument("sbd", help="SBD's folder, the one that holds cls/ or dataset/")
    parser.add_argument("--data-root", help="VOC's folder (default: data/voc12aug)")
    parser.add_overwrite()
    args = parser.parse_args()
    try:
        from scipy.io import loadmat
    except ImportError:
        raise InputError("SBD's files need scipy: pip install scipy") from None
    voc = find_root(args.data_root, "voc12aug", "JPEGImages", ("VOCdevkit/VOC2012", "VOC2012"))
    sbd = find_root(args.sbd, "SBD", "cls", ("dataset", "benchmark_RELEASE/dataset"))
    files = sorted((sbd / "cls").glob("*.mat"))
    if not files:
        raise InputError(f"{sbd / 'cls'}: holds none of SBD's .mat files")
    lists = voc / "ImageSets" / "Segmentation"
    known = {*read_lines(lists / "train.txt"), *read_lines(lists / "val.txt")} - {""}
    labels = {path: voc / "SegmentationClassAug" / f"{path.stem}.png" for path in files if path.stem not in known}
    listed = lists / "aug.txt"
    refuse_existing([listed, *labels.values()], args.overwrite)
    for path, label in tqdm(labels.items(), "SBD", dynamic_ncols=True):
        convert(loadmat, path, label)
    write_file(listed, lambda file: file.write("".join(f"{path.stem}\n" for path in labels).encode()))
    print(f"{listed}: {len(labels)} images beside VOC's own {len(known)} (SBD adds 9,118 in all)")


if __name__ == "__main__":
    run_command(main)
