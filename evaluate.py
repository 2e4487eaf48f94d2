"""Evaluates a checkpoint on a data set: IoU and accuracy of each class, mIoU, mAcc and aAcc.

    python evaluate.py                                    # the newest run below runs/
    python evaluate.py runs/gcnet-r50-ade20k/best.pt      # or any checkpoint; it holds its own settings
    python evaluate.py --aug                              # multi-scale + flip: the mean of 12 views
    torchrun --nproc_per_node=4 evaluate.py               # shared among processes, the same result
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from data import keep_ratio, open_data
from support.checkpoint import load_model
from support.command import BAR, InputError, Parser, run_command, whole_number
from support.fast import classes_and_loss, for_inference, resized_classes, slide_labels
from support.images import VOID, normalise, resize, window_starts
from support.pictures import LabelMaps, prepare_results, write_results
from support.processes import from_rank_0, rank_and_world, start_process, sum_over_processes, worker_options
from support.settings import AMP, PRESETS
from support.zoo import newest_checkpoint, published

RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of the views of multi-scale + flip


def whole_inference(model, images):
    """Logits (N, K, H, W) of normalised images (N, 3, H, W)."""
    return model(images)


def slide_inference(model, images, crop_size, stride):
    """Logits (N, K, H, W) of normalised images (N, 3, H, W): the mean over the windows that cover a pixel.

    Windows of crop_size lie on the grid of stride, both (height, width); the last ones are shifted back inside. An
    image smaller than the window is one window. Where no resizing follows, `predict` takes fast.slide_labels, which
    gives the same classes in less memory.
    """
    (height, width), (h, w) = images.shape[2:], crop_size
    total = images.new_zeros(len(images), model.num_classes, height, width)
    count = images.new_zeros(height, width)
    for top in window_starts(height, h, stride[0]):
        for left in window_starts(width, w, stride[1]):
            window = (..., slice(top, top + h), slice(left, left + w))
            total[window] += model(images[window])
            count[window] += 1
    return total / count


def inference(model, images, crop_size=None, stride=None):
    """Logits of slide_inference if there is a stride, else of whole_inference."""
    return slide_inference(model, images, crop_size, stride) if stride else whole_inference(model, images)


@torch.inference_mode()
def multi_scale_flip(model, image, scale, ratios=RATIOS, crop_size=None, stride=None):
    """Mean of the softmax over views of one image, float32 (K, H, W).

    image   uint8 RGB (H, W, 3), of numpy or torch
    scale   (long, short): the view of ratio r is the image at keep-ratio (long r, short r), plain and mirrored
    """
    size = image.shape[:2]
    total = 0
    for ratio in ratios:
        view = prepare(model, image, [int(side * ratio) for side in scale])         # (1, 3, h, w)
        for mirrored in (False, True):
            logits = inference(model, view.flip(3) if mirrored else view, crop_size, stride)
            logits = resize_logits(logits, size, model.align_corners)               # (1, K, H, W)
            scores = logits.permute(0, 2, 3, 1).softmax(3)                          # (1, H, W, K), as the memory is
            total += scores.flip(2) if mirrored else scores
            del logits, scores                                                      # before the next view needs memory
    return total[0].permute(2, 0, 1) / (2 * len(ratios))


def prepare(model, image, scale):
    """A uint8 RGB image (H, W, 3) at keep-ratio (long, short), normalised, on the model's device: (1, 3, h, w)."""
    image = resize(torch.as_tensor(image), keep_ratio(image.shape[:2], scale))
    return normalise(image.permute(2, 0, 1)[None].to(next(model.parameters()).device))


def resize_logits(logits, size, align_corners):
    """Logits (N, K, h, w) to (N, K, *size), bilinearly."""
    if logits.shape[2:] == size:
        return logits
    return F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)


@torch.inference_mode()
def predict(model, image, settings, aug=False, label=None):
    """What the model makes of one uint8 RGB image (H, W, 3), resized and inferred as a checkpoint's settings say: the
    class of each pixel, uint8 (H, W) on the CPU, and the summed loss of `label`; None without one, or with aug.

    Raises FloatingPointError if the model's scores are not numbers.
    """
    size = image.shape[:2]
    scale, crop_size, stride = settings.scale or size, settings.crop_size, settings.stride
    if aug:
        return classes_and_loss(multi_scale_flip(model, image, scale, RATIOS, crop_size, stride))
    if stride and keep_ratio(size, scale) == size:
        return slide_labels(model, image, crop_size, stride, label)
    logits = inference(model, prepare(model, image, scale), crop_size, stride)      # (1, K, h, w)
    return resized_classes(logits, size, model.align_corners, label)


def confusion_matrix(prediction, label, num_classes):
    """int64 (K, K): pixels of class [row] predicted as [column]. Takes equal shapes of integers; void is left out."""
    valid = label != VOID
    pairs = label[valid].long() * num_classes + prediction[valid].long()
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def metrics(matrix):
    """Of a confusion matrix: IoU, Acc (recall), Precision and Fscore of each class (K,), their means over the classes
    mIoU, mAcc, mPrecision and mFscore, the accuracy of all pixels aAcc, all in 0..1; and `matrix` itself.

    What would divide by zero is NaN, such as the accuracy of a class never labelled; the means leave NaN out.
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


def evaluation_loader(data, workers):
    """A loader of this process's share of a data set, whose workers start now."""
    rank, world = rank_and_world()
    loader = DataLoader(Subset(data, range(rank, len(data), world)), batch_size=None, **worker_options(workers))
    iter(loader)  # starts the workers, which persist: now, not in the middle of a training
    return loader


def evaluate(model, data, loader, settings, aug=False, save=None, with_loss=False):
    """metrics() of a model in eval mode over a data set; with_loss adds `loss`, the segmentation_loss without weights.

    Several processes each evaluate the share in their evaluation_loader; the result is that of all. save(i, prediction)
    is called with each label map. Raises InputError for what cannot be read, and without save if there are no labels.
    """
    if not (save or data.labelled):
        raise InputError(f"{data.name}: split {data.split!r} has no labels; --save or --submit DIR writes predictions")
    matrix = torch.zeros(len(data.classes), len(data.classes), dtype=torch.int64)
    loss = torch.zeros(2, dtype=torch.float64)  # summed over pixels, and their number
    bar = tqdm(loader, "evaluating", disable=rank_and_world()[0] > 0, leave=False, **BAR)
    for i, (image, label) in zip(loader.dataset.indices, bar, strict=True):
        prediction, loss_of_image = predict(model, image, settings, aug, label if with_loss else None)
        if save:
            save(i, prediction)
        if label is not None:
            matrix += confusion_matrix(prediction, label, len(data.classes))
        if with_loss:
            loss += torch.tensor([loss_of_image, label.numel()], dtype=torch.float64)
    matrix = sum_over_processes(matrix)
    summed, pixels = sum_over_processes(loss).tolist()
    if not save and matrix.sum() == 0:
        raise InputError(f"{data.name}: all labels of the split {data.split!r} are void")
    return metrics(matrix) | ({"loss": summed / pixels} if with_loss else {})


def metrics_table(result, names):
    """metrics() in percent, as text: a line for each class, and the means."""
    figures = zip(names, (100 * result["IoU"]).tolist(), (100 * result["Acc"]).tolist(), strict=True)
    rows = [f"{name:<24}{iou:>8.2f}{acc:>8.2f}" for name, iou, acc in figures]
    means = "mIoU {mIoU:.2%}   mAcc {mAcc:.2%}   aAcc {aAcc:.2%}".format(**result)
    return "\n".join([f"{'class':<24}{'IoU':>8}{'Acc':>8}", *rows, means])


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", nargs="?", help="file, folder, URL or published name (default: newest in runs/)")
    parser.add_argument("--aug", action="store_true", help="multi-scale + flip, instead of one view")
    parser.add_argument("--dataset", choices=PRESETS, help="default: the one that the checkpoint was trained on")
    parser.add_argument("--data-root", help="the data set's folder (default: the training's, or data/NAME)")
    parser.add_argument("--split", default="val", help="train, val or test (default: val)")
    maps = parser.add_mutually_exclusive_group()
    maps.add_argument("--save", metavar="DIR", help="write the label maps: 8-bit PNG, the class index of each pixel")
    maps.add_argument("--submit", metavar="DIR", help="write them in the form that the data set's test server takes")
    parser.add_argument("--json", metavar="FILE", help="write each class's metrics and the confusion matrix")
    parser.add_overwrite()
    parser.add_stride()
    parser.add_device()
    parser.add_argument("--amp", choices=AMP, default="none", help="mixed precision (default: none)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network, for each size of image")
    parser.add_argument("--workers", type=whole_number, default=2, help="processes that read images (default: 2)")
    return parser.parse_args()


def data_of(settings, args):
    """The split that --dataset, --data-root and --split name. What is not given is taken from the model's training."""
    name = args.dataset or settings.dataset
    root = settings.data_root if name == settings.dataset else None
    return open_data(name, args.data_root or root, args.split)


def check_classes(data, settings, source):
    """Raises InputError if a data set's classes are not those of the model that `source` names."""
    own, other = list(data.classes), list(settings.classes)
    if own != other:
        counts = f"its {len(own)} classes are not the {len(other)} of {source}"
        different = sorted(set(own) ^ set(other)) or ["their order"]
        raise InputError(f"--dataset {data.name}: {counts}: they differ in {', '.join(different[:3])}")


def main():
    args = parse_arguments()
    device = start_process(args.device)
    source = args.checkpoint or from_rank_0(newest_checkpoint)
    model, settings = load_model(source, args.stride)
    data = data_of(settings, args)
    check_classes(data, settings, source)
    folder = args.save or args.submit
    maps = from_rank_0(LabelMaps, Path(folder), data, bool(args.submit), args.overwrite) if folder else None
    if args.json and not data.labelled:
        raise InputError(f"--json: the split {data.split!r} has no labels")
    if args.json:
        from_rank_0(prepare_results, Path(args.json), args.overwrite)
    model = for_inference(model, device, AMP[args.amp], args.compile)
    loader = evaluation_loader(data, args.workers)
    result = evaluate(model, data, loader, settings, args.aug, maps and maps.save)
    if rank_and_world()[0] > 0:
        return
    labelled = not math.isnan(result["aAcc"])
    if labelled:
        print(metrics_table(result, data.classes))
    if known := published().get(source):
        plain, views = (known[name] or "not published" for name in ("mIoU", "mIoU_ms_flip"))
        print(f"published, on val: mIoU {plain}, with --aug {views}")
    if args.json and not labelled:
        print(f"{args.json}: not written, since all labels are void")
    elif args.json:
        about = {"checkpoint": str(source), "dataset": data.name, "split": data.split, "images": len(data)}
        about |= {name: getattr(settings, name) for name in ("scale", "crop_size", "stride")}
        write_results(Path(args.json), result, data.classes, about | {"aug": args.aug, "amp": args.amp})
    if folder:
        print(f"{len(data)} label maps in {folder}/")


if __name__ == "__main__":
    run_command(main)
