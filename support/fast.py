"""Inference as evaluate.py runs it: the plain form's result, but faster or in less memory (tests/test_fast.py)."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval
from tqdm import tqdm

from ann import ANN
from support.command import BAR
from support.fast_loss import bands, bilinear
from support.images import VOID, normalise, window_starts
from support.processes import rank_and_world


def for_inference(model, device, dtype=None, compiled=False):
    """A Segmentor in eval mode on a device, made faster; in mixed precision if dtype is bfloat16 or float16.

    It is changed in place: a second copy of the weights could need more memory than the inference does. In eval mode a
    BatchNorm and the convolution before it are one linear map, so they become one convolution.
    """
    fold_batchnorm(model)
    if isinstance(model, ANN):
        head = model.decode_head
        head.fusion, head.context = SampledFirst(head.fusion), SampledFirst(head.context)
    if dtype:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.to(dtype)  # autocast would convert the weights in every call
        model.forward = torch.autocast(device.type, dtype)(model.forward)
    model.to(device, memory_format=torch.channels_last)
    return torch.compile(model) if compiled else model


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


@torch.inference_mode()
def slide_labels(model, image, crop_size, stride, label=None):
    """The classes of evaluate.slide_inference for an image of any size: uint8 RGB (H, W, 3) to (uint8 (H, W) on the
    CPU, loss of `label` or None), as `classes_and_loss` gives them.

    The same, since a row of the image is finished once all windows that cover it are done: only the logits of one row
    of windows, as wide as the image, are held at once.
    """
    device = next(model.parameters()).device
    (height, width), (h, w) = image.shape[:2], crop_size
    tops, lefts = window_starts(height, h, stride[0]), window_starts(width, w, stride[1])
    total = torch.zeros(1, model.num_classes, min(h, height), width, device=device)
    count = torch.zeros(min(h, height), width, device=device)
    classes = torch.empty(height, width, dtype=torch.uint8)
    loss = 0.0
    bar = tqdm(tops, "rows of windows", delay=10, leave=False, disable=rank_and_world()[0] > 0, **BAR)
    for top, next_top in zip(bar, [*tops[1:], height], strict=True):
        strip = normalise(image[top : top + h].permute(2, 0, 1)[None].to(device))   # (1, 3, h, W)
        for left in lefts:
            columns = slice(left, left + w)
            total[:, :, :, columns] += model(strip[:, :, :, columns])
            count[:, columns] += 1
        rows, done = slice(top, next_top), next_top - top
        part = None if label is None else label[rows]
        classes[rows], part_loss = classes_and_loss(total[0, :, :done] / count[:done], part)
        loss = None if label is None else loss + part_loss
        total = F.pad(total[:, :, done:], (0, 0, 0, done))                          # moved up by the finished rows
        count = F.pad(count[done:], (0, 0, 0, done))
    return classes, loss


def resized_classes(logits, size, align_corners, label=None):
    """classes_and_loss of evaluate.resize_logits(logits, size) for logits (1, K, h, w), a band of rows at a time: for a
    photograph and many classes the resized logits could fill the memory."""
    if logits.shape[2:] == size:
        return classes_and_loss(logits[0], label)
    row_matrix = bilinear(logits.shape[2], size[0], align_corners, logits)  # (H, h)
    parts = []
    for rows, small in bands(row_matrix, logits.shape[1] * size[1]):
        part = row_matrix[rows, small] @ logits[0, :, small]                # (K, rows, w)
        part = F.interpolate(part[None], (part.shape[1], size[1]), mode="bilinear", align_corners=align_corners)
        parts.append(classes_and_loss(part[0], None if label is None else label[rows]))
    classes, losses = zip(*parts, strict=True)
    return torch.cat(classes), None if label is None else sum(losses)


def classes_and_loss(scores, label=None):
    """(the class of the largest score of each pixel, uint8 (H, W) on the CPU; the cross-entropy of scores (K, H, W) as
    logits, summed over the valid pixels of `label`, None without one). Raises FloatingPointError if a score is not a
    number."""
    largest = scores.max(0)
    if largest.values.isnan().any():
        raise FloatingPointError("the model's scores are not numbers")
    loss = None
    if label is not None:
        target = label[None].to(scores.device).long()
        loss = F.cross_entropy(scores[None], target, ignore_index=VOID, reduction="sum").item()
    return largest.indices.byte().cpu(), loss
