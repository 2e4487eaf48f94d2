"""Inference as evaluate.py runs it: a Segmentor's result, but faster and in less memory. Each part says why the result
is the same, and is compared with the plain form in tests/test_fast.py.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from ann import ANN

ROWS = 32  # of logits, at once
# ----------------------------------------------------------------------------------------------- resizing the logits


def resized(logits, size, align_corners):
    """Logits (N, K, h, w), bilinearly resized to (height, width) if they do not have that size already."""
    if logits.shape[2:] == size:
        return logits
    return F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)


def resized_rows(logits, sizes, align_corners):
    """Yields (rows, part): logits (N, K, h, w) resized bilinearly to each of `sizes` in turn, a few rows at a time.
    rows is a slice of the last size's height, part (N, K, ROWS or fewer, width).

    The same as F.interpolate, which is linear along each axis: any number of resizes is one matrix for the rows and one
    for the columns. A few rows stay in the processor's cache, and nothing of K x height x width is made, but where the
    logits of sliding windows have that size anyway.
    """
    height = sizes[-1][0]
    if logits.shape[2:] == sizes[0]:  # from sliding windows: too large for a matrix, and held at full size already
        logits = resized(logits, sizes[-1], align_corners)
        for start in range(0, height, ROWS):
            yield slice(start, start + ROWS), logits[:, :, start : start + ROWS]
        return
    down, across = (bilinear(sides, align_corners) for sides in zip(logits.shape[2:], *sizes, strict=True))
    logits = logits @ across.T.to(logits)
    for start in range(0, height, ROWS):
        rows = slice(start, min(start + ROWS, height))
        nonzero = down[rows].any(0).nonzero()
        used = slice(nonzero[0], nonzero[-1] + 1)
        yield rows, down[rows, used].to(logits) @ logits[:, :, used]


def bilinear(sides, align_corners):
    """float32 (sides[-1], sides[0]): the matrix of the bilinear resizes from each side length to the next."""
    matrix = torch.eye(sides[0])
    for side in sides[1:]:
        matrix = F.interpolate(matrix[None], side, mode="linear", align_corners=align_corners)[0]
    return matrix.T


# --------------------------------------------------------------------------------------------------------- the model


def for_inference(model, device, dtype=None, compiled=False):
    """A Segmentor made into an `Inference` on a device, in mixed precision if dtype is bfloat16 or float16.

    It is changed in place: a second copy of the weights could need more memory than the inference does.
    """
    fast = Inference(model, dtype).to(device, memory_format=torch.channels_last)
    return torch.compile(fast) if compiled else fast


class Inference(nn.Module):
    """A Segmentor as it evaluates: images (N, 3, H, W) to logits (N, K, H/8, W/8), rounded up, which `resized_rows`
    brings to size. In eval mode a BatchNorm and the convolution before it are one linear map, so they become one."""

    def __init__(self, model, dtype=None):
        super().__init__()
        self.model = fold_batchnorm(model)
        self.num_classes = model.num_classes
        self.align_corners = model.align_corners
        self.dtype = dtype
        if isinstance(model, ANN):
            head = model.decode_head
            head.fusion, head.context = SampledFirst(head.fusion), SampledFirst(head.context)
        if dtype:
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    module.to(dtype)  # autocast would convert the weights in every call

    def forward(self, images):
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not None):
            return self.model.coarse(images)[0].to(images.dtype)


def fold_batchnorm(model):
    """The model in eval mode with every BatchNorm in the convolution before it."""
    for module in model.eval().modules():
        for (name, conv), (bn_name, bn) in itertools.pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d | nn.SyncBatchNorm):
                setattr(module, name, fuse_conv_bn_eval(conv, bn))
                setattr(module, bn_name, nn.Identity())
    return model


class SampledFirst(nn.Module):
    """AFNB or APNB of ANN, its BatchNorms folded, with all that acts on the context alone applied to the 110 samples
    instead of the HW positions. The same, since for attention A, samples v, bottleneck (W_1, W_2) of cat(context, x):

        W_1 W_o (A W_v v) + W_2 x = A (W_1 W_o W_v v) + W_2 x

    The biases may go along, because the weights in A sum to one.
    """

    def __init__(self, block):
        super().__init__()
        self.block, self.relu = block.stages[0], block.bottleneck.relu
        w_1, w_2 = block.bottleneck.conv.weight.flatten(1).chunk(2, dim=1)
        w_o, w_v = self.block.out_project.weight.flatten(1), self.block.value_project.weight.flatten(1)
        bias = w_1 @ (w_o @ self.block.value_project.bias + self.block.out_project.bias) + block.bottleneck.conv.bias
        self.of_samples = conv1x1(w_1 @ w_o @ w_v, bias)
        self.of_x = conv1x1(w_2)

    def forward(self, y, x=None):                                       # AFNB's c3 and c4, or APNB's x
        x = y if x is None else x
        value = self.of_samples(self.block.pool(y)[..., None])          # (N, C, S, 1)
        context = self.block.attention(x, y) @ value[..., 0].transpose(1, 2)
        context = context.transpose(1, 2).unflatten(2, x.shape[2:])     # (N, C, H, W)
        return self.relu(context + self.of_x(x))                        # (N, C, H, W)


def conv1x1(weight, bias=None):
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bias is not None)
    conv.load_state_dict({"weight": weight[..., None, None]} | ({} if bias is None else {"bias": bias}))
    return conv
