"""What the README says is true: its map names every file, its commands exist, its lines of Python run as they stand."""

import importlib
import re
import sys

import pytest
import torch
from conftest import ROOT, save_model

from support.checkpoint import MODELS, load_model

README = (ROOT / "README.md").read_text()
EXPORT, ONNX = re.search(r"```python\n(.*?)(torch\.onnx\..*?)```", README, re.S).groups()


def test_readme_is_short_and_maps_every_file():
    assert len(README.splitlines()) <= 150
    files = [path.relative_to(ROOT) for place in (".", "support", "tools") for path in (ROOT / place).glob("*.py")]
    named = README.split("## What is where")[1].split("## ")[0]
    for path in files:
        if path.name != "__init__.py":
            assert re.search(rf"\b{path.stem}\b", named), path


def test_every_command_on_the_pages_exists():
    for page in ROOT.glob("*.md"):
        for tool in re.findall(r"python -m tools\.([a-z]\w*)", page.read_text()):
            assert (ROOT / "tools" / f"{tool}.py").exists(), (page, tool)
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("http") or (ROOT / link).exists(), (page, link)


@pytest.mark.parametrize("tool", sorted(path.stem for path in (ROOT / "tools").glob("[a-z]*.py")))
def test_every_tool_explains_itself(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(f"tools.{tool}").main()
    assert f"python -m tools.{tool}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", [name if name == "ann" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
@torch.no_grad()
def test_export_with_free_height_and_width(name, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    model, config = load_model(save_model(tmp_path / "runs/best.pt", name))
    model.eval()
    for weight in model.parameters():  # fresh blocks are the identity
        if not weight.any():
            weight.normal_(std=0.5)
    torch.save({"model": model.state_dict(), "config": config}, tmp_path / "runs/best.pt")
    monkeypatch.chdir(tmp_path)
    names, lines = {}, EXPORT.replace("runs/gcnet-r18-shapes/best.pt", "runs/best.pt")
    exec(lines, names)
    free = [torch.randn(1, 3, *size) for size in ((64, 96), (72, 100), (40, 33))]
    for images in free:
        torch.testing.assert_close(names["program"].module()(images), model(images))
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
