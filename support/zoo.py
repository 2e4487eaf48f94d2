"""From a name to a checkpoint's file; mmsegmentation's published models as checkpoints of this project."""

import hashlib
import json
import re
import sys
from pathlib import Path

import torch

from support.classes import bit_colours
from support.command import InputError
from support.files import download

BACKBONES_URL = "https://download.openmmlab.com/pretrain/third_party"
BACKBONES = {
    18: f"{BACKBONES_URL}/resnet18_v1c-b5776b93.pth",
    50: f"{BACKBONES_URL}/resnet50_v1c-2cccc1ad.pth",
    101: f"{BACKBONES_URL}/resnet101_v1c-e67eebb6.pth",
}


def published():
    """Name -> what zoo.json says of each published model."""
    return {model["name"]: model for model in json.loads(Path(__file__).with_name("zoo.json").read_text())}


def find_file(source):
    """The local file of a checkpoint: a path, also that of its folder, a URL, or the name of a published model, fetched
    into torch.hub's cache if need be. Warns if its hash is not the one in its name. Raises InputError."""
    source = str(source)
    if source in published():
        source = published()[source]["url"]
    if source.startswith(("http://", "https://")):
        path = Path(torch.hub.get_dir(), "checkpoints", source.rpartition("/")[2])
        if not path.exists():
            download(source, path)
    else:
        path = file_in_folder(Path(source))
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; it must be a file, a folder with one, a URL or a name in ZOO.md")
    digits = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if digits and not (found := hashlib.sha256(path.read_bytes()).hexdigest()).startswith(digits[1]):
        print(f"warning: {path}: its SHA-256 begins with {found[:8]}, not as its name says", file=sys.stderr)
    return path


def file_in_folder(path):
    """The checkpoint in a folder: an exported model, else a run's best.pt, else its last.pt; else the path itself."""
    files = (path / "model.safetensors", path / "best.pt", path / "last.pt")
    return next((file for file in files if file.is_file()), path)


def newest_checkpoint():
    """Prints and returns the checkpoint of the newest run in runs/*/ and runs/*/*/. Raises InputError without a run."""
    found = [path for pattern in ("*/*.pt", "*/*/*.pt") for path in Path("runs").glob(pattern)]
    if not found:
        raise InputError("runs/: holds no run yet; name a checkpoint, or train one with: python train.py")
    newest = file_in_folder(max(found, key=lambda path: path.stat().st_mtime).parent)
    print(f"checkpoint: {newest}")
    return newest


def convert_published(state, path):
    """A published checkpoint (weights under state_dict, the rest under meta) as one of this project: {"model": weights,
    "config": dict of the Settings that are known}. Raises InputError if it is none of the models here."""
    weights, meta = state["state_dict"], state.get("meta") or {}
    heads = {"gc_block": "gcnet", "nl_block": "nonlocal_net", "fusion": "ann", "convs": "fcn"}
    parts = {key.split(".")[1] for key in weights if key.startswith("decode_head.")}
    model = next((heads[part] for part in heads if part in parts), None)
    if model is None or "conv_seg" not in parts:
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
    classes = len(weights["decode_head.conv_seg.weight"])
    names = meta.get("CLASSES") or meta.get("dataset_meta", {}).get("classes") or ()
    palette = meta.get("PALETTE") or meta.get("dataset_meta", {}).get("palette") or bit_colours(classes)
    if len(names) != classes:
        raise InputError(f"{path}: has weights for {classes} classes, but its meta names others: {str(names)[:60]}")
    return {
        "model": weights,
        "config": {
            "model": model,
            "depth": depth,
            "align_corners": "align_corners=True" in text,
            "dataset": {"Cityscapes": "cityscapes", "ADE20K": "ade20k", "PascalVOC": "voc12aug"}[dataset[1]],
            "scale": [int(side) for side in scales[-1]],
            "crop_size": crop and [int(side) for side in crop.groups()[:2]],
            "stride": slide and [int(side) for side in slide.groups()[2:]],
            "classes": [name.strip() for name in names],
            "palette": [list(colour) for colour in palette],
        },
    }
