"""Evaluates a checkpoint on a data set: IoU and accuracy of each class, mIoU, mAcc and aAcc.

    python evaluate.py                                    # the newest run below runs/
    python evaluate.py runs/gcnet-r50-ade20k/best.pt      # or any checkpoint; it holds its own settings
    python evaluate.py --aug                              # multi-scale + flip: the mean of 12 views
    torchrun --nproc_per_node=4 evaluate.py               # shared among processes, the same result

The modes, the resizing and the metrics are those of the published tables.
"""

import itertools
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from data import VOID, InputError, SegmentationData, keep_ratio, normalise, resize
from support import checkpoint
from support.command import Parser, ignore_signals, run, start_process, whole_number
from support.layouts import CITYSCAPES_IDS
from support.settings import AMP, PRESETS

RATIOS = (1.75, 1.5, 1.25, 1.0, 0.75, 0.5)  # the largest first: the allocator has its memory for the others then
# So many pixels of images, windows or views go through the network together: those of one Cityscapes image; on a CPU
# those of 512x512, beyond which it gains nothing.
BATCH_PIXELS = 2**21 if torch.cuda.is_available() else 2**18


# --------------------------------------------------------------------------------------------------- inference modes


def whole_inference(model, images):
    """Logits (N, K, H, W) of normalised images (N, 3, H, W), all at once."""
    return model(images)


def slide_inference(model, images, crop_size, stride):
    """Logits (N, K, H, W) of normalised images (N, 3, H, W): the mean over the windows that cover a pixel.

    Windows of crop_size lie on the grid of stride, the last ones shifted back inside; sizes are (height, width). An
    image smaller than the window is taken as it is.
    """
    (height, width), (h, w) = images.shape[2:], crop_size
    tops, lefts = window_starts(height, h, stride[0]), window_starts(width, w, stride[1])
    windows = [(slice(top, top + h), slice(left, left + w)) for top in tops for left in lefts]
    at_once = max(BATCH_PIXELS // (len(images) * h * w), 1)
    total, count = None, images.new_zeros(height, width)
    for i in range(0, len(windows), at_once):
        logits = model(torch.cat([images[:, :, y, x] for y, x in windows[i : i + at_once]]))
        if total is None:
            total = logits.new_zeros(len(images), logits.shape[1], height, width)
        for (y, x), window_logits in zip(windows[i : i + at_once], logits.split(len(images)), strict=True):
            total[:, :, y, x] += window_logits
            count[y, x] += 1
    return total.div_(count)


def window_starts(side, window, stride):
    """Where windows begin along a side: the grid, the last one shifted back inside."""
    steps = max(side - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride, side - window), 0) for i in range(steps)]


def bilinear(sides, align_corners):
    """float32 (sides[-1], sides[0]): the matrix of the bilinear resizes from each side length to the next."""
    matrix = torch.eye(sides[0])
    for side in sides[1:]:
        matrix = F.interpolate(matrix[None], side, mode="linear", align_corners=align_corners)[0]
    return matrix.T


def logits_by_rows(model, images, size, crop_size=None, stride=None, count=32):
    """Yields (rows, logits (N, K, count, width)) of normalised images, until all rows of `size` have come.

    By sliding windows if a stride is given, else whole. The logits are resized to the images' size, then to `size`,
    (height, width). Both resizes are linear, so one matrix for the rows and one for the columns do them at once; a few
    rows at a time stay in the processor's cache, and nothing of K x height x width is made.
    """
    if stride:
        logits = slide_inference(model, images, crop_size, stride)
        sizes = [logits.shape[2:], size]
    else:
        at_once = max(BATCH_PIXELS // images[0, 0].numel(), 1)
        logits = torch.cat([model.coarse(some)[0] for some in images.split(at_once)])
        sizes = [logits.shape[2:], images.shape[2:], size]
    down, across = (bilinear(sides, model.align_corners) for sides in zip(*sizes, strict=True))
    logits = logits.to(images.dtype)
    if not stride:
        logits = logits @ across.T.to(logits)  # (N, K, h, width); what windows gave is too wide for a matrix
    for start in range(0, size[0], count):
        rows = slice(start, min(start + count, size[0]))
        used = down[rows].any(0).nonzero()
        used = slice(used[0], used[-1] + 1)  # the few rows between which these lie
        part = down[rows, used].to(logits) @ logits[:, :, used]
        if stride:
            part = F.interpolate(part, part.shape[2:3] + size[1:], mode="bilinear", align_corners=model.align_corners)
        yield rows, part


@torch.inference_mode()
def multi_scale_flip(model, image, scale, ratios=RATIOS, crop_size=None, stride=None):
    """Mean of the softmax over views of one image, float32 (K, H, W).

    image   uint8 RGB (H, W, 3)
    scale   (long, short): the view of ratio r is the image at keep-ratio (long r, short r), plain and mirrored
    """
    device, size = next(model.parameters()).device, tuple(image.shape[:2])
    image = torch.as_tensor(image)
    total = torch.zeros(model.decode_head.conv_seg.out_channels, *size, device=device)
    for ratio in ratios:
        view = resize(image, keep_ratio(size, [int(side * ratio) for side in scale]))
        view = normalise(view.permute(2, 0, 1)[None].to(device))
        views = torch.cat([view, view.flip(3)])
        for rows, (plain, mirrored) in logits_by_rows(model, views, size, crop_size, stride):
            total[:, rows] += plain.softmax(0) + mirrored.softmax(0).flip(2)
    return total.div_(2 * len(ratios))


@torch.inference_mode()
def scores_by_rows(model, images, config, aug=False):
    """Yields (rows, scores (N, K, some rows, W)) of uint8 RGB images (N, H, W, 3) as a checkpoint's config says: the
    logits, or with aug the mean probabilities. A pixel's class has the largest."""
    size = tuple(images.shape[1:3])
    scale, window = config["scale"] or size, (config["crop_size"], config["stride"])
    if aug:
        yield slice(None), torch.stack([multi_scale_flip(model, image, scale, RATIOS, *window) for image in images])
        return
    views = torch.stack([resize(image, keep_ratio(size, scale)) for image in images]).permute(0, 3, 1, 2)
    yield from logits_by_rows(model, normalise(views.to(next(model.parameters()).device)), size, *window)


def predict(model, images, config, aug=False):
    """The class of each pixel, uint8 (N, H, W) on the CPU; the arguments are those of `scores_by_rows`."""
    classes = [scores.max(1).indices.byte() for _, scores in scores_by_rows(model, images, config, aug)]
    return torch.cat(classes, dim=1).cpu()


# ------------------------------------------------------------------------------------------------ the model made fast


def fold_batchnorm(model):
    """The model in eval mode with every BatchNorm in the convolution before it: there both are linear."""
    for module in model.eval().modules():
        for (name, conv), (bn_name, bn) in itertools.pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(conv, bn))
                setattr(module, bn_name, nn.Identity())
    return model


def for_inference(model, device, amp="none", compiled=False):
    """The model as it evaluates: the same results to rounding, but with amp ("bf16" or "fp16": mixed precision)."""
    model = fold_batchnorm(model).to(device, memory_format=torch.channels_last)
    if amp != "none":
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.to(AMP[amp])  # autocast would do so in every call
        model.coarse = torch.autocast(device.type, AMP[amp])(model.coarse)
    if compiled:
        model.coarse = torch.compile(model.coarse)
    return model


# ----------------------------------------------------------------------------------------------------------- metrics


def confusion_matrix(prediction, label, num_classes):
    """int64 (K, K): pixels of class [row] predicted as [column]. Takes equal shapes of integers; void is left out."""
    valid = label != VOID
    pairs = label[valid].long() * num_classes + prediction[valid].long()
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def metrics(matrix):
    """IoU and Acc of each class (K,), their means mIoU and mAcc, and the accuracy of all pixels aAcc, in 0..1.

    A class neither labelled nor predicted has IoU NaN, one never labelled accuracy NaN; the means leave NaN out.
    """
    matrix = matrix.double()
    correct, labelled, predicted = matrix.diag(), matrix.sum(1), matrix.sum(0)
    iou, acc = correct / (labelled + predicted - correct), correct / labelled
    return {
        "IoU": iou,
        "Acc": acc,
        "mIoU": iou.nanmean().item(),
        "mAcc": acc.nanmean().item(),
        "aAcc": (correct.sum() / matrix.sum()).item(),
    }


def equal_sizes(samples, pixels):
    """Lists of successive (index, (image, label)) whose images have one size, and together at most so many pixels."""
    group = []
    for sample in samples:
        shape = sample[1][0].shape
        if group and (shape != group[0][1][0].shape or (len(group) + 1) * math.prod(shape[:2]) > pixels):
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def evaluate(model, data, config, aug=False, workers=0, rank=0, world=1, save=None, with_loss=False):
    """metrics() of the model, in eval mode, over a data set; with_loss adds the `loss` that training would have on it.

    Each of `world` processes takes every world-th image. save(index, prediction) is called with each label map; with
    it a split may be without labels, and the metrics are NaN.
    """
    device, indices = next(model.parameters()).device, range(rank, len(data), world)
    matrix = torch.zeros(len(data.classes), len(data.classes), dtype=torch.int64)
    loss = torch.zeros(2, dtype=torch.float64)  # summed over pixels, and their number
    loader = DataLoader(Subset(data, indices), batch_size=None, num_workers=workers, worker_init_fn=ignore_signals)
    with tqdm(loader, "evaluating", disable=rank > 0, leave=False, dynamic_ncols=True) as bar:
        for group in equal_sizes(zip(indices, bar, strict=True), 0 if aug else BATCH_PIXELS):
            images, labels = zip(*(sample for _, sample in group), strict=True)
            predictions = torch.empty(len(group), *images[0].shape[:2], dtype=torch.uint8)
            for rows, scores in scores_by_rows(model, torch.stack(images), config, aug):
                predictions[:, rows] = scores.max(1).indices.byte()
                if with_loss:
                    target = torch.stack(labels)[:, rows].to(device).long()
                    total = F.cross_entropy(scores, target, ignore_index=VOID, reduction="sum")
                    loss += torch.tensor([total.item(), target.numel()], dtype=torch.float64)
            for (i, (_, label)), prediction in zip(group, predictions, strict=True):
                if save:
                    save(i, prediction)
                elif label is None:
                    raise InputError(f"{data.name}: split {data.split!r} has no labels; --save DIR writes predictions")
                if label is not None:
                    matrix += confusion_matrix(prediction, label, len(data.classes))
    if world > 1:
        totals = torch.cat([matrix.flatten().double(), loss]).to(device)  # counts are exact in float64 up to 2^53
        dist.all_reduce(totals)
        matrix, loss = totals[:-2].reshape(matrix.shape).cpu(), totals[-2:].cpu()
    if not save and matrix.sum() == 0:
        raise InputError(f"{data.name}: all labels of the split {data.split!r} are void")
    result = metrics(matrix)
    return result | {"loss": (loss[0] / loss[1]).item()} if with_loss else result


def report(result, names):
    """The table of metrics() in percent, as text."""
    figures = zip(names, (100 * result["IoU"]).tolist(), (100 * result["Acc"]).tolist(), strict=True)
    rows = [f"{name:<24}{iou:>8.2f}{acc:>8.2f}" for name, iou, acc in figures]
    total = "mIoU {mIoU:.2%}   mAcc {mAcc:.2%}   aAcc {aAcc:.2%}".format(**result)
    return "\n".join([f"{'class':<24}{'IoU':>8}{'Acc':>8}", *rows, total])


def submission_table(dataset):
    """uint8 (256,): the value for each class in the label maps that a data set's test server takes."""
    table = np.arange(256, dtype=np.uint8)
    if dataset.startswith("cityscapes"):
        table[:19] = CITYSCAPES_IDS
    if dataset == "ade20k":
        table[:150] += 1
    return table


# ------------------------------------------------------------------------------------------------------ command line


def main():
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", nargs="?", help="file, URL or published name; default: runs/'s newest best.pt")
    parser.add_argument("--checkpoint", dest="named", metavar="CHECKPOINT", help="the same")
    parser.add_argument("--aug", action="store_true", help="multi-scale + flip, instead of one view")
    parser.add_argument("--dataset", choices=PRESETS, help="default: the one it was trained on")
    parser.add_argument("--data-root", help="the data set's folder; default: the one it was trained on")
    parser.add_argument("--split", default="val", help="train, val or test (default: val)")
    maps = parser.add_mutually_exclusive_group()
    maps.add_argument("--save", metavar="DIR", help="write the label maps: 8-bit PNG, the class index of each pixel")
    maps.add_argument("--submit", metavar="DIR", help="write them as the test servers of the data sets take them")
    parser.add_argument("--amp", choices=AMP, default="none", help="mixed precision")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network, anew for each size of image")
    parser.add_argument("--workers", type=whole_number, default=2, help="processes that read images (default: 2)")
    args = parser.parse_args()
    if args.checkpoint and args.named:
        raise InputError(f"two checkpoints: {args.checkpoint} and --checkpoint {args.named}")

    device, rank, world = start_process()
    source = args.checkpoint or args.named or checkpoint.newest_run() / "best.pt"
    model, config = checkpoint.load_model(source)
    name = args.dataset or config["dataset"]
    root = args.data_root or (config["data_root"] if name == config["dataset"] else None)
    data = SegmentationData(name, root, args.split)
    # Published files spell a few names of the well-known data sets otherwise; own classes must be the same.
    if len(data.classes) != len(config["classes"]) or (
        data.name == "folder" and list(data.classes) != config["classes"]
    ):
        names = [", ".join(some) for some in (data.classes[:4], config["classes"][:4])]
        raise InputError(
            f"--dataset {data.name}: its {len(data.classes)} classes ({names[0]} ...) are not the "
            f"{len(config['classes'])} of {source} ({names[1]} ...)"
        )
    model = for_inference(model, device, args.amp, args.compile)
    folder = Path(args.save or args.submit) if args.save or args.submit else None
    table = submission_table(data.name) if args.submit else np.arange(256, dtype=np.uint8)

    common = os.path.commonpath([path.parent for path, _ in data.files])

    def target(image):
        return (folder / (image.relative_to(common) if data.name == "folder" else image.name)).with_suffix(".png")

    own = {file.resolve() for pair in data.files for file in pair if file}
    if folder and any(target(image).resolve() in own for image, _ in data.files):
        raise InputError(f"{folder}: holds files of the data set, which would be overwritten; name another folder")

    def save(index, prediction):
        path = target(data.files[index][0])
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(table[prediction])
        if args.save or data.name == "voc12aug":
            picture.putpalette(np.array(data.palette, np.uint8).tobytes())
        picture.save(path)

    result = evaluate(model, data, config, args.aug, args.workers, rank, world, save if folder else None)
    if rank == 0 and not math.isnan(result["aAcc"]):
        print(report(result, data.classes))
    if rank == 0 and folder:
        print(f"{len(data)} label maps in {folder}/")


if __name__ == "__main__":
    run(main)
