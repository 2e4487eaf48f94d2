"""Trains a model on a data set, with the published recipe unless told otherwise.

    python train.py                                              # GCNet on drawn shapes: no files, no downloads
    python train.py --dataset folder --data-root DIR             # own images and masks (README: "Your own data")
    torchrun --nproc_per_node=4 train.py --model gcnet --dataset ade20k
    python train.py --resume --out runs/gcnet-r18-shapes         # goes on where a run was interrupted

A run lives in one folder: config.json, last.pt, best.pt, log.jsonl, samples/*.png. Ctrl-C leaves a checkpoint.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import checkpoint
import data_tools
from data import PRESETS, Batches, InputError, SegmentationData, TrainData, to_device
from evaluate import evaluate, predict, report, run, start_process
from pictures import compare

SAVE_SECONDS = 300  # at most so much work is lost


def poly_lr(iteration, iters, lr=0.01, min_lr=1e-4, power=0.9):
    """The learning rate of an iteration in 0..iters-1: from lr down to min_lr."""
    return (lr - min_lr) * (1 - iteration / iters) ** power + min_lr


def segmentation_loss(logits, labels, weight=None):
    """Cross-entropy of logits (N, K, H, W) and labels (N, H, W), summed over the valid pixels and divided by ALL of
    them, void included, as the reference does. weight (K,) scales the classes' terms, not the divisor."""
    return F.cross_entropy(logits, labels, weight, ignore_index=255, reduction="sum") / labels.numel()


def parse_config():
    """(config, out, resume): the run's settings; what is not given comes from the run itself or from the preset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    add = parser.add_argument
    add("--model", choices=checkpoint.MODELS, help="default: gcnet")
    add("--dataset", choices=PRESETS, help="default: shapes, which is drawn, not read")
    add("--data-root", help="the data set's folder (default: data/DATASET)")
    add("--depth", type=int, choices=(18, 34, 50, 101), help="of the ResNet (default: 50, with shapes 18)")
    add("--crop-size", type=positive, nargs=2, metavar=("H", "W"), help="default: the data set's preset")
    add("--batch-size", type=positive, help="images per process (default: the preset, made for 4 processes)")
    add("--accumulate", type=positive, help="batches per step (default: 1)")
    add("--iters", type=positive, help="steps (default: the preset)")
    add("--lr", type=float, help="the first learning rate (default: the preset, 0.01)")
    add("--pretrained", help="the backbone's weights: none, file or URL (default: ImageNet's for depth 50 and 101)")
    add("--init", help="start from a whole checkpoint: file, URL or published name; its classifiers only if they fit")
    add("--class-weights", nargs="+", help="of the loss: a number per class, or balanced: sqrt(median / frequency)")
    add("--amp", choices=("none", "bf16", "fp16"), help="mixed precision (default: none)")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--workers", type=int, help="data-loading processes of each process (default: 2)")
    add("--seed", type=int, help="of the weights, the order and the augmentation (default: 0)")
    add("--out", help="the run's folder (default: runs/MODEL-rDEPTH-DATASET)")
    add("--resume", action="store_true", help="go on with the run in --out; its settings need not be given again")
    given = vars(parser.parse_args())

    out, resume = given.pop("out", None), given.pop("resume", False)
    config = {"model": "gcnet", "dataset": "shapes"} | given
    preset = PRESETS[config["dataset"]]
    config.setdefault("depth", 18 if config["dataset"] == "shapes" else 50)
    out = Path(out or "runs/{model}-r{depth}-{dataset}".format(**config))
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):  # torchrun --max-restarts
        resume = (out / "config.json").exists()
    if resume:
        saved = checkpoint.read_config(out)
        for name in sorted(given.keys() - {"workers", "data_root", "batch_size", "accumulate"}):
            if given[name] != saved[name]:
                raise InputError(f"--{name.replace('_', '-')} {given[name]}: the run in {out} has {saved[name]}")
        return saved | given, out, resume
    defaults = {
        "data_root": None,
        "crop_size": list(preset.crop),
        "batch_size": preset.batch,
        "accumulate": 1,
        "iters": preset.iters,
        "lr": preset.lr,
        "init": None,
        "class_weights": None,
        "pretrained": "imagenet" if config["depth"] >= 50 else "none",
        "amp": "none",
        "compile": False,
        "workers": 2,
        "seed": 0,
        "align_corners": preset.align_corners,
        "scale": preset.scale and list(preset.scale),
    }
    config = defaults | config
    config["stride"] = preset.stride and [min(pair) for pair in zip(preset.stride, config["crop_size"], strict=True)]
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: already holds a run; continue it with --resume, or name another folder with --out")
    return config, out, resume


def published_batch(config, world):
    """What to say where the run has other than the published recipe's images per step, and how to match it; or None."""
    preset, effective = PRESETS[config["dataset"]], config["effective_batch"]
    published, forward = 4 * preset.batch, config["batch_size"] * world
    if config["dataset"] in ("folder", "shapes") or effective == published:
        return None
    ways = [f"--lr {preset.lr * effective / published:g}"]
    if published % forward == 0:
        ways.insert(0, f"--accumulate {published // forward} (but BatchNorm sees {config['batch_size']} x {world})")
    if published % world == 0:
        ways.insert(0, f"--batch-size {published // world}")
    return f"the published recipe has {published} images per step; its like: {', or '.join(ways)}"


def positive(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def main():
    config, out, resume = parse_config()
    device, rank, world = start_process()
    crop_size, iters, seed, accumulate = (config[name] for name in ("crop_size", "iters", "seed", "accumulate"))

    train_data = SegmentationData(config["dataset"], config["data_root"], "train")
    val_data = SegmentationData(config["dataset"], config["data_root"], "val")
    effective = config["batch_size"] * world * accumulate
    if config.setdefault("effective_batch", effective) != effective:
        wanted = config["effective_batch"]
        raise InputError(f"--batch-size: the run in {out} has {wanted} images per step, this would be {effective}")
    config |= {"classes": list(train_data.classes), "palette": [list(colour) for colour in train_data.palette]}

    class_weights = data_tools.class_weights(config["class_weights"], train_data, config["workers"], rank, world)
    if class_weights is not None:
        class_weights = class_weights.to(device)

    torch.manual_seed(seed)
    torch.set_flush_denormal(True)  # fresh weights drive activations to denormals, on which a CPU is slow
    model = checkpoint.build_model(config)
    sync_bn = world > 1 and device.type == "cuda"
    norm = "SyncBatchNorm" if sync_bn else "BatchNorm"
    notes = [f"{world} x {config['batch_size']} x {accumulate} = {effective} images per step; {norm}, {device}"]
    notes.append(published_batch(config, world))
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
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        start, best_miou = state["iteration"], state["best_miou"]

    trained = model  # what trains is `model` with wrappers around it; what is evaluated and saved is `model` itself
    if world > 1:
        trained = nn.parallel.DistributedDataParallel(model)
    if config["compile"]:
        trained = torch.compile(trained)
    amp = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config["amp"]]

    received = []
    for number in (signal.SIGINT, signal.SIGTERM):  # the loaders' workers inherit this, and leave the end to the loop
        signal.signal(number, lambda number, frame: received.append(number))
    batches = Batches(len(train_data), config["batch_size"], seed, start * accumulate, iters * accumulate, rank, world)
    samples = TrainData(train_data, crop_size, config["scale"], seed)
    pin = device.type == "cuda"
    loader = iter(DataLoader(samples, batch_sampler=batches, num_workers=config["workers"], pin_memory=pin))

    if rank == 0:
        checkpoint.begin_run(out, config, start)
        print(f"{config['model']} R-{config['depth']} on {config['dataset']}: {len(train_data)} images, {out}/")
        print(*filter(None, notes), sep="\n")

    def save(name):
        parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
        state = {key: part.state_dict() for key, part in parts.items()}
        checkpoint.save(state | {"config": config, "iteration": iteration, "best_miou": best_miou}, out / name)

    def log(**values):
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps({"iteration": iteration} | values) + "\n")

    def validate():
        nonlocal best_miou
        if world > 1:  # they differ with plain BatchNorm: rank 0's count, as in the checkpoint
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        result = evaluate(model.eval(), val_data, config, workers=config["workers"], rank=rank, world=world)
        if rank == 0:
            log(**{name: result[name] for name in ("mIoU", "mAcc", "aAcc")})
            rows = [(*val_data[i], predict(model, val_data[i][0], config).cpu()) for i in range(min(4, len(val_data)))]
            picture = out / "samples" / f"{iteration:06}.png"
            compare(rows, config["classes"], config["palette"]).save(picture)
            tqdm.write(f"iteration {iteration}: mIoU {result['mIoU']:.2%}, {picture}")
            if result["mIoU"] > best_miou:
                best_miou = result["mIoU"]
                save("best.pt")
        model.train()
        return result

    def due():
        return iteration == iters or iteration > 0 and iteration % -(-iters // 10) == 0

    iteration, last_save = start, time.monotonic()
    model.train()
    if due():  # the run may have ended in the middle of this validation
        result = validate()
    with tqdm(total=iters, initial=start, desc=config["model"], disable=rank > 0, dynamic_ncols=True) as bar:
        while iteration < iters:
            step_start = time.monotonic()

            # One step of training.
            lr = poly_lr(iteration, iters, config["lr"])
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed((seed * iters + iteration) * world + rank)  # dropout's: a resumed run draws the same
            optimizer.zero_grad()
            status = torch.zeros(3, device=device)  # the two losses, and whether some process is to stop
            status[2] = len(received)
            for _ in range(accumulate):
                batch = next(loader)
                images, labels = to_device(batch, device)
                with torch.autocast(device.type, amp, enabled=amp is not None):
                    logits, aux_logits = trained(images)
                loss = segmentation_loss(logits, labels, class_weights) / accumulate
                aux_loss = 0.4 * segmentation_loss(aux_logits, labels, class_weights) / accumulate
                scaler.scale(loss + aux_loss).backward()
                status[:2] += torch.stack([loss, aux_loss]).detach()
            if world > 1:
                dist.all_reduce(status)
            loss, aux_loss, stop = (status / world).tolist()
            if not math.isfinite(loss + aux_loss):
                files = ", ".join(batch["file"])
                raise InputError(
                    f"iteration {iteration}: the loss is {loss + aux_loss}, learning rate {lr:.2g}; batch: {files}"
                )
            scaler.step(optimizer)
            scaler.update()

            speed = effective / (time.monotonic() - step_start)
            if rank == 0 and iteration % 10 == 0:
                log(loss=loss, aux_loss=aux_loss, lr=lr, images_per_second=speed)
            iteration += 1
            bar.set_postfix_str(f"loss {loss + aux_loss:.3f}, lr {lr:.4f}, {speed:.1f} images/s", refresh=False)
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
