"""Trains a model on a data set, with the published recipe unless told otherwise.

    python train.py                                              # GCNet on drawn shapes: no files, no downloads
    python train.py --dataset folder --data-root DIR             # own images and masks (README: "Your own data")
    torchrun --nproc_per_node=4 train.py --model gcnet --dataset ade20k
    python train.py --resume --out runs/gcnet-r18-shapes         # goes on where a run was interrupted

A run lives in one folder: config.json, last.pt, best.pt, log.jsonl, samples/*.png. Ctrl-C leaves a checkpoint.
"""

import json
import math
import os
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import Batches, InputError, SegmentationData, TrainData, to_device
from evaluate import evaluate, predict, report
from support import checkpoint, settings
from support.command import ignore_signals, run, start_process
from support.pictures import compare, curves
from tools import check_data as data_tools

SAVE_SECONDS = 300  # at most so much work is lost


def poly_lr(iteration, iters, lr=0.01, min_lr=1e-4, power=0.9):
    """The learning rate of an iteration in 0..iters-1: from lr down to min_lr, if lr is not below that already."""
    min_lr = min(min_lr, lr)
    return (lr - min_lr) * (1 - iteration / iters) ** power + min_lr


def segmentation_loss(logits, labels, weight=None):
    """Cross-entropy of logits (N, K, H, W) and labels (N, H, W), summed over the valid pixels and divided by ALL of
    them, void included, as the reference does. weight (K,) scales the classes' terms, not the divisor."""
    return F.cross_entropy(logits, labels, weight, ignore_index=255, reduction="sum") / labels.numel()


def training_step(model, optimizer, scaler, batches, lr, class_weights=None, amp=None):
    """One step of training: the mean gradient of all `batches`, pairs of normalised images (N, 3, H, W) and labels
    (N, H, W), then SGD at the learning rate lr. In mixed precision if amp is a dtype.

    Returns the loss and the weighted auxiliary loss, their means over all processes; if one is not finite, the step was
    not taken.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    losses = 0
    for images, labels in batches:
        with torch.autocast(images.device.type, amp, enabled=amp is not None):
            logits, aux_logits = model(images)
        loss = segmentation_loss(logits, labels, class_weights) / len(batches)
        aux_loss = 0.4 * segmentation_loss(aux_logits, labels, class_weights) / len(batches)
        del logits, aux_logits  # of K x H x W values: the backward pass puts as large ones in their place
        scaler.scale(loss + aux_loss).backward()
        losses += torch.stack([loss, aux_loss]).detach()
    if dist.is_initialized():
        dist.all_reduce(losses)
        losses /= dist.get_world_size()
    if losses.isfinite().all():
        scaler.step(optimizer)
        scaler.update()
    return losses.tolist()


def main():
    config, out, resume = settings.parse(__doc__)
    device, rank, world = start_process()
    crop_size, iters, seed, accumulate = (config[name] for name in ("crop_size", "iters", "seed", "accumulate"))

    train_data = SegmentationData(config["dataset"], config["data_root"], "train", config["cache"])
    val_data = SegmentationData(config["dataset"], config["data_root"], "val", config["cache"])
    settings.complete(config, out, train_data, val_data, world)
    class_weights = data_tools.class_weights(config["class_weights"], train_data, config["workers"], rank, world)
    class_weights = class_weights if class_weights is None else class_weights.to(device)

    torch.manual_seed(seed)
    if config["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_flush_denormal(True)  # fresh weights drive activations to denormals, on which a CPU is slow
    model = checkpoint.build_model(config)
    sync_bn = world > 1 and device.type == "cuda"
    norm = "SyncBatchNorm" if sync_bn else "BatchNorm"
    notes = settings.batch_notes(config, world, f"{norm}, {device}")
    state = checkpoint.load(out / "last.pt") if resume and (out / "last.pt").exists() else None
    if state is None and config["init"]:
        notes.append(checkpoint.load_initial(model, config["init"]))
    elif state is None:
        checkpoint.load_backbone(model, config["pretrained"], config["depth"])
    if sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), config["lr"], momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=config["amp"] == "fp16")
    start, best_miou = 0, -1.0
    if state:
        missing = {"optimizer", "scaler", "iteration", "best_miou"} - state.keys()
        if missing or state["iteration"] > iters:
            raise InputError(
                f"{out / 'last.pt'}: is no state of a run of {iters} steps; --init takes its weights alone"
            )
        checkpoint.load_weights(model, state["model"], out / "last.pt")
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        start, best_miou = state["iteration"], state["best_miou"]

    trained = model  # what trains is `model` with wrappers around it; what is evaluated and saved is `model` itself
    if world > 1:
        trained = nn.parallel.DistributedDataParallel(model)
    if config["compile"]:
        trained = torch.compile(trained)
    amp = settings.AMP[config["amp"]]
    received = []

    def finish_step(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, finish_step)
    batches = Batches(len(train_data), config["batch_size"], seed, start * accumulate, iters * accumulate, rank, world)
    samples = TrainData(train_data, crop_size, config["scale"], seed)
    loading = {"num_workers": config["workers"], "worker_init_fn": ignore_signals, "pin_memory": device.type == "cuda"}
    loader = iter(DataLoader(samples, batch_sampler=batches, **loading))

    if rank == 0:
        checkpoint.begin_run(out, config, start)
        print(f"{config['model']} R-{config['depth']} on {config['dataset']}: {len(train_data)} images, {out}/")
        print(*notes, sep="\n")

    def save(name):
        parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
        state = {key: part.state_dict() for key, part in parts.items()}
        checkpoint.save(state | {"config": config, "iteration": iteration, "best_miou": best_miou}, out / name)

    try:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(out, purge_step=start) if rank == 0 else None
    except ImportError:
        board = None

    def log(**values):
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps({"iteration": iteration} | values) + "\n")
        for name, value in values.items() if board else ():
            board.add_scalar(name, value, iteration)

    def validate():
        nonlocal best_miou
        if world > 1:  # they differ with plain BatchNorm: rank 0's count, as in the checkpoint
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        model.eval()
        result = evaluate(model, val_data, config, False, config["workers"], rank, world, with_loss=True)
        if rank == 0:
            log(val_loss=result["loss"], **{name: result[name] for name in ("mIoU", "mAcc", "aAcc")})
            shown = range(0, len(val_data), math.ceil(len(val_data) / 4))
            rows = [(*val_data[i], predict(model, val_data[i][0][None], config)[0]) for i in shown]
            path = out / "samples" / f"{iteration:06}.png"
            picture = compare(rows, config["classes"], config["palette"])
            picture.save(path)
            curves(out)
            if board:
                board.add_image("samples", np.asarray(picture), iteration, dataformats="HWC")
            tqdm.write(f"iteration {iteration}: mIoU {result['mIoU']:.2%}, {path}")
            if result["mIoU"] > best_miou:
                best_miou = result["mIoU"]
                save("best.pt")
        model.train()
        return result

    def due():
        return iteration == iters or iteration > 0 and iteration % -(-iters // 10) == 0

    iteration, skipped, last_save = start, 0, time.monotonic()
    model.train()
    if due():  # the run may have ended in the middle of this validation
        result = validate()
    with tqdm(total=iters, initial=start, desc=config["model"], disable=rank > 0, dynamic_ncols=True) as bar:
        while iteration < iters:
            step_start = time.monotonic()

            lr = poly_lr(iteration, iters, config["lr"])
            torch.manual_seed((seed * iters + iteration) * world + rank)  # dropout's: a resumed run draws the same
            loaded = [next(loader) for _ in range(accumulate)]
            batches, scale = [to_device(batch, device) for batch in loaded], scaler.get_scale()
            loss, aux_loss = training_step(trained, optimizer, scaler, batches, lr, class_weights, amp)
            if not math.isfinite(loss + aux_loss):
                files = ", ".join(file for batch in loaded for file in batch["file"])
                raise InputError(
                    f"iteration {iteration}: the loss is {loss + aux_loss}, learning rate {lr:.2g}; batch: {files}"
                )
            skipped += scaler.get_scale() < scale  # fp16: a gradient overflowed, the weights stay
            stop = torch.tensor(len(received), device=device)
            if world > 1:
                dist.all_reduce(stop)

            speed = config["effective_batch"] / (time.monotonic() - step_start)
            if rank == 0 and iteration % max(iters // 1000, 1) == 0:
                log(loss=loss, aux_loss=aux_loss, lr=lr, images_per_second=speed, skipped=skipped)
            iteration += 1
            note = f", {skipped} steps skipped" if skipped else ""
            bar.set_postfix_str(f"loss {loss + aux_loss:.3f}, lr {lr:.4f}, {speed:.1f} images/s{note}", refresh=False)
            bar.update()
            if rank == 0 and (stop or due() or time.monotonic() - last_save > SAVE_SECONDS):
                save("last.pt")
                last_save = time.monotonic()
            if stop:
                if rank == 0:
                    tqdm.write(f"stopped after iteration {iteration} and saved; go on with --resume --out {out}")
                sys.exit(128 + signal.SIGINT if signal.SIGINT in received else 0)
            if due():
                result = validate()
    if rank == 0:
        print(report(result, config["classes"]))
        print(f"picture: {out / 'samples' / f'{iters:06}.png'}   best checkpoint: {out / 'best.pt'} ({best_miou:.2%})")


if __name__ == "__main__":
    run(main)
