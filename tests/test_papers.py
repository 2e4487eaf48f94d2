"""The sizes in GCNet's tables: BENCHMARKS.md has each published figure beside the one here, which is computed again."""

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gcnet import add_blocks
from support.checkpoint import build_model
from support.settings import BLOCKS, Settings

detection = pytest.importorskip("torchvision.models.detection")
resnet = pytest.importorskip("torchvision.models.resnet")
HEAD = "| task | block | place | parameters (M) | published | multiply-adds (G) | published | why they differ |\n"
KINETICS = 32.45  # the published baseline, a ResNet-50 for videos; a block adds as many parameters as for images


def rows():
    """The cells of each row of BENCHMARKS.md's table, as text."""
    lines = (ROOT / "BENCHMARKS.md").read_text().partition(HEAD)[2].partition("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def millions(model):
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def classifier(block, place):
    """torchvision's ResNet-50 with blocks, and with the stride in the first convolution of a residual block, as the
    papers have it."""
    model = resnet.resnet50().eval()
    for residual in model.modules():
        if isinstance(residual, resnet.Bottleneck):
            residual.conv1.stride, residual.conv2.stride = residual.conv2.stride, residual.conv1.stride
    if block:
        add_blocks(model, BLOCKS[block], place)
    return model


def mask_rcnn(depth, block, place):
    """torchvision's Mask R-CNN of 81 classes with blocks."""
    backbone = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name=f"resnet{depth}", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    if block:
        add_blocks(backbone.body, BLOCKS[block], place)
    return detection.MaskRCNN(backbone, 81)


class Operations(TorchDispatchMode):
    """Counts as GCNet's Cityscapes table does: a convolution's multiply-adds and biases, two operations for each value
    of a BatchNorm, one for each input value of a ReLU or a max-pool; attention's products and softmax count nothing."""

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **options or {})
        name = function.overloadpacket.__name__
        if name == "convolution":
            weight, bias = arguments[1:3]
            self.total += result.numel() * (weight[0].numel() + (bias is not None))
        if name == "native_batch_norm":
            self.total += 2 * result[0].numel()
        if name in ("relu", "relu_", "max_pool2d_with_indices"):
            self.total += arguments[0].numel()
        return result


def measure(task, block, place):
    """(parameters in millions, multiply-adds in billions or None) of a row's model here."""
    depth = int(task.rpartition("R-")[2])
    with torch.device("meta"), torch.no_grad():
        if task.startswith("COCO"):
            return millions(mask_rcnn(depth, block, place)), None
        if task.startswith("Kinetics"):
            return KINETICS + millions(classifier(block, place)) - millions(classifier("", "")), None
        if task.startswith("ImageNet"):
            model = classifier(block, place)
            with FlopCounterMode(display=False) as flops:
                model(torch.empty(1, 3, 224, 224))
            return millions(model), flops.get_total_flops() / 2e9
        model = build_model(Settings(model=block, depth=depth, classes=range(19), cityscapes_ablation=True)).eval()
        with Operations() as operations:
            model(torch.empty(1, 3, 769, 769))
        return millions(model), operations.total / 1e9


def rounded(value, published):
    """A number as text with as many decimals as a published figure; "" if nothing is published."""
    return f"{value:.{len(published.partition('.')[2])}f}" if published else ""


def test_sizes_in_the_papers_tables():
    """Each figure of BENCHMARKS.md is the one computed, and is the published one, or the reason stands beside it."""
    for task, block, place, parameters, published, multiply_adds, published_multiply_adds, reason in rows():
        found = measure(task, block, place)
        assert [parameters, multiply_adds] == [rounded(found[0], published), rounded(found[1], published_multiply_adds)]
        assert (parameters == published and multiply_adds == published_multiply_adds) == (not reason)
    assert len(rows()) == 22 and len([row for row in rows() if row[-1]]) == 5


def test_blocks_add_as_much_to_a_resnext():
    """Whose stages have as many channels as a ResNet's: so they do in GCNet's COCO table."""
    for block in ("gc16", "gc4"):
        added = []
        for build in (resnet.resnet101, resnet.resnext101_32x8d):
            with torch.device("meta"):
                plain = millions(build())
                model = build()
                add_blocks(model, BLOCKS[block], "res3-res5")
            added.append(millions(model) - plain)
        assert added[0] == pytest.approx(added[1]) == pytest.approx({"gc16": 4.788, "gc4": 18.962}[block], abs=1e-3)
