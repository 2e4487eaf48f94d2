"""Writes a model for other programs: its weights in safetensors, without the momentum that best.pt also holds.

    python -m tools.export                                         # the newest run, into RUN/export
    python -m tools.export gcnet_r50-d8_512x512_80k_ade20k --onnx  # a published model, into export; in ONNX as well

DIR/model.safetensors   the weights, under the published parameter names: mmsegmentation's own models load them
DIR/config.json         what builds and evaluates the model; every command here takes DIR as a checkpoint
DIR/model.onnx          from `images` to `logits`, float32 (N, 3, H, W) to (N, K, H, W), of any N, H and W

Images are RGB in 0..255, minus the mean and divided by the std in config.json. Needs safetensors; --onnx also needs
onnx, onnxscript and onnxruntime.
"""

import copy
import hashlib
import importlib.util
import json
import warnings
from pathlib import Path

import torch
from torch import nn

from ann import PyramidPooling
from support.checkpoint import load_model
from support.command import InputError, Parser, run_command
from support.files import refuse_existing, write_file
from support.images import MEAN, STD
from support.zoo import file_in_folder, newest_checkpoint

# The settings in config.json, which build and evaluate the model; not data_root, which is a folder of this machine.
KEPT = ("model", "depth", "align_corners", "blocks", "cityscapes_ablation", "classes", "palette")
KEPT += ("dataset", "scale", "crop_size", "stride")


class MatrixPooling(nn.Module):
    """PyramidPooling as two matrix products: torch translates adaptive pooling to ONNX for a fixed size only."""

    def forward(self, x):  # (N, C, H, W)
        means = cells(x.shape[2]) @ x @ cells(x.shape[3]).T  # (N, C, 18, 18)
        grids = [means[:, :, start : start + n, start : start + n] for start, n in ((0, 1), (1, 3), (4, 6), (10, 8))]
        return torch.cat([grid.flatten(2) for grid in grids], 2)  # (N, C, 110)


def cells(side):
    """float32 (18, side): the means over each cell of a side that is divided in 1, 3, 6 and 8, as a matrix. Cell i of n
    goes from i side / n to (i + 1) side / n, and takes all of each pixel p that it touches, from p to p + 1."""
    i, n = torch.tensor([(i, n) for n in (1, 3, 6, 8) for i in range(n)]).T[..., None]  # (18, 1) each
    p = torch.arange(side)
    touched = ((p + 1) * n > i * side) & (p * n < (i + 1) * side)
    return touched / touched.sum(1, keepdim=True)


def to_onnx(model):
    """A Segmentor in eval mode as the content of an ONNX file."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, PyramidPooling):
            model.set_submodule(name, MatrixPooling())
    images = torch.zeros(2, 3, 64, 96)
    free = {"images": {0: "N", 2: "H", 3: "W"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (images,), dynamic_shapes=free, output_names=["logits"], verbose=False)
    file = program.model_proto
    for node in file.graph.node:
        node.ClearField("metadata_props")  # among them the paths of this program's files on this disk
    return file.SerializeToString()


@torch.no_grad()
def compare_with_torch(content, model):
    """Prints how far onnxruntime's logits of an ONNX file are from the model's. Raises InputError if it is too far."""
    from onnxruntime import InferenceSession

    images = torch.randn(3, 3, 75, 110, generator=torch.Generator().manual_seed(0))  # not of the size above
    expected = model(images)
    (logits,) = InferenceSession(content).run(["logits"], {"images": images.numpy()})
    difference = (torch.from_numpy(logits) - expected).abs().max().item()
    if not difference <= 1e-3 * max(expected.abs().max().item(), 1):
        raise InputError(f"--onnx: its logits differ from torch's by {difference:.1e}; model.onnx was not written")
    print(f"model.onnx: its logits differ from torch's by {difference:.1e} at most")


def main():
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", nargs="?", help="file, folder, URL or published name (default: newest in runs/)")
    text = "the folder to write to (default: export, beside a local checkpoint)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=text)
    parser.add_argument("--onnx", action="store_true", help="write model.onnx, too")
    parser.add_overwrite()
    args = parser.parse_args()
    needed = ["safetensors"] + ["onnx", "onnxscript", "onnxruntime"] * args.onnx
    if missing := [name for name in needed if not importlib.util.find_spec(name)]:
        raise InputError(f"{', '.join(missing)}: not installed; pip install {' '.join(needed)}")
    from safetensors.torch import save

    source = args.checkpoint or newest_checkpoint()
    local = file_in_folder(Path(source))
    out = args.out or (local.parent / "export" if local.is_file() else Path("export"))
    onnx = out / "model.onnx"
    refuse_existing([out / "model.safetensors", out / "config.json", onnx], args.overwrite)
    model, settings = load_model(source)
    model.eval()
    weights = save({name: value.clone() for name, value in model.state_dict().items()})  # ANN shares some
    config = {name: getattr(settings, name) for name in KEPT}
    config |= {"mean": MEAN, "std": STD, "sha256": hashlib.sha256(weights).hexdigest()}
    files = {"model.safetensors": weights, "config.json": json.dumps(config, indent=1).encode() + b"\n"}
    if args.onnx:
        files["model.onnx"] = to_onnx(model)
        compare_with_torch(files["model.onnx"], model)
    out.mkdir(parents=True, exist_ok=True)
    onnx.unlink(missing_ok=True)  # without --onnx it would stay, and be another model's
    for name, content in files.items():
        write_file(out / name, lambda file, content=content: file.write(content))
    print(f"{out}/: {', '.join(files)} ({sum(map(len, files.values())) / 1e6:.0f} MB)")


if __name__ == "__main__":
    run_command(main)
