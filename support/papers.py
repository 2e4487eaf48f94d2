"""The sizes in GCNet's tables, each beside that of the same model here.

The tables are those of the paper and of its slides: blocks in the backbone for ImageNet, COCO and Kinetics, and in the
head for Cityscapes.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gcnet import add_blocks
from support.checkpoint import BLOCKS, build_model

KINETICS = 32.45  # the published baseline, a ResNet-50 for videos; a block adds as many parameters as for images


class Row(NamedTuple):
    """A row of a published table; figures are kept as text, with the decimals published."""

    task: str
    block: str  # of BLOCKS, a segmentation model, or ""
    place: str
    parameters: str  # in millions
    multiply_adds: str = ""  # in billions
    unmet: str = ""  # why a figure here differs


ROWS = (
    Row("ImageNet, R-50", "", "", "25.56", "3.86"),
    Row("ImageNet, R-50", "nl", "res4", "27.66", "4.11", "published: phi and g on fewer positions, and no attention"),
    Row("ImageNet, R-50", "snl", "res4", "26.61", "3.86"),
    Row("ImageNet, R-50", "gc16", "res4", "25.69", "3.86"),
    Row("ImageNet, R-50", "gc16", "res3-res5", "28.08", "3.87"),
    Row("COCO, Mask R-CNN R-50", "", "", "44.4"),
    Row("COCO, Mask R-CNN R-50", "nl", "res4", "46.5"),
    Row("COCO, Mask R-CNN R-50", "snl", "res4", "45.4", unmet="44.401 + 1.051 = 45.451 here"),
    Row("COCO, Mask R-CNN R-50", "gc16", "res4", "44.5"),
    Row("COCO, Mask R-CNN R-50", "gc16", "res3-res5", "46.9"),
    Row("COCO, Mask R-CNN R-50", "gc4", "res3-res5", "54.4"),
    Row("COCO, Mask R-CNN R-101", "", "", "63.4"),
    Row("COCO, Mask R-CNN R-101", "gc16", "res3-res5", "68.1", unmet="63.393 + 4.788 = 68.181 here"),
    Row("COCO, Mask R-CNN R-101", "gc4", "res3-res5", "82.4"),
    Row("Kinetics, R-50", "nl", "alternate", "39.81", unmet="32.45 + 7.354: the baseline is rounded"),
    Row("Kinetics, R-50", "snl", "alternate", "36.13"),
    Row("Kinetics, R-50", "gc4", "alternate", "34.30"),
    Row("Kinetics, R-50", "gc4", "res3-res5", "42.45"),
    Row("Cityscapes, R-101", "fcn", "", "70.96", "646.88"),
    Row("Cityscapes, R-101", "nonlocal_net", "head", "71.22", "649.36"),
    Row("Cityscapes, R-101", "snlnet", "head", "71.22", "646.86", "published below the model without the block"),
    Row("Cityscapes, R-101", "gcnet", "head", "71.09", "646.89"),
)


def like(value, published):
    """A number as text with as many decimals as a published figure; "" if nothing is published."""
    return f"{value:.{len(published.partition('.')[2])}f}" if published else ""


def measure(row):
    """(parameters in millions, multiply-adds in billions or None) of a row's model here."""
    with torch.device("meta"), torch.no_grad():
        if row.task.startswith("Cityscapes"):
            config = {"model": row.block, "classes": range(19), "depth": 101, "align_corners": False}
            model = build_model(config | {"cityscapes_ablation": True}).eval()
            with Operations() as operations:
                model(torch.empty(1, 3, 769, 769))
            return millions(model), operations.total / 1e9
        if row.task.startswith("COCO"):
            return millions(mask_rcnn(row)), None
        model = classifier(row)
        if row.task.startswith("Kinetics"):
            return KINETICS + millions(model) - millions(classifier(ROWS[0])), None
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
        return millions(model), counter.get_total_flops() / 2e9


def millions(model):
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def classifier(row):
    """torchvision's ResNet-50 with a row's blocks, and with the stride in the first convolution of a residual block, as
    the papers have it."""
    from torchvision.models.resnet import Bottleneck, resnet50

    model = resnet50().eval()
    for residual in model.modules():
        if isinstance(residual, Bottleneck):
            residual.conv1.stride, residual.conv2.stride = residual.conv2.stride, residual.conv1.stride
    if row.block:
        add_blocks(model, BLOCKS[row.block], row.place)
    return model


def mask_rcnn(row):
    """torchvision's Mask R-CNN of 81 classes with a row's blocks."""
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    name = "resnet" + row.task.rpartition("-")[2]
    backbone = resnet_fpn_backbone(backbone_name=name, weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5)
    if row.block:
        add_blocks(backbone.body, BLOCKS[row.block], row.place)
    return MaskRCNN(backbone, 81)


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
