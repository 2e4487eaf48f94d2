"""The loss of train.py: the same value and gradient as its plain form, in less time and memory (tests/test_fast.py)."""

import torch
import torch.nn.functional as F

from support.images import VOID

BAND = {"cpu": 2**22, "cuda": 2**26}  # how many resized logits exist at once


def resized_cross_entropy(logits, labels, weight=None, align_corners=False):
    """F.cross_entropy(resized, labels, weight, ignore_index=255, reduction="sum") of logits (N, K, h, w), where
    `resized` is F.interpolate of them to the size of labels (N, H, W). For float16 and bfloat16 in float32."""
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return ResizedCrossEntropy.apply(logits, labels, weight, align_corners)


class ResizedCrossEntropy(torch.autograd.Function):
    """The sum and its gradient, one band of rows after another: neither the K x H x W resized logits nor their
    softmax ever exist as a whole.

    Bilinear resizing is a matrix for the rows and one for the columns. The gradient of the cross-entropy is softmax
    minus one-hot, so it is known in the forward pass; the transposed matrices bring it to the size of the logits, and
    the backward pass only scales it.
    """

    @staticmethod
    def forward(ctx, logits, labels, weight, align_corners):
        (n, k, h, w), (height, width) = logits.shape, labels.shape[1:]
        row_matrix, col_matrix = bilinear(h, height, align_corners, logits), bilinear(w, width, align_corners, logits)
        wide = logits.contiguous() @ col_matrix.T                                 # (N, K, h, W)
        wide_gradient = torch.zeros_like(wide)                                    # (N, K, h, W)
        loss = logits.new_zeros(())
        for rows, small in bands(row_matrix, n * k * width):
            classes = labels[:, None, rows]                                       # (N, 1, rows, W)
            valid = classes != VOID
            classes = classes.where(valid, 0)
            terms = valid.to(wide) if weight is None else weight.to(wide)[classes] * valid
            log_p = (row_matrix[rows, small] @ wide[:, :, small]).log_softmax(1)  # (N, K, rows, W)
            log_p_true = log_p.gather(1, classes)                                 # (N, 1, rows, W)
            loss -= (log_p_true * terms).sum()
            gradient = log_p.exp_().scatter_(1, classes, log_p_true.exp() - 1).mul_(terms)
            wide_gradient[:, :, small] += row_matrix[rows, small].T @ gradient
        ctx.save_for_backward(wide_gradient @ col_matrix)
        return loss

    @staticmethod
    def backward(ctx, scale):
        (gradient,) = ctx.saved_tensors
        return gradient * scale, None, None, None


def bands(matrix, row):
    """Slices (rows, columns) of a resizing matrix: as many rows at a time as BAND allows, each of `row` resized logits,
    and the columns that these need."""
    size = max(BAND.get(matrix.device.type, BAND["cpu"]) // row, 1)
    for top in range(0, len(matrix), size):
        rows = slice(top, top + size)
        needed = matrix[rows].any(0).nonzero()
        yield rows, slice(int(needed[0]), int(needed[-1]) + 1)


def bilinear(old, new, align_corners, like):
    """(new, old): the matrix that resizes a side bilinearly, of the dtype and device of the tensor `like`."""
    identity = torch.eye(old, dtype=like.dtype, device=like.device)
    return F.interpolate(identity[None], new, mode="linear", align_corners=align_corners)[0].T
