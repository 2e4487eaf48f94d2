"""Files of the published form: settings read from them, fetched over HTTP, fine-tuned, refused in one line."""

import hashlib

import pytest
import reference
import torch
from conftest import ROOT, SLIDE, published, train_arguments
from PIL import Image

import evaluate
import train
from resnet_d8 import FCN
from support import checkpoint, zoo
from support.command import InputError


def test_every_published_name():
    models = zoo.published()
    assert len(models) == 48
    zoo_page = (ROOT / "ZOO.md").read_text().splitlines()
    for name, model in models.items():
        assert model["url"].startswith("https://") and f"/{name}/{name}_" in model["url"]
        row = next(line for line in zoo_page if line.startswith(f"| {name} |"))
        assert f"[log]({model['url'][: -len('-01234567.pth')]}.log.json)" in row


@pytest.mark.parametrize("legacy", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["zip", "legacy"])
def test_settings_come_from_the_file(legacy, tmp_path):
    for name, changes, expected in (
        ("gcnet", {}, ("cityscapes", [2048, 1024], None, None, False)),
        ("ann", {"dataset": "PascalVOC", "scale": (2048, 512)}, ("voc12aug", [2048, 512], None, None, False)),
        ("nonlocal_net", {"dataset": "ADE20K", "scale": (2048, 512)}, ("ade20k", [2048, 512], None, None, False)),
        (
            "fcn",
            {"scale": (2049, 1025), "align": True, "test": SLIDE},
            ("cityscapes", [2049, 1025], [769, 769], [513, 513], True),
        ),
    ):
        path = tmp_path / "renamed.pth"
        file = published(name, **changes)
        torch.save(file, path, _use_new_zipfile_serialization=not legacy)
        state = checkpoint.read_checkpoint(path)
        settings = state["settings"]
        assert (settings.model, settings.depth) == (name, 18)
        keys = ("dataset", "scale", "crop_size", "stride", "align_corners")
        assert tuple(getattr(settings, key) for key in keys) == expected
        assert settings.classes == list(file["meta"]["CLASSES"]) and settings.palette == file["meta"]["PALETTE"]
        model = checkpoint.build_model(settings)
        checkpoint.load_weights(model, state["model"], path)
        assert all(value.equal(file["state_dict"][key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_depth_follows_from_the_names(depth):
    with torch.device("meta"):
        assert zoo.convert_published(published(depth=depth), "x")["config"]["depth"] == depth


def test_a_file_is_fetched_once_and_compared_with_its_hash(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    content = b"the published file"
    fetched = []
    monkeypatch.setattr(zoo, "download", lambda url, path: (fetched.append(url), path.write_bytes(content)))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    url = f"http://localhost/gcnet-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    path = zoo.find_file(url)
    assert path.read_bytes() == content and zoo.find_file(url) == path and fetched == [url]
    assert "warning" not in capsys.readouterr().err
    path.write_bytes(b"damaged since")
    zoo.find_file(url)
    assert f"{path.name}: its SHA-256 begins with" in capsys.readouterr().err


def test_commands_take_published_files(run_inside, tmp_path):
    classes = 3
    file = published("ann", classes=classes, dataset="ADE20K", scale=(64, 48))
    torch.save(file, tmp_path / "model.pth")
    folder = tmp_path / "own"
    for split in ("train", "val"):
        for i in range(2):
            for kind, colour in (("images", (90, 60, 30)), ("annotations", None)):
                path = folder / kind / split / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                (Image.new("RGB", (48, 40), colour) if colour else Image.new("L", (48, 40), i)).save(path)
    (folder / "classes.txt").write_text("class 0\nclass 1\nclass 2\n")
    data = ("--dataset", "folder", "--data-root", folder)
    assert "mIoU" in run_inside(evaluate, "model.pth", *data, "--workers", 0)

    small = ("--depth", 18, "--crop-size", 32, 32, "--batch-size", 2, "--iters", 1, "--workers", 0, "--lr", 1e-6)
    same = run_inside(train, "--model", "ann", *data, *small, "--init", "model.pth", "--out", "same")
    assert "model.pth: loaded all weights\n" in same
    (folder / "classes.txt").write_text("class 0\nclass 1\nclass 2\nfourth\n")
    anew = run_inside(train, "--model", "ann", *data, *small, "--init", "model.pth", "--out", "anew")
    assert "all weights; not its classifiers, which have another number" in anew
    for name, kept in (("same", True), ("anew", False)):
        weights = torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
        key = "decode_head.fusion.stages.0.value_project.weight"
        torch.testing.assert_close(weights[key], file["state_dict"][key], rtol=1e-4, atol=1e-5)
        assert (weights["decode_head.conv_seg.weight"].shape[0] == classes) == kept
    wrong = ("--model", "gcnet", *data, *small, "--init", "model.pth", "--out", "no")
    assert "model.pth: does not fit the model" in run_inside(train, *wrong, fails=True)
    other = run_inside(evaluate, "model.pth", *data, fails=True)
    assert "its 4 classes are not the 3 of model.pth: they differ in fourth" in other
    (folder / "classes.txt").write_text("class 0\nclass 2\nclass 1\n")  # as many, but not the same
    other = run_inside(evaluate, "model.pth", *data, fails=True)
    assert "its 3 classes are not the 3 of model.pth: they differ in their order" in other


class HistoryBuffer:
    pass


def test_published_figures_stand_below_the_measured_ones(folder, run_inside, tmp_path, monkeypatch):
    file = published("ann", classes=3, dataset="ADE20K", scale=(64, 48))
    file["meta"]["CLASSES"] = (folder / "classes.txt").read_text().split()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(file, tmp_path / "hub/checkpoints/ann.pth")
    for figure, shown in ((41.01, "41.01"), (None, "not published")):
        models = {"ann_r18": {"url": "http://localhost/ann.pth", "mIoU": 40.5, "mIoU_ms_flip": figure}}
        monkeypatch.setattr(zoo, "published", lambda models=models: models)
        monkeypatch.setattr(evaluate, "published", zoo.published)
        data = ("--dataset", "folder", "--data-root", folder, "--workers", 0)
        last = run_inside(evaluate, "ann_r18", *data).splitlines()[-1]
        assert last == f"published, on val: mIoU 40.5, with --aug {shown}"


def test_files_that_are_refused_say_why(tmp_path):
    good = published()
    for name, state, words in (
        ("objects", good | {"message_hub": HistoryBuffer()}, "HistoryBuffer, which could run code.*remove it"),
        ("text", good | {"meta": {**good["meta"], "config": ""}}, "holds no config"),
        ("names", good | {"meta": {**good["meta"], "CLASSES": ("one",)}}, "19 classes, but its meta names others"),
        ("other", {"state_dict": {"conv.weight": torch.ones(1)}, "meta": {}}, "none of the models"),
    ):
        torch.save(state, tmp_path / name)
        with pytest.raises(InputError, match=words):
            checkpoint.read_checkpoint(tmp_path / name)
    torch.save(good, tmp_path / "cut")
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:100_000])
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        checkpoint.read_checkpoint(tmp_path / "cut")
    with pytest.raises(InputError, match="no such checkpoint; it must be a file"):
        checkpoint.read_checkpoint("gcnet_r50-d8_512x512_80k_ade")


def test_imagenet_backbone(tmp_path, monkeypatch):
    """ResNet-v1c files hold the classifier fc.* too; anything else must fit exactly."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    shapes = {name: shape for name, shape in reference.keys("fcn", 18).items() if name.startswith("backbone.")}
    weights = {
        name[len("backbone.") :]: torch.full(shape, 0.5) if shape else torch.tensor(0) for name, shape in shapes.items()
    }
    asked = []
    file = weights | {"fc.weight": torch.ones(1000, 512), "fc.bias": torch.ones(1000)}
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    monkeypatch.setattr(zoo, "download", lambda url, path: (asked.append(url), torch.save(file, path)))
    model = FCN(4, 18)
    checkpoint.start_from_imagenet(model, "imagenet", 18)
    assert all((parameter == 0.5).all() for parameter in model.backbone.parameters())
    assert asked == ["https://download.openmmlab.com/pretrain/third_party/resnet18_v1c-b5776b93.pth"]
    with pytest.raises(InputError, match="--pretrained imagenet: there are such weights for depth 18, 50 and 101, not"):
        checkpoint.start_from_imagenet(model, "imagenet", 34)
    torch.save({"stem.0.weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="other.pth: does not fit"):
        checkpoint.start_from_imagenet(model, tmp_path / "other.pth", 18)


def test_without_network_the_way_on_is_named(folder, run_inside, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing answers there
    for depth, file in ((18, "resnet18_v1c-b5776b93.pth"), (50, "resnet50_v1c-2cccc1ad.pth")):
        arguments = train_arguments(folder, "run", 1, workers=0, weights=("--depth", depth))[1:]
        message = run_inside(train, *arguments, fails=True)
        assert "--pretrained none" in message and file in message and str(tmp_path) in message
    assert "cannot be fetched" in run_inside(evaluate, "gcnet_r50-d8_512x512_80k_ade20k", fails=True)
