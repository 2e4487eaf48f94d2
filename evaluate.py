"""Evaluates a checkpoint on a data set: IoU and accuracy of each class, mIoU, mAcc and aAcc.

    python evaluate.py                                    # the newest run below runs/
    python evaluate.py runs/gcnet-r50-ade20k/best.pt      # or any checkpoint; it holds its own settings
    python evaluate.py --aug                              # multi-scale + flip: the mean of 12 views
    torchrun --nproc_per_node=4 evaluate.py               # shared among processes, the same result

The modes, the resizing and the metrics are those of the published tables.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from data import keep_ratio, normalise, open_data
from support.checkpoint import load_model
from support.command import InputError, Parser, run_command, split_name, whole_number
from support.fast import for_inference, resized, resized_rows
from support.images import VOID
from support.pictures import LabelMaps
from support.processes import loading, patient, rank_and_world, start_process, sum_over_processes
from support.resize import resize
from support.results import ResultFile
from support.run import newest_checkpoint
from support.settings import AMP, PRESETS

RATIOS = (1.75, 1.5, 1.25, 1.0, 0.75, 0.5)  # the largest first, so that the others reuse its memory
# How many pixels of images, windows or views go through the network at once: one Cityscapes image; on a CPU 512x512,
# since more is not faster there.
BATCH_PIXELS = 2**21 if torch.cuda.is_available() else 2**18


# --------------------------------------------------------------------------------------------------- inference modes
# A model is a Segmentor, or fast.for_inference of one, which leaves the last resize to the caller.


def whole_inference(model, images):
    """Logits of normalised images (N, 3, H, W), as the model gives them: (N, K, H, W), or (N, K, H/8, W/8)."""
    at_once = max(BATCH_PIXELS // images[0, 0].numel(), 1)
    return torch.cat([model(chunk) for chunk in images.split(at_once)])


def slide_inference(model, images, crop_size, stride):
    """Logits (N, K, H, W) of normalised images (N, 3, H, W): the mean over the windows that cover a pixel.

    Windows of crop_size lie on the grid of stride, both (height, width); the last ones are shifted back inside. An
    image smaller than the window is taken as it is.
    """
    logits = images.new_empty(len(images), model.num_classes, *images.shape[2:])
    for rows, part in slide_by_rows(model, images, crop_size, stride):
        logits[:, :, rows] = part
    return logits


def slide_by_rows(model, images, crop_size, stride):
    """slide_inference from the top down: yields (rows, logits (N, K, rows, W)) once all windows that cover these rows
    are done, so that memory is held for one row of windows alone. Also takes uint8 images, on any device."""
    device = next(model.parameters()).device
    (height, width), (h, w) = images.shape[2:], crop_size
    tops, lefts = window_starts(height, h, stride[0]), window_starts(width, w, stride[1])
    at_once = max(BATCH_PIXELS // (len(images) * h * w), 1)
    total = torch.zeros(len(images), model.num_classes, min(h, height), width, device=device)
    count = torch.zeros(min(h, height), width, device=device)
    bar = tqdm(tops, "rows of windows", delay=10, leave=False, disable=rank_and_world()[0] > 0, dynamic_ncols=True)
    for top, following in zip(bar, [*tops[1:], height], strict=True):
        for chunk in (lefts[first : first + at_once] for first in range(0, len(lefts), at_once)):
            crops = torch.cat([images[:, :, top : top + h, left : left + w] for left in chunk]).to(device)
            crops = crops if crops.is_floating_point() else normalise(crops)                # (N * windows, 3, h, w)
            logits = resized(model(crops), crops.shape[2:], model.align_corners)            # (N * windows, K, h, w)
            for left, window_logits in zip(chunk, logits.split(len(images)), strict=True):
                total[:, :, :, left : left + w] += window_logits
                count[:, left : left + w] += 1
        done = following - top
        yield slice(top, following), total[:, :, :done].div_(count[:done])
        total = F.pad(total[:, :, done:], (0, 0, 0, done))
        count = F.pad(count[done:], (0, 0, 0, done))


def window_starts(side, window, stride):
    """Where windows begin along a side: the grid, the last one shifted back inside."""
    steps = max(side - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride, side - window), 0) for i in range(steps)]


def inference(model, images, crop_size=None, stride=None):
    """Logits of whole_inference or slide_inference: of sliding windows if there is a stride, else of whole images."""
    return slide_inference(model, images, crop_size, stride) if stride else whole_inference(model, images)


@torch.inference_mode()
def multi_scale_flip(model, image, scale, ratios=RATIOS, crop_size=None, stride=None):
    """Mean of the softmax over views of one image, float32 (K, H, W).

    image   uint8 RGB (H, W, 3)
    scale   (long, short): the view of ratio r is the image at keep-ratio (long r, short r), plain and mirrored
    """
    size = tuple(image.shape[:2])
    total = torch.zeros(model.num_classes, *size, device=next(model.parameters()).device)   # (K, H, W)
    for ratio in ratios:
        view = at_scale(image[None], [int(side * ratio) for side in scale]).to(total.device)
        view = normalise(view)                                                              # (1, 3, h, w)
        views = torch.cat([view, view.flip(3)])                                             # (2, 3, h, w)
        logits = inference(model, views, crop_size, stride)                                 # (2, K, h, w) or less
        for rows, (plain, mirrored) in resized_rows(logits, [views.shape[2:], size], model.align_corners):
            total[:, rows] += plain.softmax(0) + mirrored.softmax(0).flip(2)
    return total.div_(2 * len(ratios))


def at_scale(images, scale):
    """uint8 RGB images (N, H, W, 3) at keep-ratio (long, short), as uint8 (N, 3, h, w)."""
    size = keep_ratio(images.shape[1:3], scale)
    if size == tuple(images.shape[1:3]):
        return torch.as_tensor(images).permute(0, 3, 1, 2)
    return torch.stack([resize(torch.as_tensor(image), size) for image in images]).permute(0, 3, 1, 2)


@torch.inference_mode()
def scores_by_rows(model, images, config, aug=False):
    """Yields (rows, scores (N, K, some rows, W)) of uint8 RGB images (N, H, W, 3), as a checkpoint's config says: the
    logits, or with aug the mean probabilities. A pixel's class has the largest."""
    size = tuple(images.shape[1:3])
    scale = config["scale"] or size
    crop_size, stride = config["crop_size"], config["stride"]
    if aug:
        views = (multi_scale_flip(model, image, scale, RATIOS, crop_size, stride) for image in images)
        yield slice(None), torch.stack(list(views))                                         # (N, K, H, W)
        return
    views = at_scale(images, scale)                                                         # uint8 (N, 3, h, w)
    if stride and views.shape[2:] == size:
        yield from slide_by_rows(model, views, crop_size, stride)
    else:
        views = normalise(views.to(next(model.parameters()).device))                        # (N, 3, h, w)
        logits = inference(model, views, crop_size, stride)                                 # (N, K, h, w) or less
        yield from resized_rows(logits, [views.shape[2:], size], model.align_corners)


def predict(model, images, config, aug=False):
    """The class of each pixel, uint8 (N, H, W) on the CPU; the arguments are those of `scores_by_rows`."""
    labels = torch.empty(images.shape[:3], dtype=torch.uint8)
    for rows, scores in scores_by_rows(model, images, config, aug):
        labels[:, rows] = classes_of(scores)
    return labels


def classes_of(scores):
    """uint8 (N, h, W): the class of the largest of scores (N, K, h, W). Raises InputError if one is not a number."""
    largest = scores.max(1)
    if largest.values.isnan().any():
        raise InputError("the model's scores are not numbers: its training has diverged, or its checkpoint is damaged")
    return largest.indices.byte()


# ----------------------------------------------------------------------------------------------------------- metrics


def confusion_matrix(prediction, label, num_classes):
    """int64 (K, K): pixels of class [row] predicted as [column]. Takes equal shapes of integers; void is left out."""
    valid = label != VOID
    pairs = label[valid].long() * num_classes + prediction[valid].long()
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def metrics(matrix):
    """Of a confusion matrix: IoU, Acc (recall), Precision and Fscore of each class (K,), their means over the classes
    mIoU, mAcc, mPrecision and mFscore, the accuracy of all pixels aAcc, all in 0..1; and the matrix itself.

    A class neither labelled nor predicted has IoU and F-score NaN, one never labelled accuracy NaN, one never predicted
    precision NaN; the means leave NaN out.
    """
    counts = matrix.double()
    correct, labelled, predicted = counts.diag(), counts.sum(1), counts.sum(0)
    of_classes = {
        "IoU": correct / (labelled + predicted - correct),
        "Acc": correct / labelled,
        "Precision": correct / predicted,
        "Fscore": 2 * correct / (labelled + predicted),
    }
    means = {f"m{name}": values.nanmean().item() for name, values in of_classes.items()}
    return of_classes | means | {"aAcc": (correct.sum() / counts.sum()).item(), "matrix": matrix}


def equal_sizes(samples, pixels):
    """Yields lists of successive (index, image, label) whose images have one size: as many as have `pixels` together,
    at least one, and at most 64, since each tensor from a data-loading worker is an open file."""
    group = []
    for index, (image, label) in samples:
        full = len(group) == 64 or (len(group) + 1) * image[..., 0].numel() > pixels
        if group and (full or image.shape != group[0][1].shape):
            yield group
            group = []
        group.append((index, image, label))
    if group:
        yield group


def evaluation_loader(data, workers):
    """A loader of this process's share of a data set, whose workers start now."""
    rank, world = rank_and_world()
    loader = DataLoader(Subset(data, range(rank, len(data), world)), batch_size=None, **loading(workers))
    iter(loader)
    return loader


def evaluate(model, data, loader, config, aug=False, save=None, with_loss=False):
    """metrics() of a model in eval mode over a data set; with_loss adds `loss`, the segmentation_loss without weights.

    If several processes call it, each evaluates the share in its evaluation_loader; the result is that of all. save(i,
    prediction) is called with each label map; with it a split may be without labels, and the metrics are NaN. Raises
    InputError for what cannot be read, and without save if there are no labels.
    """
    if not (save or data.labelled):
        raise InputError(f"{data.name}: split {data.split!r} has no labels; --save DIR writes predictions")
    matrix = torch.zeros(len(data.classes), len(data.classes), dtype=torch.int64)
    loss = torch.zeros(2, dtype=torch.float64)  # summed over pixels, and their number
    shown = {"disable": rank_and_world()[0] > 0, "leave": False, "dynamic_ncols": True}
    with tqdm(patient(loader), "evaluating", len(loader), **shown) as bar:
        for group in equal_sizes(zip(loader.dataset.indices, bar, strict=True), 0 if aug else BATCH_PIXELS):
            places, images, labels = zip(*group, strict=True)
            predictions = torch.empty(len(group), *images[0].shape[:2], dtype=torch.uint8)
            for rows, scores in scores_by_rows(model, torch.stack(images), config, aug):
                predictions[:, rows] = classes_of(scores)
                if with_loss:
                    target = torch.stack(labels)[:, rows].to(scores.device).long()
                    part = F.cross_entropy(scores, target, ignore_index=VOID, reduction="sum")
                    loss += torch.tensor([part.item(), target.numel()], dtype=torch.float64)
            for i, label, prediction in zip(places, labels, predictions, strict=True):
                if save:
                    save(i, prediction)
                if label is not None:
                    matrix += confusion_matrix(prediction, label, len(data.classes))
    matrix = sum_over_processes(matrix)
    summed, pixels = sum_over_processes(loss).tolist()
    if not save and matrix.sum() == 0:
        raise InputError(f"{data.name}: all labels of the split {data.split!r} are void")
    return metrics(matrix) | ({"loss": summed / pixels} if with_loss else {})


def report(result, names):
    """The table of metrics() in percent, as text."""
    figures = zip(names, (100 * result["IoU"]).tolist(), (100 * result["Acc"]).tolist(), strict=True)
    rows = [f"{name:<24}{iou:>8.2f}{acc:>8.2f}" for name, iou, acc in figures]
    total = "mIoU {mIoU:.2%}   mAcc {mAcc:.2%}   aAcc {aAcc:.2%}".format(**result)
    return "\n".join([f"{'class':<24}{'IoU':>8}{'Acc':>8}", *rows, total])


# ------------------------------------------------------------------------------------------------------ command line


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", nargs="?", help="file, folder, URL or published name (default: the newest run's)")
    parser.add_argument("--checkpoint", dest="named", metavar="CHECKPOINT", help="the same")
    parser.add_argument("--aug", action="store_true", help="multi-scale + flip, instead of one view")
    parser.add_argument("--dataset", choices=PRESETS, help="default: the one it was trained on")
    parser.add_argument("--data-root", help="the data set's folder (default: the one it was trained on)")
    parser.add_argument("--split", type=split_name, default="val", help="train, val or test (default: val)")
    maps = parser.add_mutually_exclusive_group()
    maps.add_argument("--save", metavar="DIR", help="write the label maps: 8-bit PNG, the class index of each pixel")
    maps.add_argument("--submit", metavar="DIR", help="write them as the test servers of the data sets take them")
    parser.add_argument("--json", metavar="FILE", help="write all figures; FILE.png shows the confusion matrix")
    parser.add_stride()
    parser.add_device()
    parser.add_argument("--amp", choices=AMP, default="none", help="mixed precision (default: none)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network, anew for each size of image")
    parser.add_argument("--workers", type=whole_number, default=2, help="processes that read images (default: 2)")
    args = parser.parse_args()
    if args.checkpoint and args.named:
        raise InputError(f"two checkpoints: {args.checkpoint} and --checkpoint {args.named}")
    args.checkpoint = args.checkpoint or args.named
    return args


def data_of(config, args):
    """The split that --dataset, --data-root and --split name. What is not given is taken from the model's training."""
    name = args.dataset or config["dataset"]
    if name not in PRESETS:
        raise InputError(f"--dataset: the checkpoint names {name!r}, which is none of {', '.join(PRESETS)}")
    root = config.get("data_root") if name == config["dataset"] else None
    return open_data(name, args.data_root or root, args.split)


def check_classes(data, config, source):
    """Raises InputError if a data set's classes are not those of the model that `source` names."""
    own, other = list(data.classes), list(config["classes"])
    if len(own) != len(other):
        names = [", ".join(some[:4]) for some in (own, other)]
        counts = f"its {len(own)} classes ({names[0]} ...) are not the {len(other)} of {source} ({names[1]} ...)"
        raise InputError(f"--dataset {data.name}: {counts}")
    for i, (name, expected) in enumerate(zip(own, other, strict=True)):
        if name != expected:
            raise InputError(f"--dataset {data.name}: its class {i} is {name!r}, that of {source} is {expected!r}")


def main():
    args = parse_arguments()
    device = start_process(args.device)
    source = args.checkpoint or newest_checkpoint()
    model, config = load_model(source, args.stride)
    data = data_of(config, args)
    check_classes(data, config, source)
    folder = args.save or args.submit
    maps = LabelMaps(Path(folder), data, bool(args.submit)) if folder else None
    if args.json and not data.labelled:
        raise InputError(f"--json: the split {data.split!r} has no labels")
    result_file = ResultFile(Path(args.json)) if args.json else None
    model = for_inference(model, device, AMP[args.amp], args.compile)
    loader = evaluation_loader(data, args.workers)
    result = evaluate(model, data, loader, config, args.aug, maps and maps.save)
    if rank_and_world()[0] == 0:
        if not math.isnan(result["aAcc"]):
            print(report(result, data.classes))
        if result_file:
            about = {"checkpoint": str(source), "dataset": data.name, "split": data.split, "images": len(data)}
            about |= {name: config[name] for name in ("scale", "crop_size", "stride")}
            about |= {"aug": args.aug, "amp": args.amp}
            result_file.write(result, data.classes, about)
        if folder:
            print(f"{len(data)} label maps in {folder}/")


if __name__ == "__main__":
    run_command(main)
