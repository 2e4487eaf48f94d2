"""The resizing of images. A window of the result is computed without the rest of it, and is the same as a crop of the
whole: each pixel is a weighted mean of the four around its place in the image (compared in tests/test_fast.py)."""

import numpy as np
import torch
import torch.nn.functional as F


def resize(image, size, window=None):
    """Bilinear with half-pixel centres and no antialiasing, as OpenCV's INTER_LINEAR, to within one grey level.

    image uint8 (H, W, 3), on the CPU -> uint8 (*size, 3), or only its window (top, left, height, width). An image that
    has this size already is returned as it is.
    """
    if not window and size == image.shape[:2]:
        return image
    window = top, left, h, w = window or (0, 0, *size)
    if (top + h) * (left + w) > 3 * h * w:
        return sample(image, size, window)
    # F.interpolate's kernel for uint8, with the scale of the whole image. It begins with the first pixel of the image.
    rows, bottom = needed(top + h, image.shape[0], size[0])
    columns, right = needed(left + w, image.shape[1], size[1])
    source = image[:rows, :columns].permute(2, 0, 1)[None]
    scales = size[0] / image.shape[0], size[1] / image.shape[1]
    out = torch.ops.aten.upsample_bilinear2d(source, [bottom, right], False, *scales)
    return out[0, :, top : top + h, left : left + w].permute(1, 2, 0)


def needed(count, old, new):
    """(given, asked): the pixels of `old` on which the first `count` of `new` depend, and how many to ask the kernel
    for: asked for one, it errs on some processors; asked for as many as it is given, it copies them."""
    given = min(count * old // new + 2, old)
    asked = max(count, 2)
    return given, asked + (asked == given)


def sample(image, size, window):
    """`resize` for a window far from the first pixel: slower for each pixel, but nothing else is computed."""
    top, left, h, w = window
    rows, y = positions(top, h, image.shape[0], size[0])
    columns, x = positions(left, w, image.shape[1], size[1])
    grid = torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=-1)
    source = image[rows, columns].permute(2, 0, 1)[None].float()
    out = F.grid_sample(source, grid[None], padding_mode="border", align_corners=True)
    return torch.from_numpy(out[0].round_().numpy().astype(np.uint8)).permute(1, 2, 0)  # Tensor.byte() is slow


def positions(first, count, old, new):
    """Where `count` pixels, from `first` on, of a side of `new` lie on the side of `old` from which it is resized: the
    slice of old pixels around them, and their places in it, -1 at its first pixel's centre to 1 at its last's."""
    place = ((torch.arange(first, first + count, dtype=torch.float64) + 0.5) * (old / new) - 0.5).clamp(0, old - 1)
    start, stop = int(place[0]), min(int(place[-1]) + 2, old)
    return slice(start, stop), ((place - start) * (2 / max(stop - start - 1, 1)) - 1).float()
