"""What README says is true: its lines of Python run as they stand, for every model; its line counts."""

import re

import pytest
import torch
from conftest import ROOT
from test_attention import save_model

from evaluate import whole_inference
from support import checkpoint

README = (ROOT / "README.md").read_text()
EXPORT, ONNX = re.search(r"```python\n(.*?)(torch\.onnx\..*?)```", README, re.S).groups()


@pytest.mark.parametrize("name", checkpoint.MODELS)
@torch.no_grad()
def test_export_with_free_height_and_width(name, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    model, config = checkpoint.load_model(save_model(tmp_path / "runs/best.pt", name))
    model.eval()
    for weight in model.parameters():  # fresh blocks are the identity
        if not weight.any():
            weight.normal_(std=0.5)
    checkpoint.save({"model": model.state_dict(), "config": config}, tmp_path / "runs/best.pt")
    monkeypatch.chdir(tmp_path)
    names, lines = {}, EXPORT.replace("runs/gcnet-r18-shapes/best.pt", "runs/best.pt")
    exec(lines, names)
    free = [torch.randn(1, 3, *size) for size in ((64, 96), (72, 100), (40, 33))]
    for images in free:
        torch.testing.assert_close(names["program"].module()(images), whole_inference(model, images))
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError:
        return
    if name == "ann":
        exec(lines.replace(", dynamic_shapes=free", ""), names)
    exec(ONNX, names)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for images in free[:1] if name == "ann" else free:
        (logits,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.tensor(logits), model(images), rtol=1e-4, atol=1e-4)


def test_line_counts():
    counts = re.findall(r"\]\((\w+\.py)\) \((\d+)", README)
    assert len(counts) >= 6
    for file, count in counts:
        assert len((ROOT / file).read_text().splitlines()) == int(count), file
