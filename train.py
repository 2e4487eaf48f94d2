"""Trains a model on a data set, with the recipe of its preset (support/settings.py) unless told otherwise.

    python train.py                                              # GCNet on drawn shapes: no files, no downloads
    python train.py --dataset folder --data-root DIR             # own images and masks (README: "Your own data")
    torchrun --nproc_per_node=4 train.py --model gcnet --dataset ade20k
    python train.py --resume --out runs/gcnet-r18-shapes         # continues an interrupted run

A run lives in one folder: config.json, last.pt, best.pt, log.jsonl, samples/*.png, and report.html, which shows it all.
"""

import contextlib
import copy
import math
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch import nn

from data import distort_and_normalise, open_data, training_loader
from evaluate import evaluate, evaluation_loader, metrics_table, predict
from support.checkpoint import State, build_model, restore, set_first_weights, write_checkpoint
from support.command import collect_signals, run_command
from support.fast import for_inference
from support.fast_loss import resized_cross_entropy
from support.processes import from_rank_0, rank_and_world, start_process, sum_over_processes
from support.run import Run, add_classes, describe, open_run
from support.settings import AMP, parse_arguments


def poly_lr(iteration, iters, lr=0.01, min_lr=1e-4, power=0.9):
    """The learning rate of an iteration in 0..iters-1: polynomial decay from lr to min_lr; lr if that is no larger."""
    min_lr = min(min_lr, lr)
    return (lr - min_lr) * (1 - iteration / iters) ** power + min_lr


def segmentation_loss(logits, labels, weight=None, align_corners=False):
    """Cross-entropy of logits (N, K, h, w), resized to the labels (N, H, W): the sum over the valid pixels, divided by
    the number of all pixels, void included, as mmsegmentation does. weight (K,) scales the terms, not the divisor:

        logits = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=align_corners)
        loss = F.cross_entropy(logits, labels, weight, ignore_index=255, reduction="sum")
        return loss / labels.numel()

    but a few rows at a time, so that the N x K x H x W values of these lines never exist."""
    return resized_cross_entropy(logits, labels, weight, align_corners) / labels.numel()


def training_step(model, optimizer, scaler, batches, lr, weight=None, dtype=None, align_corners=False):
    """One step of training: the mean gradient of all `batches`, pairs of normalised images (N, 3, H, W) and labels
    (N, H, W), then SGD at the learning rate lr. In mixed precision if dtype is bfloat16 or float16; weight
    (K,) and align_corners are the loss's.

    Returns the loss and the weighted auxiliary loss, means over all processes. If one is not finite, the weights stay
    as they are; also if a gradient overflows in float16, and then the scaler lowers its scale.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    losses = 0
    for number, (images, labels) in enumerate(batches, 1):
        model.require_backward_grad_sync = number == len(batches)  # DDP's no_sync: one exchange of gradients per step
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            logits, aux_logits = model(images)  # (N, K, H/8, W/8)
        loss = segmentation_loss(logits, labels, weight, align_corners) / len(batches)
        aux_loss = 0.4 * segmentation_loss(aux_logits, labels, weight, align_corners) / len(batches)
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
    given, out, resume, device_name = parse_arguments(__doc__)
    device = start_process(device_name)
    rank, world = rank_and_world()
    settings, saved = from_rank_0(open_run, out, given, resume)

    train_data = open_data(settings.dataset, settings.data_root, "train", settings.cache)
    val_data = open_data(settings.dataset, settings.data_root, "val", settings.cache)
    add_classes(settings, train_data, val_data, out)
    class_weights = settings.class_weights and torch.tensor(settings.class_weights, device=device)

    model = initial_model(settings, device, from_scratch=saved is None)
    optimizer = torch.optim.SGD(model.parameters(), settings.lr, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16")
    state = State(model, optimizer, scaler)
    signals = collect_signals()  # from here on they end the run in an orderly way, in the loop
    if saved:
        restore(state, saved, out / "last.pt")
        del saved  # as large as the state
    elif rank == 0:
        write_checkpoint(state, settings, out / "last.pt")  # from here on there is a run to continue
    model = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    model = torch.compile(model) if settings.compile else model

    loader = training_loader(train_data, settings, state.iteration, rank, world, device.type == "cuda")
    val_loader = evaluation_loader(val_data, settings.workers)
    batches = []
    with contextlib.closing(Run(out, settings, state.iteration)) as run:
        run.say(describe(settings, len(train_data), state.iteration, out, device))
        while True:  # each time: stop, validate or save if it is due, then one step; the last time has no step
            requests = torch.tensor([len(signals), run.save_is_due()], device=device)
            stop, save_is_due = (sum_over_processes(requests) > 0).tolist()
            validate_now = validation_is_due(state.iteration, settings.iters) and not stop
            if (stop or save_is_due or validate_now) and batches:
                save_if_finite(state, batches[0][0], run)  # before a validation, too: it may be killed
            if validate_now:
                result = validate(state, val_data, val_loader, settings, run)
            if stop:
                run.say(f"stopped after iteration {state.iteration}; continue with --resume --out {out}")
                sys.exit(128 + (signals or [signal.SIGTERM])[0])  # another process may have received it
            if state.iteration == settings.iters:
                break

            began = time.monotonic()
            lr = poly_lr(state.iteration, settings.iters, settings.lr)
            torch.manual_seed((settings.seed * settings.iters + state.iteration) * world + rank)  # for the dropout
            batches = [distort_and_normalise(next(loader), device) for _ in range(settings.accumulate)]
            loss_scale = scaler.get_scale()
            loss, aux_loss = training_step(
                model, optimizer, scaler, batches, lr, class_weights, AMP[settings.amp], settings.align_corners
            )
            skipped = scaler.get_scale() < loss_scale  # fp16: a gradient overflowed
            run.log_step(state.iteration, loss, aux_loss, lr, skipped, time.monotonic() - began)
            state.iteration += 1
    run.say(metrics_table(result, settings.classes))
    run.say(f"page: {out / 'report.html'}   best checkpoint: {out / 'best.pt'} ({state.best_miou:.2%})")


def initial_model(settings, device, from_scratch=True):
    """The model that a run begins with, in training mode on the device; with its first weights, the same in all
    processes, unless a checkpoint's will replace them. First turns on torch's deterministic kernels if asked to."""
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)  # warns where torch has no such kernel
    torch.manual_seed(settings.seed)
    model = build_model(settings)
    if from_scratch:
        set_first_weights(model, settings)
    if rank_and_world()[1] > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format  # the faster one there
    return model.to(device, memory_format=memory_format).train()


def validation_is_due(iteration, iters):
    """After about each tenth of the run, and at its end."""
    return iteration == iters or iteration > 0 and iteration % math.ceil(iters / 10) == 0


def validate(state, data, loader, settings, run):
    """The metrics() of the present weights, which are also logged and shown. Saves the state as best.pt if no
    validation was as good. Raises InputError if the training has diverged."""
    if dist.is_initialized():
        for buffer in state.model.buffers():  # BatchNorm's statistics, which may differ: those of rank 0
            dist.broadcast(buffer, 0)
    model = for_inference(copy.deepcopy(state.model), next(state.model.parameters()).device)
    try:
        result = evaluate(model, data, loader, settings, with_loss=True)
    except FloatingPointError as error:
        raise run.divergence_error(state.iteration, error) from None
    if result["mIoU"] > state.best_miou:
        state.best_miou = result["mIoU"]
        run.save(state, "best.pt")
    if run.writes:
        shown = [data[i] for i in range(0, len(data), math.ceil(len(data) / 4))]
        rows = [(image, label, predict(model, image, settings)[0]) for image, label in shown]
        run.log_validation(state.iteration, result, rows)
    return result


def save_if_finite(state, images, run):
    """Saves the state. Raises InputError, and saves nothing, if the model's scores for images (N, 3, H, W) in eval mode
    are not finite: then the training has diverged, though its loss may still be a number."""
    with torch.inference_mode():
        finite = state.model.eval()(images).isfinite().all()
    state.model.train()
    if sum_over_processes(finite.logical_not().long()):
        raise run.divergence_error(state.iteration, "the model's scores are not numbers")
    run.save(state)


if __name__ == "__main__":
    run_command(main)
