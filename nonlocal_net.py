"""Non-local Neural Networks.

Wang, Girshick, Gupta, He (CVPR 2018), https://arxiv.org/abs/1711.07971

The response at a position is a weighted sum of the features at all positions:

    eq. 1   y_i = 1 / C(x)  sum_j f(x_i, x_j) g(x_j)
    eq. 6   z_i = W_z y_i + x_i

    paper                    f(x_i, x_j)                             C(x)                   mode
    eq. 2  Gaussian          exp(x_i . x_j)                          sum_j f(x_i, x_j)      gaussian
    eq. 3  embedded Gaussian exp(theta(x_i) . phi(x_j))              sum_j f(x_i, x_j)      embedded_gaussian
    eq. 4  dot product       theta(x_i) . phi(x_j)                   HW                     dot_product
    eq. 5  concatenation     ReLU(w_f . [theta(x_i), phi(x_j)])      HW                     concatenation

    theta, phi, g            theta, phi, g: 1x1 convolutions to C/r channels
    w_f                      concat_project
    W_z                      conv_out: 1x1 convolution and BatchNorm

The published models scale the embedded Gaussian's logits by 1/sqrt(channels), which the paper does not. The block sits
between the first two 3x3 convolutions of an FCN head.
"""

import torch.nn.functional as F
from torch import nn

from resnet_d8 import ConvBNReLU, FCNHead, Segmentor


def projection(in_channels, out_channels):
    """theta, phi or g: a 1x1 convolution, under the published name `conv`."""
    layers = nn.Sequential()
    layers.conv = nn.Conv2d(in_channels, out_channels, 1)
    nn.init.normal_(layers.conv.weight, std=0.01)
    nn.init.zeros_(layers.conv.bias)
    return layers


def tokens(x):                                              # (N, C, H, W)
    """The positions as rows."""
    return x.flatten(2).transpose(1, 2)                     # (N, HW, C)


def attend(theta, phi, g, scale):
    """sum_j softmax_j(scale theta_i . phi_j) g_j, by a kernel that never holds the HW x HW weights. That kernel
    needs contiguous rows, and values with as many channels as theta; otherwise torch uses one that holds them."""
    values = F.pad(g, (0, theta.shape[2] - g.shape[2]))
    heads = (t.contiguous()[:, None] for t in (theta, phi, values))     # one attention head: (N, 1, HW, channels)
    return F.scaled_dot_product_attention(*heads, scale=scale)[:, 0, :, : g.shape[2]]


class NonLocalBlock(nn.Module):
    """(N, C, H, W) to the same shape (section 3.3, figure 2). Starts as the identity: conv_out.bn.weight is zero.

    reduction  r, such that theta, phi and g have C/r channels
    mode       the pairwise function, see above
    """

    def __init__(self, channels, reduction=2, mode="embedded_gaussian"):
        super().__init__()
        assert mode in ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
        inner = channels // reduction
        self.mode = mode
        self.g = projection(channels, inner)
        self.conv_out = ConvBNReLU(inner, channels, 1, relu=False)
        nn.init.zeros_(self.conv_out.bn.weight)
        if mode != "gaussian":
            self.theta = projection(channels, inner)
            self.phi = projection(channels, inner)
        if mode == "concatenation":
            self.concat_project = nn.Sequential()
            self.concat_project.conv = nn.Conv2d(2 * inner, 1, 1, bias=False)
            nn.init.kaiming_normal_(self.concat_project.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):                                   # (N, C, H, W)
        g = tokens(self.g(x))                               # (N, HW, C/r)
        if self.mode == "gaussian":
            theta = phi = tokens(x)                         # (N, HW, C)
        else:
            theta = tokens(self.theta(x))                   # (N, HW, C/r)
            phi = tokens(self.phi(x))                       # (N, HW, C/r)
        y = self.weighted_sum(theta, phi, g)                # (N, HW, C/r)
        y_map = y.transpose(1, 2).unflatten(2, x.shape[2:]) # (N, C/r, H, W)
        return x + self.conv_out(y_map)                     # (N, C, H, W)

    def weighted_sum(self, theta, phi, g):
        """sum_j f(x_i, x_j) g(x_j) / C(x) of eq. 1: theta, phi, g (N, HW, channels) to y (N, HW, C/r)."""
        if self.mode == "gaussian":
            return attend(theta, phi, g, scale=1.0)
        if self.mode == "embedded_gaussian":
            return attend(theta, phi, g, scale=theta.shape[2] ** -0.5)
        root = g.shape[1] ** 0.5  # sqrt(HW), HW = C(x): dividing by it twice, before summing, avoids float16 overflow
        if self.mode == "dot_product":
            # sum_j (theta_i . phi_j) g_j = theta_i (sum_j phi_j g_j^T): no HW x HW weights are needed.
            return theta @ ((phi / root).transpose(1, 2) @ (g / root))
        w_theta, w_phi = (self.concat_project.conv.weight.flatten(1).T / root).chunk(2)
        f = F.relu(theta @ w_theta + (phi @ w_phi).transpose(1, 2))     # (N, HW, HW)
        return f @ (g / root)


class NonLocalHead(FCNHead):
    """The FCN head with a non-local block between its first two convolutions."""

    def __init__(self, c3_channels, c4_channels, channels, num_classes, reduction=2, mode="embedded_gaussian"):
        super().__init__(c3_channels, c4_channels, channels, num_classes)
        self.nl_block = NonLocalBlock(channels, reduction, mode)

    def context(self, x):                                   # (N, 512, H, W)
        return self.nl_block(x)


class NonLocalNet(Segmentor):
    """NonLocalNet for segmentation; reduction and mode are NonLocalBlock's, the rest is Segmentor's."""

    head = NonLocalHead
