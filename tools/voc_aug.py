"""Turns SBD's labels into the form of VOC's: SegmentationClassAug/*.png, and aug.txt beside train.txt and val.txt.

    python -m tools.voc_aug SBD --data-root VOCdevkit/VOC2012

SBD is the folder that holds cls/ or dataset/. Needs scipy, which reads SBD's .mat files.
"""

import numpy as np
from PIL import Image
from tqdm import tqdm

from support.classes import bit_colours
from support.command import InputError, Parser, run_command
from support.layouts import find_root, read_lines
from support.pictures import save_png


def convert(loadmat, path, out):
    """Writes the label map of one of SBD's .mat files as a PNG with VOC's palette. Raises InputError if it has none."""
    try:
        values = loadmat(path)["GTcls"][0]["Segmentation"][0]
        if values.ndim != 2 or not ((values >= 0) & (values <= 255)).all():
            raise ValueError(f"labels of shape {values.shape}, {values.min()} to {values.max()}")
        label = Image.fromarray(values.astype(np.uint8))
    except Exception as error:  # whatever loadmat meets in a damaged file
        raise InputError(f"{path}: is not one of SBD's label files ({error})") from None
    label.putpalette(np.array(bit_colours(256), np.uint8).tobytes())
    save_png(label, out)


def main():
    parser = Parser(__doc__)
    parser.add_argument("sbd", help="SBD's folder, the one that holds cls/ or dataset/")
    parser.add_argument("--data-root", help="VOC's folder (default: data/voc12aug)")
    args = parser.parse_args()
    try:
        from scipy.io import loadmat
    except ImportError:
        raise InputError("SBD's files need scipy: pip install scipy") from None
    voc = find_root(args.data_root, "voc12aug", "JPEGImages", ("VOCdevkit/VOC2012", "VOC2012"))
    sbd = find_root(args.sbd, "SBD", "cls", ("dataset", "benchmark_RELEASE/dataset"))
    if not any((sbd / "cls").glob("*.mat")):
        raise InputError(f"{sbd / 'cls'}: holds none of SBD's .mat files")
    lists = voc / "ImageSets" / "Segmentation"
    known = {*read_lines(lists / "train.txt"), *read_lines(lists / "val.txt")} - {""}
    names = sorted({path.stem for path in (sbd / "cls").glob("*.mat")} - known)
    listed = lists / "aug.txt"
    if listed.exists() and read_lines(listed) != names:
        raise InputError(f"{listed}: is there already, with other names; move it away to make it anew")
    (voc / "SegmentationClassAug").mkdir(exist_ok=True)
    for name in tqdm(names, "SBD", dynamic_ncols=True):
        convert(loadmat, sbd / "cls" / f"{name}.mat", voc / "SegmentationClassAug" / f"{name}.png")
    listed.write_text("".join(f"{name}\n" for name in names))
    print(f"{listed}: {len(names)} images beside VOC's own {len(known)} (SBD adds 9,118 in all)")


if __name__ == "__main__":
    run_command(main)
