"""Trains a model on a data set, with the recipe of its preset (support/settings.py) unless told otherwise.

    python train.py                                              # GCNet on drawn shapes: no files, no downloads
    python train.py --dataset folder --data-root DIR             # own images and masks (README: "Your own data")
    torchrun --nproc_per_node=4 train.py --model gcnet --dataset ade20k
    python train.py --resume --out runs/gcnet-r18-shapes         # continues an interrupted run

A run lives in one folder: config.json, last.pt, best.pt, log.jsonl, samples/*.png, and report.html, which shows it all.
Ctrl-C leaves a checkpoint.
"""

import copy
import signal
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from data import open_data, to_device, training_loader
from evaluate import evaluate, evaluation_loader, predict, report
from support.checkpoint import State, build_model, load_initial, restore
from support.class_weights import class_weights
from support.command import collect_signals, run_command
from support.fast import for_inference
from support.processes import be_deterministic, patient, rank_and_world, start_process, sum_over_processes
from support.run import Run
from support.settings import AMP, agree, complete, describe_batch, describe_run, parse


def poly_lr(iteration, iters, lr=0.01, min_lr=1e-4, power=0.9):
    """The learning rate of an iteration in 0..iters-1: polynomial decay from lr to min_lr, or to lr if that is less."""
    min_lr = min(min_lr, lr)
    return (lr - min_lr) * (1 - iteration / iters) ** power + min_lr


def segmentation_loss(logits, labels, weight=None):
    """Cross-entropy of logits (N, K, H, W) and labels (N, H, W), summed over the valid pixels and divided by ALL of
    them, void included, as the reference does. weight (K,) scales the classes' terms, not the divisor."""
    return F.cross_entropy(logits, labels, weight, ignore_index=255, reduction="sum") / labels.numel()


def training_step(model, optimizer, scaler, batches, lr, weight=None, amp=None):
    """One step of training: the mean gradient of all `batches`, pairs of normalised images (N, 3, H, W) and labels
    (N, H, W), then SGD at the learning rate lr. In mixed precision if amp is a dtype; weight (K,) is the loss's.

    Returns the loss and the weighted auxiliary loss, means over all processes. If one is not finite, the weights stay
    as they are. So they do if a gradient overflows in float16; scaler.get_scale() then falls.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    losses = 0
    for number, (images, labels) in enumerate(batches, 1):
        model.require_backward_grad_sync = number == len(batches)  # DDP's no_sync: one exchange of gradients per step
        with torch.autocast(images.device.type, amp, enabled=amp is not None):
            logits, aux_logits = model(images)
        loss = segmentation_loss(logits, labels, weight) / len(batches)
        aux_loss = 0.4 * segmentation_loss(aux_logits, labels, weight) / len(batches)
        del logits, aux_logits  # K x H x W values each: the backward pass needs as much memory for their gradients
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
    given, out, resume, device_name = parse(__doc__)
    device = start_process(device_name)
    rank, world = rank_and_world()
    settings, saved, leader = agree(given, out, resume)
    train_data = open_data(settings.dataset, settings.data_root, "train", settings.cache)
    val_data = open_data(settings.dataset, settings.data_root, "val", settings.cache)
    complete(settings, out, train_data, val_data)
    weight = class_weights(settings.class_weights, train_data, device, settings.workers)
    state = initial_state(settings, device, out, saved, leader)
    del saved  # as large as the state
    model = nn.parallel.DistributedDataParallel(state.model) if world > 1 else state.model
    model = torch.compile(model) if settings.compile else model
    signals = collect_signals()
    loader = patient(training_loader(train_data, settings, state.iteration, rank, world, device.type == "cuda"))
    val_loader = evaluation_loader(val_data, settings.workers)
    with Run(out, settings, state.iteration, leader) as run:
        run.say(describe_run(settings, len(train_data), state.iteration, out))
        run.say(describe_batch(settings, device))
        while True:
            if validation_is_due(state.iteration, settings.iters):  # first, for a run that was stopped before it
                result = validate(state, val_data, val_loader, settings, run)
            if state.iteration == settings.iters:
                break

            began = time.monotonic()
            lr = poly_lr(state.iteration, settings.iters, settings.lr)
            torch.manual_seed((settings.seed * settings.iters + state.iteration) * world + rank)  # for the dropout
            loaded = [next(loader) for _ in range(settings.accumulate)]
            batches = [to_device(batch, device) for batch in loaded]
            scale = state.scaler.get_scale()
            loss, aux_loss = training_step(model, state.optimizer, state.scaler, batches, lr, weight, AMP[settings.amp])
            skipped = state.scaler.get_scale() < scale  # fp16: a gradient overflowed

            run.step(state.iteration, loss, aux_loss, lr, skipped, time.monotonic() - began, loaded)
            state.iteration += 1
            asked = torch.tensor([len(signals), run.save_is_due()], device=device)
            stop, save_is_due = (sum_over_processes(asked) > 0).tolist()
            if stop or save_is_due or validation_is_due(state.iteration, settings.iters):
                run.save("last.pt", state)
            if stop:
                run.say(f"stopped after iteration {state.iteration} and saved; go on with --resume --out {out}")
                sys.exit(128 + (signals or [signal.SIGTERM])[0])  # another process may have received it
    run.say(report(result, settings.classes))
    run.say(f"page: {out / 'report.html'}   best checkpoint: {out / 'best.pt'} ({state.best_miou:.2%})")


def initial_state(settings, device, out, saved=None, leader=0):
    """The State that a run begins with: that of the checkpoint `saved`, or a new one, whose weights are those that the
    process `leader` has read. Raises InputError if they do not fit."""
    if settings.deterministic:
        be_deterministic()
    torch.manual_seed(settings.seed)
    model = build_model(vars(settings))
    if saved is None:
        load_initial(model, settings, leader)
    if rank_and_world()[1] > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), settings.lr, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16")
    state = State(model.train(), optimizer, scaler)
    if saved:
        restore(state, saved, settings.iters, out / "last.pt")
    return state


def validation_is_due(iteration, iters):
    """After each tenth of the run, and at its end."""
    return iteration == iters or iteration > 0 and iteration % -(-iters // 10) == 0


def validate(state, data, loader, settings, run):
    """The metrics() of the weights as they are, which are also logged and shown. Saves the state if it is the best."""
    config = vars(settings)
    model = for_inference(copy.deepcopy(state.model), next(state.model.parameters()).device)
    result = evaluate(model, data, loader, config, with_loss=True)
    run.note_missing_classes()
    if run.writes:
        shown = range(0, len(data), -(-len(data) // 4))
        run.show(state.iteration, result, [(*data[i], predict(model, data[i][0][None], config)[0]) for i in shown])
        if result["mIoU"] > state.best_miou:
            state.best_miou = result["mIoU"]
            run.save("best.pt", state)
    return result


if __name__ == "__main__":
    run_command(main)
