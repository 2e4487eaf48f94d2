"""GCNet's general framework, and GC blocks in the backbone, this project's and torchvision's: the published sizes."""

import numpy as np
import pytest
import reference
import torch
from conftest import published, train_arguments
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import train
from gcnet import GCBlock, SimplifiedNonLocalBlock, add_gc_blocks
from nonlocal_net import NonLocalBlock
from resnet_d8 import FCN, ResNetD8
from support import checkpoint
from support.command import InputError
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


@pytest.mark.parametrize("pooling", ["att", "avg"])
def test_positions_of_a_video_are_all_alike(pooling):
    torch.manual_seed(0)
    block, x = randomise(GCBlock(8, 4, pooling)), torch.randn(2, 8, 4, 3, 5)
    flat = block(x.flatten(2)[..., None]).view_as(x)
    assert (flat - x).abs().min() > 0
    for memory_format in (torch.contiguous_format, torch.channels_last_3d):
        torch.testing.assert_close(block(x.contiguous(memory_format=memory_format)), flat)


@pytest.mark.parametrize("ratio", [4, 16])
@torch.no_grad()
def test_backbone_is_the_references(ratio):
    backbone = ResNetD8(50)
    add_gc_blocks(backbone, ratio)
    backbone, names = by_name(backbone, "backbone.")
    published = [name.removeprefix("backbone.") for name in reference.keys("fcn", 50) if name.startswith("backbone.")]
    assert sorted(names) == GOLDEN["backbone_names"].tolist() and set(names) > set(published)
    stages = backbone(torch.tensor(reference.arrays("inputs")["x"]))
    np.testing.assert_allclose([[c.norm(), c.mean()] for c in stages], GOLDEN[f"backbone_r{ratio}"], rtol=1e-4)


# ------------------------------------------------------------------------------------------------- torchvision's models


def millions(module):
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def test_parameters_and_multiply_adds_on_imagenet():
    """GCNet's ImageNet table, ratio 16: ResNet-50, one block at the end of c4, blocks in all of c3 to c5."""
    models = pytest.importorskip("torchvision.models")
    found = []
    with torch.device("meta"):
        for blocks in ("none", "one", "all"):
            model = models.resnet50().eval()
            for block in model.modules():
                if isinstance(block, models.resnet.Bottleneck):  # the paper's has the stride in the first convolution
                    block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
            if blocks == "one":
                model.layer3[-1].bn3 = nn.Sequential(model.layer3[-1].bn3, GCBlock(1024, 16))
            if blocks == "all":
                add_gc_blocks(model, 16)
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(1, 3, 224, 224))
            found.append((round(millions(model), 2), round(counter.get_total_flops() / 2e9, 2)))
    assert found == [(25.56, 3.86), (25.69, 3.86), (28.08, 3.87)]


def test_parameters_of_mask_rcnn():
    """GCNet's COCO tables; of R-101 with ratio 16 the paper has 68.1."""
    detection = pytest.importorskip("torchvision.models.detection")
    table = {(50, None): 44.4, (50, 16): 46.9, (50, 4): 54.4, (101, None): 63.4, (101, 16): 68.2, (101, 4): 82.4}
    found = {}
    for depth, ratio in table:
        with torch.device("meta"):
            backbone = detection.backbone_utils.resnet_fpn_backbone(
                backbone_name=f"resnet{depth}", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
            )
            if ratio:
                add_gc_blocks(backbone.body, ratio)
            found[depth, ratio] = round(millions(detection.MaskRCNN(backbone, 81)), 1)
    assert found == table


def test_parameters_on_kinetics():
    """GCNet's Kinetics table, ratio 4: five blocks in c3 and c4, or blocks in all of c3 to c5."""
    with torch.device("meta"):
        c3, c4, c5 = (millions(GCBlock(channels, 4)) for channels in (512, 1024, 2048))
    assert round(2 * c3 + 3 * c4, 2) == 1.85 and round(4 * c3 + 6 * c4 + 3 * c5, 1) == 10.0


def test_parameters_of_one_block_or_five():
    """What NL, SNL and GC add in GCNet's ImageNet and COCO tables (one block in c4) and in its Kinetics table (two
    blocks in c3, three in c4). On COCO SNL has 45.45 here, and 45.4 in the paper."""
    with torch.device("meta"):
        nl = [millions(NonLocalBlock(channels)) for channels in (512, 1024)]
        snl = [millions(SimplifiedNonLocalBlock(channels)) for channels in (512, 1024)]
        gc16 = millions(GCBlock(1024, 16))
    assert [round(25.557 + one, 2) for one in (nl[1], snl[1], gc16)] == [27.66, 26.61, 25.69]
    assert [round(44.401 + one, 1) for one in (nl[1], gc16)] == [46.5, 44.5]
    five = [2 * c3 + 3 * c4 for c3, c4 in (nl, snl)]
    assert five == pytest.approx([39.81 - 32.45, 36.13 - 32.45], abs=0.01)  # differences of rounded figures


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
        add_gc_blocks(model, 4)
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
    config = {"model": "fcn", "classes": ["a", "b"], "depth": 18, "align_corners": False}
    plain, model = FCN(2, 18), checkpoint.build_model(config | {"gc_backbone": 16})
    randomise(plain)
    torch.save(plain.backbone.state_dict(), tmp_path / "plain.pth")
    checkpoint.load_backbone(model, tmp_path / "plain.pth", 18)
    images = torch.randn(1, 3, 32, 32)
    for ours, theirs in zip(model.backbone.eval()(images), plain.backbone(images), strict=True):
        assert ours.equal(theirs)
    torch.save({k: v for k, v in plain.backbone.state_dict().items() if k != "layer2.0.bn2.bias"}, tmp_path / "cut.pth")
    with pytest.raises(InputError, match="cut.pth: does not fit.*layer2.0.bn2.bias"):
        checkpoint.load_backbone(model, tmp_path / "cut.pth", 18)
    torch.save(model.backbone.state_dict(), tmp_path / "with.pth")
    with pytest.raises(InputError, match="with.pth: does not fit.*context_block"):
        checkpoint.load_backbone(plain, tmp_path / "with.pth", 18)


def test_commands(folder, run_inside, tmp_path):
    """Training, resuming, evaluating and predicting build the model that the run names."""
    torch.save(published("gcnet", classes=3), tmp_path / "plain.pth")
    arguments = train_arguments(folder, "run", 1, workers=0, weights=("--init", "plain.pth"))[1:]
    note = "all weights, classifiers too; the backbone's GC blocks start anew"
    assert note in run_inside(train, *arguments, "--gc-backbone", 16)
    state = checkpoint.load(tmp_path / "run/last.pt")
    assert state["config"]["gc_backbone"] == 16
    assert state["model"]["backbone.layer2.0.context_block.channel_add_conv.0.weight"].shape == (8, 128, 1, 1)
    assert state["model"]["backbone.layer4.1.context_block.channel_add_conv.3.weight"].abs().max() > 0
    image = folder / "images/val/scene1.png"
    run_inside(train, "--resume", "--out", "run")
    assert "mIoU" in run_inside(evaluate, "run/last.pt", "--workers", 0)
    assert "1 images" in run_inside(predict, image, "--checkpoint", "run/last.pt")

    with pytest.raises(InputError, match="last.pt: does not fit.*context_block"):
        checkpoint.load_init(checkpoint.build_model(state["config"] | {"gc_backbone": None}), tmp_path / "run/last.pt")
    message = run_inside(train, "--resume", "--out", "run", "--gc-backbone", 4, fails=True)
    assert message == "--gc-backbone 4: the run in run has 16"
