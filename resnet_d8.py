"""What the models share: the dilated ResNet, the FCN head, and the frame that joins a backbone with its heads.

    He et al., Deep Residual Learning (CVPR 2016)          https://arxiv.org/abs/1512.03385
    Long et al., Fully Convolutional Networks (CVPR 2015)  https://arxiv.org/abs/1411.4038
    Zhao et al., PSPNet (CVPR 2017), auxiliary loss        https://arxiv.org/abs/1612.01105

    images -> ResNetD8 -> c1 (1/4 size), c2, c3, c4 (1/8) -> decode_head(c3, c4) -> logits at 1/8 -> resized
                                         c3 -> auxiliary_head -> logits of the auxiliary loss, in training only

Parameter names are those of the published checkpoints, so that these load as they are. Shapes in comments are those of
depth 50 and 101 (18 and 34: a quarter of the channels, in stages and heads); in heads, H and W are those of c3 and c4.
"""

import torch
import torch.nn.functional as F
from torch import nn


class ConvBNReLU(nn.Module):
    """Convolution, BatchNorm and, unless `relu=False`, ReLU. Keeps the size."""

    def __init__(self, in_channels, out_channels, kernel, relu=True):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True) if relu else nn.Identity()
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


def shortcut(in_channels, out_channels, stride):
    """The identity where the shapes allow it, else a 1x1 projection (He et al., section 3.3, option B)."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """The residual block of ResNet-18 and 34: only its first convolution has stride and dilation."""

    expansion = 1

    def __init__(self, in_channels, channels, stride, dilation):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.context_block = nn.Identity()  # where gcnet.add_blocks puts a block
        self.downsample = shortcut(in_channels, channels, stride)
        nn.init.zeros_(self.bn2.weight)  # each block starts as its shortcut

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.context_block(self.bn2(self.conv2(out)))
        out += self.downsample(x)
        return F.relu(out, inplace=True)


class Bottleneck(nn.Module):
    """The residual block of ResNet-50 and 101, with stride and dilation in the 3x3 convolution."""

    expansion = 4

    def __init__(self, in_channels, channels, stride, dilation):
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.context_block = nn.Identity()  # where gcnet.add_blocks puts a block
        self.downsample = shortcut(in_channels, out_channels, stride)
        nn.init.zeros_(self.bn3.weight)  # each block starts as its shortcut

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.context_block(self.bn3(self.conv3(out)))
        out += self.downsample(x)
        return F.relu(out, inplace=True)


def stage(block, in_channels, channels, count, stride, dilation):
    """Residual blocks. The first has the stage's stride and the dilation of the stage before."""
    first = block(in_channels, channels, stride, max(dilation // 2, 1))
    others = [block(channels * block.expansion, channels, 1, dilation) for _ in range(count - 1)]
    return nn.Sequential(first, *others)


class ResNetD8(nn.Module):
    """ResNet-v1c (three 3x3 convolutions instead of the 7x7) of output stride 8: dilation replaces the last strides."""

    BLOCKS = {
        18: (BasicBlock, (2, 2, 2, 2)),
        34: (BasicBlock, (3, 4, 6, 3)),
        50: (Bottleneck, (3, 4, 6, 3)),
        101: (Bottleneck, (3, 4, 23, 3)),
    }

    def __init__(self, depth=50, stem_channels=64):
        super().__init__()
        block, counts = self.BLOCKS[depth]
        half = stem_channels // 2
        self.stem = nn.Sequential(
            nn.Conv2d(3, half, 3, 2, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
            nn.Conv2d(half, half, 3, 1, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
            nn.Conv2d(half, stem_channels, 3, 1, 1, bias=False), nn.BatchNorm2d(stem_channels), nn.ReLU(inplace=True),
        )
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.stage_channels = [channels * block.expansion for channels in (64, 128, 256, 512)]  # of c1 to c4
        self.layer1 = stage(block, stem_channels, 64, counts[0], stride=1, dilation=1)
        self.layer2 = stage(block, self.stage_channels[0], 128, counts[1], stride=2, dilation=1)
        self.layer3 = stage(block, self.stage_channels[1], 256, counts[2], stride=1, dilation=2)
        self.layer4 = stage(block, self.stage_channels[2], 512, counts[3], stride=1, dilation=4)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images):              # (N, 3, H, W)
        x = self.maxpool(self.stem(images)) # (N, 64, H/4, W/4)
        c1 = self.layer1(x)                 # (N, 256, H/4, W/4)
        c2 = self.layer2(c1)                # (N, 512, H/8, W/8)
        c3 = self.layer3(c2)                # (N, 1024, H/8, W/8)
        c4 = self.layer4(c3)                # (N, 2048, H/8, W/8)
        return c1, c2, c3, c4


class Head(nn.Module):
    """The end of every head: dropout of whole channels, then a 1x1 convolution to the classes."""

    def __init__(self, channels, num_classes):
        super().__init__()
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def classify(self, x):
        return self.conv_seg(self.dropout(x))


class AuxiliaryHead(Head):
    """A small head on c3 whose loss, weighted 0.4, helps the backbone to train (PSPNet, section 4)."""

    def __init__(self, in_channels, channels, num_classes):
        super().__init__(channels, num_classes)
        self.convs = nn.Sequential(ConvBNReLU(in_channels, channels, 3))

    def forward(self, c3):                                  # (N, 1024, H, W)
        return self.classify(self.convs(c3))                # (N, K, H, W)


class FCNHead(Head):
    """Two 3x3 convolutions, then a third that sees their input again. GCHead, SNLHead and NonLocalHead override
    `context` with the block that lets a pixel see the whole image."""

    def __init__(self, c3_channels, c4_channels, channels, num_classes):
        super().__init__(channels, num_classes)
        self.convs = nn.Sequential(ConvBNReLU(c4_channels, channels, 3), ConvBNReLU(channels, channels, 3))
        self.conv_cat = ConvBNReLU(c4_channels + channels, channels, 3)

    def context(self, x):
        return x

    def forward(self, c3, c4):                              # c4: (N, 2048, H, W); c3 is for ANN's head
        out = self.context(self.convs[0](c4))               # (N, 512, H, W)
        out = self.convs[1](out)                            # (N, 512, H, W)
        out = self.conv_cat(torch.cat([c4, out], dim=1))    # (N, 512, H, W)
        return self.classify(out)                           # (N, K, H, W)


class Segmentor(nn.Module):
    """Backbone, auxiliary head and decode head, whose class each subclass (GCNet, NonLocalNet, ...) sets as `head`.

    Takes float32 RGB images (N, 3, H, W), normalised; any H and W from 1 up. Gives float32 logits (N, K, H, W) in eval
    mode. In training mode it gives the pair (logits, aux_logits), both (N, K, H/8, W/8), rounded up, which the loss
    resizes.

    depth          of the ResNet: 18, 34, 50 or 101
    align_corners  how the logits are resized: True for crops of 769 = 8 * 96 + 1, to which a grid of 97 fits exactly
    stem_channels  64, or 128 for the wider stem of GCNet's Cityscapes ablation
    aux_channels   of the auxiliary head: 256, or 512 in that ablation
    options        what else the decode head takes
    """

    head = None  # the class of the decode head

    def __init__(self, num_classes, depth=50, align_corners=False, stem_channels=64, aux_channels=256, **options):
        super().__init__()
        divisor = 4 if depth < 50 else 1
        self.num_classes = num_classes
        self.align_corners = align_corners
        self.backbone = ResNetD8(depth, stem_channels)
        c3_channels, c4_channels = self.backbone.stage_channels[2:]
        self.auxiliary_head = AuxiliaryHead(c3_channels, aux_channels // divisor, num_classes)
        self.decode_head = self.head(c3_channels, c4_channels, 512 // divisor, num_classes, **options)

    def forward(self, images):                              # (N, 3, H, W)
        c3, c4 = self.backbone(images)[2:]                  # (N, 1024, H/8, W/8), (N, 2048, H/8, W/8)
        logits = self.decode_head(c3, c4)                   # (N, K, H/8, W/8)
        if self.training:
            return logits, self.auxiliary_head(c3)
        logits = logits.to(images.dtype)                    # in full precision under autocast, too
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=self.align_corners)


class FCN(Segmentor):
    """The baseline: no context block. A pixel sees what the convolutions' receptive field holds."""

    head = FCNHead
