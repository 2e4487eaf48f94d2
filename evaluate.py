"""Evaluates a checkpoint on a data set: IoU and accuracy of each class, mIoU, mAcc and aAcc.

    python evaluate.py                                    # the newest run below runs/
    python evaluate.py runs/gcnet-r50-ade20k/best.pt      # or any checkpoint; it holds its own settings
    python evaluate.py --aug                              # multi-scale + flip: the mean of 12 views
    torchrun --nproc_per_node=4 evaluate.py               # shared among processes, the same result

The modes, the resizing and the metrics are those of the published tables.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import checkpoint
from data import VOID, InputError, SegmentationData, keep_ratio, normalise, resize

RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


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
    total, count = 0, images.new_zeros(height, width)
    for top in window_starts(height, h, stride[0]):
        for left in window_starts(width, w, stride[1]):
            logits = model(images[:, :, top : top + h, left : left + w])
            if isinstance(total, int):
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[:, :, top : top + h, left : left + w] += logits
            count[top : top + h, left : left + w] += 1
    return total.div_(count)


def window_starts(side, window, stride):
    steps = max(side - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride, side - window), 0) for i in range(steps)]


def logits_at(model, images, size, crop_size=None, stride=None):
    """Logits (N, K, *size) of normalised images, by sliding windows if a stride is given, else whole."""
    logits = slide_inference(model, images, crop_size, stride) if stride else whole_inference(model, images)
    return F.interpolate(logits, size, mode="bilinear", align_corners=model.align_corners)


def multi_scale_flip(model, image, scale, ratios=RATIOS, crop_size=None, stride=None):
    """Mean of the softmax over views of one image, float32 (K, H, W).

    image   uint8 RGB (H, W, 3)
    scale   (long, short): the view of ratio r is the image at keep-ratio (long r, short r), plain and mirrored
    """
    device, size = next(model.parameters()).device, tuple(image.shape[:2])
    image, total = torch.as_tensor(image, device=device), 0
    for ratio in ratios:
        view = resize(image, keep_ratio(size, [int(side * ratio) for side in scale]))
        view = normalise(view.permute(2, 0, 1)[None])
        total = total + logits_at(model, view, size, crop_size, stride)[0].softmax(0)
        total += logits_at(model, view.flip(3), size, crop_size, stride)[0].softmax(0).flip(2)
    return total / (2 * len(ratios))


@torch.inference_mode()
def predict(model, image, config, aug=False):
    """The class of each pixel, uint8 (H, W), of one uint8 RGB image (H, W, 3); config is the checkpoint's."""
    device, size = next(model.parameters()).device, tuple(image.shape[:2])
    scale, window = config["scale"] or size, (config["crop_size"], config["stride"])
    if aug:
        return multi_scale_flip(model, image, scale, RATIOS, *window).argmax(0).byte()
    view = resize(torch.as_tensor(image, device=device), keep_ratio(size, scale))
    return logits_at(model, normalise(view.permute(2, 0, 1)[None]), size, *window)[0].argmax(0).byte()


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


def evaluate(model, data, config, aug=False, workers=0, rank=0, world=1):
    """metrics() of the model, in eval mode, over a data set; each of `world` processes takes every world-th image."""
    device = next(model.parameters()).device
    matrix = torch.zeros(len(data.classes), len(data.classes), dtype=torch.int64, device=device)
    loader = DataLoader(Subset(data, range(rank, len(data), world)), batch_size=None, num_workers=workers)
    with tqdm(loader, "evaluating", disable=rank > 0, leave=False, dynamic_ncols=True) as bar:
        for image, label in bar:
            if label is None:
                raise InputError(f"{data.name}: the split {data.split!r} has no labels to compare with")
            matrix += confusion_matrix(predict(model, image, config, aug), label.to(device), len(data.classes))
    if world > 1:
        dist.all_reduce(matrix)
    return metrics(matrix)


def report(result, names):
    """The table of metrics() in percent, as text."""
    rows = [f"{name:<24}{iou:>8.2f}{acc:>8.2f}" for name, iou, acc in zip(names, *percent(result), strict=True)]
    total = "mIoU {mIoU:.2%}   mAcc {mAcc:.2%}   aAcc {aAcc:.2%}".format(**result)
    return "\n".join([f"{'class':<24}{'IoU':>8}{'Acc':>8}", *rows, total])


def percent(result):
    return [(100 * result[name]).tolist() for name in ("IoU", "Acc")]


# ------------------------------------------------------------------------------------------------------ command line


def start_process():
    """(device, rank, world) of this process, alone or one of torchrun's."""
    cuda = torch.cuda.is_available()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return device, rank, world


def run(main):
    """Calls main(). What its user can mend is one line on stderr and exit status 2, not a traceback."""
    try:
        main()
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        # What a data-loading worker raises arrives with its traceback as text; the message is the end of it.
        message = str(error).rpartition("InputError: ")[2] if isinstance(error, InputError) else str(error)
        if isinstance(error, torch.OutOfMemoryError):
            message = "the GPU's memory is too small; lower --batch-size or --crop-size, or use --amp bf16"
        print(f"{Path(sys.argv[0]).name}: error: {message.strip()}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="file, URL or published name; default: runs/'s newest best.pt")
    parser.add_argument("--checkpoint", dest="named", metavar="CHECKPOINT", help="the same")
    parser.add_argument("--aug", action="store_true", help="multi-scale + flip, instead of one view")
    parser.add_argument("--dataset", help="default: the one it was trained on")
    parser.add_argument("--data-root", help="the data set's folder; default: the one it was trained on")
    parser.add_argument("--split", default="val", help="train, val or test (default: val)")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images (default: 2)")
    args = parser.parse_args()

    device, rank, world = start_process()
    source = args.checkpoint or args.named or checkpoint.newest_run() / "best.pt"
    state = checkpoint.load(source)
    config = state["config"]
    data = SegmentationData(args.dataset or config["dataset"], args.data_root or config["data_root"], args.split)
    model = checkpoint.build_model(config)
    checkpoint.load_weights(model, state["model"], source)
    named_alike = data.name != "folder" or list(data.classes) == config["classes"]
    if len(data.classes) != len(config["classes"]) or not named_alike:
        raise InputError(f"--dataset {data.name}: its classes are not those of the checkpoint, {source}")
    model.eval().to(device, memory_format=torch.channels_last)
    result = evaluate(model, data, config, args.aug, args.workers, rank, world)
    if rank == 0:
        print(report(result, data.classes))


if __name__ == "__main__":
    run(main)
