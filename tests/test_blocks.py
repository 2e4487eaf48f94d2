"""GCNet's general framework, and blocks in the backbone, this project's and torchvision's."""

from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
import torchvision
from conftest import published, train_arguments
from torch import nn

import evaluate
import train
from gcnet import GCBlock, SimplifiedNonLocalBlock, add_blocks
from resnet_d8 import FCN, ResNetD8
from support import checkpoint
from support.command import InputError
from support.settings import BLOCKS, PLACES, Settings
from tools import predict

GOLDEN = reference.arrays("context")


def by_name(module, prefix=""):
    """The module with the reference's weights, in eval mode; and its parameters' names."""
    shapes = {key: list(value.shape) for key, value in module.state_dict().items()}
    module.load_state_dict({key: torch.tensor(reference.weight(prefix + key, shapes[key])) for key in shapes})
    return module.eval(), list(shapes)


def randomise(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval().requires_grad_(False)


@pytest.mark.parametrize("fusion", ["add", "mul"])
@pytest.mark.parametrize("pooling", ["att", "avg"])
def test_the_framework_is_the_references(pooling, fusion):
    block, names = by_name(GCBlock(32, 4, pooling, fusion))
    assert names == GOLDEN[f"{pooling}_{fusion}_names"].tolist()
    x = torch.tensor(GOLDEN["x"], requires_grad=True)
    z = block(x)
    (z**2).sum().backward()
    for ours, golden in ((z.detach(), f"{pooling}_{fusion}"), (x.grad, f"{pooling}_{fusion}_grad")):
        np.testing.assert_allclose(ours, GOLDEN[golden], rtol=1e-4, atol=1e-5)


def test_squeeze_excitation_and_snl_are_special_cases():
    torch.manual_seed(0)
    x = torch.randn(2, 16, 3, 5)
    block = randomise(GCBlock(16, 4, "avg", "mul"))
    block.channel_mul_conv[1] = nn.Identity()  # SE has no LayerNorm
    w_1, b_1, w_2, b_2 = (parameter.squeeze() for parameter in block.parameters())
    s = torch.sigmoid(torch.relu(x.mean((2, 3)) @ w_1.T + b_1) @ w_2.T + b_2)
    torch.testing.assert_close(block(x), torch.einsum("nc,nchw->nchw", s, x))

    snl, block = randomise(SimplifiedNonLocalBlock(16)), randomise(GCBlock(16))
    block.conv_mask, block.channel_add_conv = snl.conv_mask, snl.conv_value  # without the bottleneck
    assert block(x).equal(snl(x))


@pytest.mark.parametrize("ratio", [4, 16])
@torch.no_grad()
def test_backbone_is_the_references(ratio):
    backbone = ResNetD8(50)
    add_blocks(backbone, BLOCKS[f"gc{ratio}"], "res3-res5")
    backbone, names = by_name(backbone, "backbone.")
    published = [name.removeprefix("backbone.") for name in reference.keys("fcn", 50) if name.startswith("backbone.")]
    assert sorted(names) == GOLDEN["backbone_names"].tolist() and set(names) > set(published)
    stages = backbone(torch.tensor(reference.arrays("inputs")["x"]))
    np.testing.assert_allclose([[c.norm(), c.mean()] for c in stages], GOLDEN[f"backbone_r{ratio}"], rtol=1e-4)


# ------------------------------------------------------------------------------------------------- torchvision's models


def test_places():
    """One block where the non-local paper has one; five, and all, of a ResNet-50."""
    found = {}
    for place in PLACES:
        with torch.device("meta"):
            resnet = ResNetD8(50)
            add_blocks(resnet, SimplifiedNonLocalBlock, place)
        names = [name for name, module in resnet.named_modules() if isinstance(module, SimplifiedNonLocalBlock)]
        found[place] = [name.removesuffix(".context_block").removeprefix("layer") for name in names]
    assert found["res4"] == ["3.5"] and found["alternate"] == ["2.1", "2.3", "3.1", "3.3", "3.5"]
    assert found["res3-res5"] == [f"{layer}.{i}" for layer, count in ((2, 4), (3, 6), (4, 3)) for i in range(count)]


@torch.no_grad()
def test_blocks_in_torchvisions_resnet():
    """Fresh, they change nothing; then they act after BatchNorm, frozen or not, and before the addition."""
    models = pytest.importorskip("torchvision.models")
    ops = pytest.importorskip("torchvision.ops")
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    for norm in (nn.BatchNorm2d, ops.FrozenBatchNorm2d):
        model = models.resnet18(norm_layer=norm).eval()
        before = model(images)
        add_blocks(model, GCBlock, "res3-res5")
        blocks = [module for module in model.modules() if isinstance(module, GCBlock)]
        assert len(blocks) == 6 and model(images).equal(before)
        block, x = model.layer4[1], torch.randn(2, 512, 2, 2)
        nn.init.normal_(blocks[-1].channel_add_conv[3].weight)
        block.bn2[0].weight.fill_(2.0)
        branch = block.bn2[0](block.conv2(torch.relu(block.bn1(block.conv1(x)))))
        torch.testing.assert_close(block(x), torch.relu(blocks[-1](branch) + x))
        assert not block(x).allclose(torch.relu(branch + x))


# --------------------------------------------------------------------------------------------------- weights, commands


def test_weights_without_the_blocks_leave_them_fresh(tmp_path):
    """All other weights must be there."""
    settings = Settings(model="fcn", classes=["a", "b"], depth=18, blocks=["gc16", "res3-res5"])
    plain, model = FCN(2, 18), checkpoint.build_model(settings)
    randomise(plain)
    torch.save(plain.backbone.state_dict(), tmp_path / "plain.pth")
    checkpoint.start_from_imagenet(model, tmp_path / "plain.pth", 18)
    images = torch.randn(1, 3, 32, 32)
    for ours, theirs in zip(model.backbone.eval()(images), plain.backbone(images), strict=True):
        assert ours.equal(theirs)
    torch.save({k: v for k, v in plain.backbone.state_dict().items() if k != "layer2.0.bn2.bias"}, tmp_path / "cut.pth")
    with pytest.raises(InputError, match="cut.pth: does not fit.*layer2.0.bn2.bias"):
        checkpoint.start_from_imagenet(model, tmp_path / "cut.pth", 18)
    torch.save(model.backbone.state_dict(), tmp_path / "with.pth")
    with pytest.raises(InputError, match="with.pth: does not fit.*context_block"):
        checkpoint.start_from_imagenet(plain, tmp_path / "with.pth", 18)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "v1.pth")
    with pytest.raises(InputError, match="v1.pth: is a ResNet with a 7x7 stem; a ResNet-v1c is needed, as in https"):
        checkpoint.start_from_imagenet(plain, tmp_path / "v1.pth", 18)


def test_commands(folder, run_inside, tmp_path):
    """Training, resuming, evaluating and predicting build the model that the run names."""
    torch.save(published("gcnet", classes=3), tmp_path / "plain.pth")
    arguments = train_arguments(folder, "run", 1, workers=0, weights=("--init", "plain.pth"))[1:]
    note = "loaded all weights; the new blocks begin as new"
    assert note in run_inside(train, *arguments, "--blocks", "gc16", "res3-res5")
    state = checkpoint.read_checkpoint(tmp_path / "run/last.pt")
    assert state["settings"].blocks == ["gc16", "res3-res5"]
    assert state["model"]["backbone.layer2.0.context_block.channel_add_conv.0.weight"].shape == (8, 128, 1, 1)
    assert state["model"]["backbone.layer4.1.context_block.channel_add_conv.3.weight"].abs().max() > 0
    image = folder / "images/val/scene1.png"
    run_inside(train, "--resume", "--out", "run")
    assert "mIoU" in run_inside(evaluate, "run/last.pt", "--workers", 0)
    assert "1 images" in run_inside(predict, image, "--checkpoint", "run/last.pt")

    for blocks, words in (
        (None, "does not fit.*context_block"),  # it has none
        (["gc16", "alternate"], "does not fit.*context_block"),  # nor so many
        (["gc16-avg", "res3-res5"], "its blocks are gc16, not gc16-avg"),
    ):
        with pytest.raises(InputError, match=f"last.pt: {words}"):
            model = checkpoint.build_model(replace(state["settings"], blocks=blocks))
            checkpoint.start_from_checkpoint(model, tmp_path / "run/last.pt", blocks)
    settings = state.pop("settings")
    del state["model"]["backbone.layer3.0.context_block.conv_mask.weight"]
    torch.save(state | {"config": vars(settings)}, tmp_path / "torn.pt")
    with pytest.raises(InputError, match="torn.pt: does not fit.*layer3.0.context_block.conv_mask.weight"):
        checkpoint.start_from_checkpoint(checkpoint.build_model(settings), tmp_path / "torn.pt", settings.blocks)
    message = run_inside(train, "--resume", "--out", "run", "--blocks", "gc4", "res3-res5", fails=True)
    refused = "--blocks ['gc4', 'res3-res5']: the run in run has ['gc16', 'res3-res5']; --init run/last.pt --out NEW "
    assert message.startswith(refused)
    for words in (("res4", "nl"), ("nl", "res5"), ("gc", "res4")):
        message = run_inside(train, "--blocks", *words, "--out", "other", fails=True)
        assert message == f"--blocks {' '.join(words)}: there is no such block and place; --help lists them"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_in_every_place_starts_as_the_identity_and_trains(block, place):
    """But that a fusion by multiplication starts by halving the branch."""
    settings = Settings(model="fcn", classes=["a", "b"], depth=18)
    model = checkpoint.build_model(replace(settings, blocks=[block, place]))
    plain = checkpoint.build_model(settings)
    for name, parameter in plain.named_parameters():
        if ".bn2.weight" in name:
            nn.init.ones_(parameter)
    model.load_state_dict(plain.state_dict(), strict=False)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert model.eval()(images).allclose(plain.eval()(images), atol=1e-6) == ("mul" not in block)
    sum(logits.square().mean() for logits in model.train()(images)).backward()
    context_blocks = [module.context_block for module in model.modules() if hasattr(module, "context_block")]
    added = [module for module in context_blocks if not isinstance(module, nn.Identity)]
    assert len(added) == {"res4": 1, "alternate": 2, "res3-res5": 6}[place]
    for module in added:
        assert any(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


@pytest.mark.slow
def test_the_cityscapes_ablation_is_one_option(folder, run_inside, tmp_path):
    arguments = train_arguments(folder, "run", 1, workers=0)[1:]
    run_inside(train, *arguments, "--model", "nonlocal_net", "--cityscapes-ablation")
    weights = checkpoint.load_model(tmp_path / "run/best.pt")[0].state_dict()
    shapes = [
        tuple(weights[f"{name}.weight"].shape[:2])
        for name in ("backbone.stem.6", "auxiliary_head.convs.0.conv", "decode_head.nl_block.theta.conv")
    ]
    assert shapes == [(128, 64), (512 // 4, 256), (128 // 4, 128)]  # heads of R-18 have a quarter of the channels
