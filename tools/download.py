"""Fetches a data set, and leaves what train.py reads.

    python -m tools.download ade20k        # into data/ade20k; another folder: --data-root DIR
    python -m tools.download voc12aug      # VOC 2012, and SBD's labels in VOC's form; needs scipy
    python -m tools.download cityscapes    # says how: it needs an account

After an interruption the same command fetches what is missing. It also takes an archive that was put into the folder by
hand, and adds SBD's labels to a VOC 2012 that is there.
"""

import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.sbd import SBDataset
from torchvision.datasets.utils import check_integrity, extract_archive
from torchvision.datasets.voc import DATASET_YEAR_DICT
from tqdm import tqdm

from support.classes import bit_colours
from support.command import BAR, InputError, Parser, run_command
from support.files import download, write_file

ADE20K_URL = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
CITYSCAPES = """Cityscapes needs an account: https://www.cityscapes-dataset.com/register
pip install cityscapesscripts
csDownload -d {root} leftImg8bit_trainvaltest.zip gtFine_trainvaltest.zip    # asks for the account
unzip -q '{root}/*.zip' -d {root}                                            # {root}/leftImg8bit, {root}/gtFine"""


def prepare_folder(folder, made, gigabytes):
    """Makes a folder, and removes what an interrupted command left in it. Raises InputError if what is to be `made`
    exists, or if the disk has less space than that for the archives and what is in them."""
    if made.exists():
        raise InputError(f"{made}: already exists, there is nothing to fetch; delete it to have it made again")
    folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.glob(".partial-*"):
        shutil.rmtree(partial)
    free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in folder.glob("*.*") if path.is_file())
    if free < gigabytes * 1e9:
        raise InputError(f"{folder}: has {free / 1e9:.1f} GB of space, not {gigabytes}; name another --data-root")


def fetch(url, folder, md5=None):
    """The path of a URL's archive in a folder, downloaded if it is not there. Raises InputError if it is not whole: not
    of this MD5 or, without one, not a zip file of the right checksums."""
    path = folder / url.rpartition("/")[2]
    if not path.exists():
        download(url, path)
    print(f"checking {path}", flush=True)
    try:
        whole = check_integrity(path, md5) if md5 else zipfile.ZipFile(path).testzip() is None
    except Exception:  # a damaged archive can meet any of them
        whole = False
    if not whole:
        raise InputError(f"{path}: is damaged, or not the published archive; delete it, and repeat the command")
    return path


def extract(archive, name, target):
    """Extracts an archive, and moves the folder `name` in it to `target`, which so appears when it is whole."""
    print(f"extracting {archive}", flush=True)
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".partial-") as folder:
        extract_archive(archive, folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(Path(folder, name), target)


def ade20k(root):
    data = root if (root / "images").is_dir() else root / "ADEChallengeData2016"
    prepare_folder(root, data, gigabytes=2)
    archive = fetch(ADE20K_URL, root)
    extract(archive, "ADEChallengeData2016", data)
    archive.unlink()


def voc12aug(root):
    try:
        from scipy.io import loadmat
    except ImportError:
        raise InputError("SBD's labels are read with scipy: pip install scipy") from None
    folders = (root, root / "VOCdevkit/VOC2012", root / "VOC2012")
    voc = next((folder for folder in folders if (folder / "JPEGImages").is_dir()), folders[1])
    listed = voc / "ImageSets/Segmentation/aug.txt"
    labels = voc / "SegmentationClassAug"
    has_images, has_labels = (voc / "JPEGImages").is_dir(), labels.is_dir()
    prepare_folder(root, listed, gigabytes=4 * (not has_images) + 4 * (not has_labels))
    if not has_images:
        about = DATASET_YEAR_DICT["2012"]
        archive = fetch(about["url"], root, about["md5"])
        extract(archive, "VOCdevkit/VOC2012", voc)
        archive.unlink()
    if not has_labels:
        archive = fetch(SBDataset.url, root, SBDataset.md5)
        with tempfile.TemporaryDirectory(dir=root, prefix=".partial-") as folder:
            extract(archive, "benchmark_RELEASE/dataset/cls", Path(folder, "cls"))
            made = Path(folder, "SegmentationClassAug")
            made.mkdir()
            for path in tqdm(sorted(Path(folder, "cls").glob("*.mat")), "SBD's labels", **BAR):
                label = Image.fromarray(loadmat(path)["GTcls"][0]["Segmentation"][0])  # uint8 (H, W)
                label.putpalette(np.array(bit_colours(256), np.uint8).tobytes())
                label.save(made / f"{path.stem}.png")
            os.replace(made, labels)
        archive.unlink()
    names = "".join(f"{path.stem}\n" for path in sorted(labels.glob("*.png")))
    write_file(listed, lambda file: file.write(names.encode()))


def main():
    parser = Parser(__doc__)
    parser.add_argument("dataset", choices=("ade20k", "voc12aug", "cityscapes"))
    parser.add_argument("--data-root", help="where it goes (default: data/DATASET)")
    args = parser.parse_args()
    root = Path(os.path.expanduser(args.data_root or f"data/{args.dataset}"))
    if args.dataset == "cityscapes":
        print(CITYSCAPES.format(root=root))
        return
    {"ade20k": ade20k, "voc12aug": voc12aug}[args.dataset](root)
    print(f"next: python train.py --dataset {args.dataset}" + f" --data-root {root}" * bool(args.data_root))


if __name__ == "__main__":
    run_command(main)
