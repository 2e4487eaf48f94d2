"""What README says is true: its lines of Python run as they stand, for every model; its line counts."""

import re

import pytest
import torch
from conftest import ROOT

import checkpoint
from evaluate import whole_inference

README = (ROOT / "README.md").read_text()
EXPORT, ONNX = re.search(r"```python\n(.*?)(torch\.onnx\..*?)```", README, re.S).groups()


def save_model(path, name):
    config = {"model": name, "depth": 18, "align_corners": False, "dataset": "folder", "data_root": None}
    config |= {"scale": None, "crop_size": [32, 32], "stride": None, "classes": ["a", "b", "c"], "palette": [[0, 0, 0]]}
    torch.manual_seed(0)
    model = checkpoint.build_model(config)
    checkpoint.save({"model": model.state_dict(), "config": config}, path)
    return model.eval()


@pytest.mark.parametrize("name", checkpoint.MODELS)
@torch.no_grad()
def test_export_with_free_height_and_width(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    model = save_model(tmp_path / "runs/best.pt", name)
    names = {}
    exec(EXPORT.replace("runs/gcnet-r18-shapes/best.pt", "runs/best.pt"), names)
    sizes = [torch.randn(1, 3, *size) for size in ((64, 64), (40, 100), (97, 33))]
    for images in sizes:
        torch.testing.assert_close(names["program"].module()(images), whole_inference(model, images))
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError:
        return
    exec(ONNX, names)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for images in sizes:
        (logits,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.tensor(logits), model(images), rtol=1e-4, atol=1e-4)


def test_line_counts():
    counts = re.findall(r"\]\((\w+\.py)\) \((\d+)", README)
    assert len(counts) >= 6
    for file, count in counts:
        assert len((ROOT / file).read_text().splitlines()) == int(count), file
