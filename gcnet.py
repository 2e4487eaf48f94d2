"""GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond.

Cao, Xu, Lin, Wei, Hu (ICCV Workshops 2019), https://arxiv.org/abs/1904.11492

A non-local block computes weights over all positions for every query. After training for detection or classification
they hardly depend on the query (section 3.2). So GCNet computes them once, and adds one context vector everywhere:

    SNL, eq. 3:  z_i = x_i + W_v  sum_j a_j x_j                         a_j = exp(W_k x_j) / sum_m exp(W_k x_m)
    GC,  eq. 5:  z_i = x_i + W_v2 ReLU(LN(W_v1 sum_j a_j x_j))
    SE:          z_i = x_i * sigmoid(W_v2 ReLU(W_v1 sum_j a_j x_j))     a_j = 1 / HW; GCBlock keeps LN

    framework, eq. 4                 here
    context modelling, W_k           global_attention_pooling, conv_mask; pooling="avg": the mean
    transform, W_v                   conv_value
    transform, W_v1 LN ReLU W_v2     channel_add_conv (or channel_mul_conv) [0], [1], [2], [3]
    bottleneck ratio r               ratio, such that C/r channels are between W_v1 and W_v2
    fusion: add, or scale            x + ...; fusion="mul": x * sigmoid(...)

The block sits between the first two 3x3 convolutions of an FCN head, as in the published semantic-segmentation models;
`add_blocks` puts it, or another block, into the backbone, as in the paper's other experiments.
"""

from torch import nn

from resnet_d8 import FCNHead, Segmentor


def global_attention_pooling(x, conv_mask):                 # (N, C, H, W)
    """The context, one vector for the whole image: the positions' mean, weighted by softmax(W_k x) (section 4.2)."""
    a = conv_mask(x).flatten(2).softmax(dim=2)              # (N, 1, HW)
    context = x.flatten(2) @ a.transpose(1, 2)              # (N, C, 1)
    return context[..., None]                               # (N, C, 1, 1)


class SimplifiedNonLocalBlock(nn.Module):
    """SNL (section 4.1, figure 4b): adds W_v times the context to (N, C, H, W). Starts as the identity."""

    def __init__(self, channels):
        super().__init__()
        self.conv_mask = nn.Conv2d(channels, 1, 1)
        self.conv_value = nn.Conv2d(channels, channels, 1)
        nn.init.kaiming_normal_(self.conv_mask.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.conv_mask.bias)
        nn.init.zeros_(self.conv_value.weight)
        nn.init.zeros_(self.conv_value.bias)

    def forward(self, x):                                       # (N, C, H, W)
        context = global_attention_pooling(x, self.conv_mask)   # (N, C, 1, 1)
        return x + self.conv_value(context)                     # (N, C, H, W)


class GCBlock(nn.Module):
    """GC (section 4.3, figure 4d): adds the context after a bottleneck to (N, C, H, W), or with fusion "mul" multiplies
    by its sigmoid. Starts as the identity, with "mul" by halving x. pooling is "att" or "avg"."""

    def __init__(self, channels, ratio=4, pooling="att", fusion="add"):
        super().__init__()
        assert pooling in ("att", "avg") and fusion in ("add", "mul")
        if not (isinstance(ratio, int) and 1 <= ratio <= channels):
            raise ValueError(f"ratio {ratio} is not a whole number from 1 to {channels}, the number of channels")
        self.conv_mask = nn.Conv2d(channels, 1, 1) if pooling == "att" else None
        self.fusion = fusion
        transform = nn.Sequential(
            nn.Conv2d(channels, channels // ratio, 1),
            nn.LayerNorm([channels // ratio, 1, 1]),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels // ratio, channels, 1),
        )
        self.add_module(f"channel_{fusion}_conv", transform)
        if self.conv_mask:
            nn.init.kaiming_normal_(self.conv_mask.weight, mode="fan_in", nonlinearity="relu")
            nn.init.zeros_(self.conv_mask.bias)
        nn.init.zeros_(transform[3].weight)
        nn.init.zeros_(transform[3].bias)

    def forward(self, x):                                           # (N, C, H, W)
        context = self.context_modelling(x)                         # (N, C, 1, 1)
        if self.fusion == "mul":
            return x * self.channel_mul_conv(context).sigmoid()     # (N, C, H, W)
        return x + self.channel_add_conv(context)                   # (N, C, H, W)

    def context_modelling(self, x):
        return global_attention_pooling(x, self.conv_mask) if self.conv_mask else x.mean((2, 3), keepdim=True)


def add_blocks(resnet, block, place):
    """Puts block(channels) at the end of residual branches (section 5.1, "after 1x1"). place: "res4" (its last block),
    "alternate" (every other block of res3 and res4) or "res3-res5" (all). Takes torchvision's ResNets, too."""
    res3, res4, res5 = resnet.layer2, resnet.layer3, resnet.layer4
    places = {"res4": res4[-1:], "alternate": (*res3[1::2], *res4[1::2]), "res3-res5": (*res3, *res4, *res5)}
    for residual in places[place]:
        last = "bn3" if hasattr(residual, "bn3") else "bn2"
        context_block = block(len(getattr(residual, last).weight))
        if hasattr(residual, "context_block"):
            residual.context_block = context_block
        else:  # torchvision's: load its weights before, since this renames bn3 to bn3.0
            setattr(residual, last, nn.Sequential(getattr(residual, last), context_block))


class SNLHead(FCNHead):
    """The FCN head with an SNL block between its first two convolutions."""

    def __init__(self, c3_channels, c4_channels, channels, num_classes):
        super().__init__(c3_channels, c4_channels, channels, num_classes)
        self.snl_block = SimplifiedNonLocalBlock(channels)

    def context(self, x):                                       # (N, 512, H, W)
        return self.snl_block(x)


class SNLNet(Segmentor):
    """The ablation's step between NonLocalNet and GCNet; the arguments, input and output are Segmentor's."""

    head = SNLHead


class GCHead(FCNHead):
    """The FCN head with a GC block between its first two convolutions."""

    def __init__(self, c3_channels, c4_channels, channels, num_classes):
        super().__init__(c3_channels, c4_channels, channels, num_classes)
        self.gc_block = GCBlock(channels)

    def context(self, x):                                       # (N, 512, H, W)
        return self.gc_block(x)


class GCNet(Segmentor):
    """GCNet for segmentation; the arguments, input and output are Segmentor's."""

    head = GCHead
