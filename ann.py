"""Asymmetric Non-local Neural Networks (ANN).

Zhu, Xu, Bai, Huang, Bai (ICCV 2019), https://arxiv.org/abs/1908.07678

A non-local block compares each of the HW positions with all of them. Here the keys and values are reduced to S = 110
samples, the averages of pyramid pooling to 1x1, 3x3, 6x6 and 8x8 cells, so that time and memory are linear in HW:

    sections 3.1 and 3.2                            here, in AsymmetricNonLocalBlock
    phi = W_phi(X), theta = W_theta(X)              query, key: 1x1 convolution, BatchNorm, ReLU
    gamma = W_gamma(X)                              value: 1x1 convolution
    theta_P = P(theta), gamma_P = P(gamma)          PyramidPooling, of key and value
    V_P = phi^T theta_P                             logits, scaled by 1/sqrt(C') in the published models
    softmax(V_P)                                    attention
    O_P = softmax(V_P) gamma_P^T                    context
    W_o                                             out_project
    Y_P = cat(W_o(O_P^T), X)                        bottleneck(cat(...)) of APNB and AFNB: no residual addition

    APNB, section 3.2   lets features attend to themselves; the published models share its query's and key's projection
    AFNB, section 3.3   fuses the last two stages: queries from c4, keys and values from c3 (the paper's Stage5, Stage4)

Some names are those of the published checkpoints: stages, bottleneck, fusion, context (APNB). What changes here must
change in the other forms too: SampledFirst in support/fast.py, and MatrixPooling in tools/export.py.
"""

import torch
import torch.nn.functional as F
from torch import nn

from resnet_d8 import ConvBNReLU, Head, Segmentor


class PyramidPooling(nn.Module):
    """(N, C, H, W) to (N, C, S): the averages over grids of 1x1, 3x3, 6x6 and 8x8 cells, S = 110."""

    def forward(self, x):
        x = x.contiguous()  # channels first: torch's pooling of channels last is slow on a GPU
        return torch.cat([F.adaptive_avg_pool2d(x, n).flatten(2) for n in (1, 3, 6, 8)], dim=2)


class AsymmetricNonLocalBlock(nn.Module):
    """What the positions of `x` gather from 110 samples of `y`: (N, C_x, H, W) and (N, C_y, H, W) to (N, C_x, H, W).
    Its output starts at zero.

    channels  C', of queries, keys and values: 256, or 64 for depth 18 and 34
    shared    whether query and key have one projection
    """

    def __init__(self, x_channels, y_channels, channels, shared):
        super().__init__()
        self.key_project = ConvBNReLU(y_channels, channels, 1)
        self.query_project = self.key_project if shared else ConvBNReLU(x_channels, channels, 1)
        self.value_project = nn.Conv2d(y_channels, channels, 1)
        self.out_project = nn.Conv2d(channels, x_channels, 1)
        self.pool = PyramidPooling()
        nn.init.zeros_(self.out_project.weight)
        nn.init.zeros_(self.out_project.bias)

    def attention(self, x, y):                                  # (N, C_x, H, W), (N, C_y, H, W)
        query = self.query_project(x).flatten(2)                # (N, C', HW)
        key = self.pool(self.key_project(y))                    # (N, C', S)
        logits = query.transpose(1, 2) @ key                    # (N, HW, S)
        return (logits * key.shape[1] ** -0.5).softmax(dim=2)   # (N, HW, S)

    def forward(self, x, y):                                    # (N, C_x, H, W), (N, C_y, H, W)
        value = self.pool(self.value_project(y))                # (N, C', S)
        context = self.attention(x, y) @ value.transpose(1, 2)  # (N, HW, C')
        context_map = context.transpose(1, 2).unflatten(2, x.shape[2:])
        return self.out_project(context_map)                    # (N, C_x, H, W)


class AFNB(nn.Module):
    """Asymmetric Fusion Non-local Block: c3 and c4 to features of c4's shape."""

    def __init__(self, c3_channels, c4_channels, channels):
        super().__init__()
        self.stages = nn.ModuleList([AsymmetricNonLocalBlock(c4_channels, c3_channels, channels, shared=False)])
        self.bottleneck = ConvBNReLU(2 * c4_channels, c4_channels, 1, relu=False)

    def forward(self, c3, c4):                                  # (N, 1024, H, W), (N, 2048, H, W)
        context = self.stages[0](c4, c3)                        # (N, 2048, H, W)
        return self.bottleneck(torch.cat([context, c4], 1))     # (N, 2048, H, W)


class APNB(nn.Module):
    """Asymmetric Pyramid Non-local Block: (N, 512, H, W) to the same shape."""

    def __init__(self, in_channels, channels):
        super().__init__()
        self.stages = nn.ModuleList([AsymmetricNonLocalBlock(in_channels, in_channels, channels, shared=True)])
        self.bottleneck = ConvBNReLU(2 * in_channels, in_channels, 1)

    def forward(self, x):                                       # (N, 512, H, W)
        context = self.stages[0](x, x)                          # (N, 512, H, W)
        return self.bottleneck(torch.cat([context, x], 1))      # (N, 512, H, W)


class ANNHead(Head):
    """AFNB, a 3x3 convolution, APNB, classifier (section 3.4)."""

    def __init__(self, c3_channels, c4_channels, channels, num_classes):
        super().__init__(channels, num_classes)
        self.fusion = AFNB(c3_channels, c4_channels, channels // 2)
        self.bottleneck = ConvBNReLU(c4_channels, channels, 3)
        self.context = APNB(channels, channels // 2)

    def forward(self, c3, c4):                                  # (N, 1024, H, W), (N, 2048, H, W)
        x = self.dropout(self.fusion(c3, c4))                   # (N, 2048, H, W)
        x = self.context(self.bottleneck(x))                    # (N, 512, H, W)
        return self.classify(x)                                 # (N, K, H, W)


class ANN(Segmentor):
    """ANN for segmentation; the arguments, input and output are Segmentor's."""

    head = ANNHead
