"""tools/export.py: what it writes is the same model, for every command here and for ONNX; damage to it is one line."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import published, save_model
from PIL import Image

import evaluate
import train
from support import checkpoint
from support.checkpoint import load_model
from support.command import InputError
from tools import attention, export, predict


@pytest.fixture
def run(tmp_path, run_inside):
    """A folder with a best.pt of ANN, two of whose weights are one, and what was exported from it."""
    pytest.importorskip("safetensors")
    (tmp_path / "run").mkdir()
    save_model(tmp_path / "run/best.pt", "ann", blocks=["gc4", "res4"], data_root="/private/own", stride=[16, 24])
    assert "run/export/: model.safetensors, config.json (" in run_inside(export, "run/best.pt")
    return tmp_path / "run"


def test_what_is_exported_is_the_model(run):
    model, settings = load_model(run / "best.pt")
    for source in (run / "export", run / "export/model.safetensors", run):
        same, again = load_model(source)
        for name in export.KEPT:
            assert getattr(again, name) == getattr(settings, name), name
        for (name, value), (own, expected) in zip(same.state_dict().items(), model.state_dict().items(), strict=True):
            assert name == own and value.equal(expected) and value.dtype == expected.dtype
    config = json.loads((run / "export/config.json").read_text())
    assert config["mean"] == [123.675, 116.28, 103.53] and config["blocks"] == ["gc4", "res4"]
    assert "private" not in (run / "export/config.json").read_text()  # where its data set lay
    assert sorted(path.name for path in (run / "export").iterdir()) == ["config.json", "model.safetensors"]


def test_every_command_takes_the_folder(run, folder, run_inside, capsys):
    data = ("--data-root", folder, "--workers", 0)
    expected = run_inside(evaluate, run / "best.pt", *data)
    assert "mIoU" in expected
    assert run_inside(evaluate, run / "export", *data) == run_inside(evaluate, run, *data) == expected
    Image.new("RGB", (40, 30), (200, 100, 50)).save(folder / "photo.png")
    photo = folder / "photo.png"
    assert "1 images" in run_inside(predict, photo, "--checkpoint", run / "export")
    assert "1 images" in run_inside(attention, run / "export", run, "--images", photo)
    checkpoint.start_from_checkpoint(load_model(run)[0], run / "export")
    assert f"--init {run}/export: loaded all weights\n" in capsys.readouterr().out
    run_inside(export, "run/export", "--out", "again")
    for name in ("model.safetensors", "config.json"):
        assert Path("again", name).read_bytes() == (run / "export" / name).read_bytes()


def test_nothing_is_overwritten_without_overwrite(run, run_inside, tmp_path):
    exported = run / "export"
    before = (exported / "config.json").read_bytes()
    refused = run_inside(export, run, fails=True)
    assert refused == f"{exported}/model.safetensors: already exists; --overwrite replaces it"
    (exported / "model.safetensors").unlink()
    assert run_inside(export, run, fails=True).startswith(f"{exported}/config.json: already exists")
    assert (exported / "config.json").read_bytes() == before and len(list(exported.iterdir())) == 1
    (exported / "model.onnx").write_bytes(b"of another model")
    save_model(tmp_path / "run/best.pt", "fcn")
    run_inside(export, run, "--overwrite")
    assert load_model(exported)[1].model == "fcn" and not (exported / "model.onnx").exists()


def test_a_published_model_goes_to_the_folder_export(tmp_path, run_inside, monkeypatch):
    pytest.importorskip("safetensors")
    file = published(classes=2)
    torch.save(file, tmp_path / "a.pth")
    monkeypatch.setattr("support.zoo.published", lambda: {"gcnet_r50": {"url": "https://somewhere/a.pth"}})
    monkeypatch.setattr("support.zoo.download", lambda url, path: shutil.copy(tmp_path / "a.pth", path))
    monkeypatch.setattr("torch.hub.get_dir", lambda: tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for source, out in (("gcnet_r50", "export"), ("https://somewhere/a.pth", "other")):
        assert f"{out}/: model.safetensors" in run_inside(export, source, *(["--out", out] if out == "other" else []))
        model, settings = load_model(out)
        assert model.state_dict().keys() == file["state_dict"].keys() and settings.dataset == "cityscapes"


@pytest.mark.parametrize("arguments, package", [([], "safetensors"), (["--onnx"], "onnxruntime")])
def test_a_missing_package_is_named(arguments, package, tmp_path, run_inside, monkeypatch):
    for name in (package, f"{package}.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in {"safetensors", "onnx", "onnxscript"} - {package}:
        monkeypatch.setitem(sys.modules, name, sys)
    save_model(tmp_path / "model.pt", "fcn")
    message = run_inside(export, "model.pt", *arguments, fails=True)
    assert message.startswith(f"{package}: not installed; pip install safetensors") and message.endswith(package)
    assert not (tmp_path / "export").exists()
    if package == "safetensors":
        (tmp_path / "model.safetensors").touch()
        assert "model.safetensors: is read with a package" in run_inside(evaluate, "model.safetensors", fails=True)


def refused(source):
    """The line with which a checkpoint is refused."""
    with pytest.raises(InputError) as raised:
        load_model(source)
    return str(raised.value)


def test_damage_to_what_was_exported(run):
    path, config = run / "export/model.safetensors", run / "export/config.json"
    whole, described = path.read_bytes(), config.read_text()
    for damaged in (whole[:-1000] + bytes([whole[-1000] ^ 1]) + whole[-999:], whole[:-1]):
        path.write_bytes(damaged)
        assert refused(run / "export").startswith(f"{path}: is damaged, or is not the file that {config} describes")
    path.write_bytes(whole)
    config.write_text(described[:-9])
    assert refused(path).startswith(f"{path}: cannot be read as a checkpoint (JSONDecodeError")
    config.unlink()
    assert refused(run / "export").startswith(f"{path}: cannot be read as a checkpoint (FileNotFoundError: ")


def test_a_folder_without_a_checkpoint(tmp_path):
    assert refused(tmp_path).startswith(f"{tmp_path}: no such checkpoint; it must be a file")


# ---------------------------------------------------------------------------------------------------------------- ONNX


def test_pooling_by_matrices_is_adaptive_pooling():
    for height in (1, 2, 3, 5, 6, 7, 8, 9, 12, 13, 24, 65, 97):
        for width in (1, 7, 64):
            x = torch.randn(2, 3, height, width)
            expected = torch.cat([F.adaptive_avg_pool2d(x, n).flatten(2) for n in (1, 3, 6, 8)], 2)
            torch.testing.assert_close(export.MatrixPooling()(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ann", "nonlocal_net"])
@torch.no_grad()
def test_onnx_with_free_sizes(name, tmp_path, run_inside, recwarn):
    pytest.importorskip("safetensors")
    pytest.importorskip("onnxscript")
    runtime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    saved = torch.load(save_model(tmp_path / "model.pt", name))
    for weight in saved["model"].values():  # fresh blocks are the identity, or give zero
        if not weight.any() and weight.is_floating_point():
            weight.normal_(std=0.3)
    for key in [key for key in saved["model"] if key.endswith("running_var")]:
        saved["model"][key].abs_().add_(0.5)
    saved["config"]["align_corners"] = name == "ann"
    torch.save(saved, tmp_path / "model.pt")
    printed = run_inside(export, "model.pt", "--onnx")
    assert "differ from torch's by" in printed and not list(recwarn)

    content = (tmp_path / "export/model.onnx").read_bytes()
    onnx.checker.check_model(content, full_check=True)
    assert str(export.__file__).encode() not in content and str(Path(train.__file__).parent).encode() not in content
    model = load_model(tmp_path / "export")[0].eval()
    session = runtime.InferenceSession(content)
    for shape in ((2, 3, 33, 120), (1, 3, 8, 9), (1, 3, 1, 1)):
        images = torch.randn(shape)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-3, atol=1e-4)
    model.decode_head.conv_seg.bias += 1
    with pytest.raises(InputError, match="model.onnx was not written"):
        export.compare_with_torch(content, model)


@pytest.mark.slow
@pytest.mark.parametrize("block", ["nl-gaussian", "nl-dot-product", "nl-concatenation", "snl", "gc16-avg-mul"])
def test_onnx_of_each_kind_of_block(block, tmp_path, run_inside):
    for package in ("safetensors", "onnxscript", "onnxruntime", "onnx"):
        pytest.importorskip(package)
    saved = torch.load(save_model(tmp_path / "model.pt", "fcn", blocks=[block, "res4"]))
    for name, weight in saved["model"].items():  # else blocks that begin as the identity would show nothing
        if "context_block" in name and not weight.any() and weight.is_floating_point():
            weight.normal_(std=0.3)
    torch.save(saved, tmp_path / "model.pt")
    assert "differ from torch's by" in run_inside(export, "model.pt", "--onnx")
