"""The published models of mmsegmentation: from a name to a file, and from a file to a checkpoint of this project.

zoo.json lists the 48 with their published figures; ZOO.md shows them as tables.
"""

import hashlib
import json
import os
import re
import sys
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

import torch
from tqdm import tqdm

from support.classes import bit_colours
from support.command import InputError
from support.files import lock_file

BACKBONES_URL = "https://download.openmmlab.com/pretrain/third_party"
BACKBONES = {
    18: f"{BACKBONES_URL}/resnet18_v1c-b5776b93.pth",
    50: f"{BACKBONES_URL}/resnet50_v1c-2cccc1ad.pth",
    101: f"{BACKBONES_URL}/resnet101_v1c-e67eebb6.pth",
}


def published():
    """Name -> what zoo.json says of each published model."""
    models = json.loads((Path(__file__).parent / "zoo.json").read_text())
    return {model["name"]: model for model in models}


def locate(source):
    """The local file of a checkpoint: a path, also that of its folder, a URL, or the name of a published model; fetched
    if need be. A fetched file that its name does not fit is fetched once more; one that still does not fit is warned
    of."""
    source = str(source)
    if source in published():
        source = published()[source]["url"]
    remote = source.startswith(("http://", "https://"))
    path = download(source) if remote else in_folder(Path(source))
    if path.is_dir():
        raise InputError(f"{path}: holds neither the model.safetensors of tools/export.py nor the best.pt of a run")
    if not path.is_file():
        raise InputError(f"{path}: there is no such file, and no published model of that name (ZOO.md lists them)")
    if remote and not fits_name(path)[0]:
        path.unlink(missing_ok=True)
        download(source)
    fits, found = fits_name(path)
    if not fits:
        print(f"warning: {path}: its SHA-256 begins with {found[:8]}, not as its name says", file=sys.stderr)
    return path


def in_folder(path):
    """The checkpoint's file in a folder: what tools/export.py wrote, or a run's best.pt; else the path itself."""
    files = (path / "model.safetensors", path / "best.pt")
    return next((file for file in files if file.is_file()), path)


def fits_name(path):
    """(whether a file's SHA-256 begins as its name says, if it does; the SHA-256)."""
    digits = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    found = hashlib.sha256(path.read_bytes()).hexdigest() if digits else ""
    return not digits or found.startswith(digits[1]), found


def download(url):
    """The file of a URL in torch.hub's cache. A transfer that was cut off goes on where it ended. Of several processes
    that want a file, one fetches it and the others wait."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path.exists():
        return path
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "ab") as file:
            lock_file(file, wait=True)
            if path.exists():
                return path
            if not (partial.exists() and os.path.samestat(os.fstat(file.fileno()), partial.stat())):
                return download(url)  # what was waited for has come, and is gone again
            fetch(url, file)
            os.replace(partial, path)
    except (OSError, HTTPException, ValueError) as error:
        raise InputError(f"{url}: cannot be fetched ({error}); or put the file here: {path}") from None
    return path


def fetch(url, file):
    """Adds to an open file what it still lacks of a URL's content."""
    done = file.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # no such range: what is here is not a beginning of the file
            file.truncate(0)
        raise
    with response:
        if response.status != 206:  # the server sends the whole file again
            done = 0
            file.truncate(0)
        total = done + int(response.headers.get("Content-Length", 0))
        with tqdm(desc=Path(file.name).stem, total=total, initial=done, unit="B", unit_scale=True) as bar:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
    if file.tell() < total:
        raise OSError("the connection ended early; the same command goes on from there")


def convert(state, path):
    """A published checkpoint (weights under state_dict, the rest under meta) as one of this project."""
    weights, meta = state["state_dict"], state.get("meta")
    if not isinstance(weights, dict) or not isinstance(meta, dict):
        raise InputError(f"{path}: its state_dict and meta are not those of a published model")
    heads = {"gc_block": "gcnet", "nl_block": "nonlocal_net", "fusion": "ann", "convs": "fcn"}
    model = next(
        (heads[part] for part in heads if any(key.startswith(f"decode_head.{part}.") for key in weights)), None
    )
    if model is None or "decode_head.conv_seg.weight" not in weights:
        raise InputError(f"{path}: holds none of the models of this project")
    stage3 = {key.split(".")[2] for key in weights if key.startswith("backbone.layer3.")}
    bottleneck = "backbone.layer3.0.conv3.weight" in weights
    depth = {(False, 2): 18, (False, 6): 34, (True, 6): 50, (True, 23): 101}.get((bottleneck, len(stage3)))

    # The settings stand in the config, which is kept as text.
    text = re.sub(r"\s|,(?=\s*\))", "", str(meta.get("config") or meta.get("cfg")))
    dataset = re.search("(Cityscapes|ADE20K|PascalVOC)Dataset", text)
    scales = re.findall(r"\b(?:img_)?scale=\((\d+),(\d+)\)", text)
    if depth is None or not dataset or not scales:
        raise InputError(f"{path}: its meta holds no config from which to read depth, data set and test scale")
    slide = re.search(r"mode='slide',crop_size=\((\d+),(\d+)\),stride=\((\d+),(\d+)\)", text)
    crop = slide or re.search(r"crop_size=\((\d+),(\d+)\)", text)
    names = meta.get("CLASSES") or meta.get("dataset_meta", {}).get("classes")
    palette = meta.get("PALETTE") or meta.get("dataset_meta", {}).get("palette")
    classes = len(weights["decode_head.conv_seg.weight"])
    if not isinstance(names, list | tuple) or len(names) != classes:
        raise InputError(f"{path}: has weights for {classes} classes, but its meta names others: {str(names)[:60]}")
    return {
        "model": weights,
        "config": {
            "model": model,
            "depth": depth,
            "align_corners": "align_corners=True" in text,
            "dataset": {"Cityscapes": "cityscapes", "ADE20K": "ade20k", "PascalVOC": "voc12aug"}[dataset[1]],
            "data_root": None,
            "scale": [int(side) for side in scales[-1]],
            "crop_size": crop and [int(side) for side in crop.groups()[:2]],
            "stride": slide and [int(side) for side in slide.groups()[2:]],
            "classes": [name.strip() for name in names],
            "palette": [list(colour) for colour in palette or bit_colours(classes)],
        },
    }
