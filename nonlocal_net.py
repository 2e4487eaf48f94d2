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

    theta, phi, g            theta, phi, g: 1x1 convolutions to C/reduction channels
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
    # Contiguous, or the attention below would fall back to the kernel that holds all (HW)^2 weights.
    return x.flatten(2).transpose(1, 2).contiguous()        # (N, HW, C)


class NonLocalBlock(nn.Module):
    """(N, C, H, W) to the same shape (section 3.3, figure 2). Starts as the identity: conv_out's BatchNorm is at zero.

    reduction  C / channels of theta, phi and g
    mode       the pairwise function, see above
    """

    def __init__(self, channels, reduction=2, mode="embedded_gaussian"):
        super().__init__()
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
        g = tokens(self.g(x))                               # (N, HW, C/2)
        if self.mode == "gaussian":
            theta = phi = tokens(x)                         # (N, HW, C)
        else:
            theta = tokens(self.theta(x))                   # (N, HW, C/2)
            phi = tokens(self.phi(x))                       # (N, HW, C/2)
        y = getattr(self, self.mode)(theta, phi, g)         # (N, HW, C/2)
        y_map = y.transpose(1, 2).unflatten(2, x.shape[2:]) # (N, C/2, H, W)
        return x + self.conv_out(y_map)                     # (N, C, H, W)

    # sum_j f(x_i, x_j) g(x_j) / C(x) of each mode: theta, phi, g (N, HW, channels) to y (N, HW, C/2).

    def gaussian(self, theta, phi, g):
        # Values of as many channels as x, or the attention would fall back to the kernel that holds all (HW)^2 weights.
        values = F.pad(g, (0, theta.shape[2] - g.shape[2]))                 # (N, HW, C)
        return attend(theta, phi, values, scale=1.0)[..., : g.shape[2]]

    def embedded_gaussian(self, theta, phi, g):
        return attend(theta, phi, g, scale=theta.shape[2] ** -0.5)

    def dot_product(self, theta, phi, g):
        # sum_j (theta_i . phi_j) g_j = theta_i (sum_j phi_j g_j^T): without the softmax no HW x HW weights are needed.
        return theta @ (phi.transpose(1, 2) @ g / g.shape[1])

    def concatenation(self, theta, phi, g):
        w_theta, w_phi = self.concat_project.conv.weight.flatten().chunk(2)
        f = F.relu((theta @ w_theta)[:, :, None] + (phi @ w_phi)[:, None])  # (N, HW, HW)
        return f @ g / g.shape[1]


def attend(theta, phi, g, scale):
    """sum_j softmax_j(scale theta_i . phi_j) g_j, without holding the HW x HW weights at once."""
    heads = (t[:, None] for t in (theta, phi, g))           # one head: (N, 1, HW, channels)
    return F.scaled_dot_product_attention(*heads, scale=scale)[:, 0]


class NonLocalHead(FCNHead):
    """The FCN head with a non-local block between its first two convolutions."""

    def __init__(self, in_channels, channels, num_classes, reduction, mode):
        super().__init__(in_channels, channels, num_classes)
        self.nl_block = NonLocalBlock(channels, reduction, mode)

    def context(self, x):                                   # (N, 512, H, W)
        return self.nl_block(x)


class NonLocalNet(Segmentor):
    """NonLocalNet for segmentation; reduction and mode are NonLocalBlock's, the rest is Segmentor's."""

    def __init__(self, num_classes, depth=50, align_corners=False, reduction=2, mode="embedded_gaussian", **options):
        super().__init__(num_classes, depth, align_corners, **options)
        self.decode_head = NonLocalHead(self.backbone.channels[3], self.channels, num_classes, reduction, mode)
