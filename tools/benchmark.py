"""Speed, memory and size of the models, measured on what evaluate.py and train.py run.

    python -m tools.benchmark infer --model gcnet --size 512 683  # one image; --slide H W SH SW: by windows
    python -m tools.benchmark train --model ann --size 256 256 --batch 2 --amp bf16
    python -m tools.benchmark aug --size 512 683                  # multi-scale + flip
    python -m tools.benchmark data --dataset cityscapes           # training samples of one core
    python -m tools.benchmark table                               # all models, beside the published figures
    python -m tools.benchmark grow                                # the blocks against the number of positions
    python -m tools.benchmark papers                              # the sizes in GCNet's tables

A time is the median of --repeat runs after --warmup others. Memory is the peak: what the GPU has allocated, or what of
the process is resident.
"""

import ctypes
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import default_collate

from ann import APNB
from data import TrainData, open_data, to_device
from evaluate import predict, slide_inference
from gcnet import GCBlock
from nonlocal_net import NonLocalBlock
from resnet_d8 import ResNetD8
from support import papers, zoo
from support.checkpoint import MODELS, build_model
from support.command import InputError, Parser, positive, run_command, whole_number
from support.fast import for_inference
from support.settings import AMP, PRESETS
from train import training_step

SIDES = (24, 32, 48, 64, 97, 128, 181)  # of the maps in `grow`: 1/8 of 192 to 1448 pixels
ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(step, args):
    """Median seconds of step()."""

    def once():
        start = time.perf_counter()
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(args.warmup):
        once()
    return statistics.median(once() for _ in range(args.repeat))


def peak_memory():
    """The highest memory since the start or since `reset_peak`, in bytes."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not ru_maxrss, which a process inherits from the one that started it.
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def reset_peak():
    """Begins the peak anew; gives the memory in use."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system, so that it counts when used again
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def build(args):
    """Model and config. Weights keep the signal's size, as trained ones do; fresh ones shrink it to slow denormals."""
    config = {
        "model": args.model,
        "depth": args.depth,
        "classes": [str(i) for i in range(args.classes)],
        "align_corners": args.align_corners,
        "scale": PRESETS["ade20k"].scale if args.task == "aug" else None,
        "crop_size": args.slide[:2] if args.slide else args.size,
        "stride": args.slide[2:] if args.slide else None,
    }
    torch.manual_seed(0)
    model = build_model(config)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.7)
    return model, config


def smooth_image(height, width, seed=0):
    """uint8 (height, width, 3) without the fine grain of noise, which no photograph has."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(height // 16, 2), max(width // 16, 2), 3), dtype=np.uint8)
    return torch.from_numpy(np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)))


def infer(args):
    """evaluate.py's way from images of one size to their label maps."""
    model, config = build(args)
    model = for_inference(model, DEVICE, AMP[args.amp], args.compile)
    images = smooth_image(*args.size)[None].expand(args.batch, -1, -1, -1)
    return timed(lambda: predict(model, images, config, args.task == "aug"), args)


def train(args):
    """train.py's step, from a batch of uint8 crops, colour included, to the new weights."""
    model, _ = build(args)
    model.train().to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=args.amp == "fp16")
    trained = torch.compile(model) if args.compile else model
    sample = {
        "image": smooth_image(*args.size).permute(2, 0, 1),
        "label": torch.randint(0, args.classes, args.size, dtype=torch.uint8),
        "valid": torch.tensor(args.size),
        "colour": torch.tensor([10, 1.2, 0.8, 0.05, 1]),
    }
    batch = default_collate([sample] * args.batch)
    amp = AMP[args.amp]
    return timed(lambda: training_step(trained, optimizer, scaler, [to_device(batch, DEVICE)], 0.01, None, amp), args)


def data(args):
    """One core's training samples, from files in the data set's own layout to crops; colour is the device's work."""
    torch.set_num_threads(1)
    cityscapes = args.dataset == "cityscapes"
    height, width = (1024, 2048) if cityscapes else (512, 683)
    image_path, label_path, quality = {
        "ade20k": ("images/training/{}.jpg", "annotations/training/{}.png", {"quality": 92}),
        "cityscapes": ("leftImg8bit/train/a/{}_leftImg8bit.png", "gtFine/train/a/{}_gtFine_labelTrainIds.png", {}),
    }[args.dataset]
    with tempfile.TemporaryDirectory() as root:
        for i in range(4):
            rng = np.random.default_rng(i)
            image = smooth_image(height, width, i).numpy() * 0.7 + 30 + rng.normal(0, 1.5, (height, width, 3))
            label = rng.integers(0, 19 if cityscapes else 150, (height // 64, width // 64), dtype=np.uint8)
            label = Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST)
            image = Image.fromarray(image.astype(np.uint8))
            for path, picture, options in ((image_path, image, quality), (label_path, label, {})):
                path = Path(root, path.format(i))
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path, **options)
        preset = PRESETS[args.dataset]
        files = open_data(args.dataset, root, "train", args.cache and root)
        samples = TrainData(files, preset.crop_size, preset.scale, 0, preset.ratios)
        position = iter(range(10**9))
        return timed(lambda: [samples[next(position), i] for i in range(4)], args)


TEST_SIZES = {"cityscapes": (1024, 2048), "cityscapes769": (1025, 2049), "ade20k": (512, 683), "voc12aug": (512, 683)}
TABLE_HEAD = """Published: fps of one image at test size on a V100, fp32; peak memory of training on a GPU, 2 images
(Cityscapes) or 4. Here: {device}, {amp}{compiled}; fps and peak memory of `infer`, one image at test size{training}.

| model | setting | params (M) | multiply-adds (G) | fps | GB | training GB | published fps | published training GB |
|---|---|--:|--:|--:|--:|--:|--:|--:|"""


def multiply_adds(model, images, *window):
    """Of the model in eval mode on images, both on the meta device, which counts without computing."""
    from torch.utils.flop_counter import FlopCounterMode  # here, since it takes 70 MB, which memory figures would hold

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        slide_inference(model, images, *window) if window else model(images)
    return counter.get_total_flops() / 2


def table(args):
    """Prints the models at the settings published for them; each measurement is a process of its own."""
    gpu = DEVICE.type == "cuda"
    device = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} threads of this CPU"
    compiled, training = ", compiled" if args.compile else "", ", peak memory of `train`" if gpu else ""
    print(TABLE_HEAD.format(device=device, amp=args.amp.replace("none", "fp32"), compiled=compiled, training=training))
    seen = set()
    for name, known in zoo.published().items():
        model, depth, crop, dataset = re.match(r"([a-z]+)_r(\d+)-d8_(\d+)x\d+_\d+k_(\w+)", name).groups()
        model, dataset = model.replace("nonlocal", "nonlocal_net"), dataset + crop.replace("512", "")
        if (model, depth, dataset) in seen:  # a longer schedule of the same
            continue
        seen.add((model, depth, dataset))
        preset, size, classes = PRESETS[dataset], TEST_SIZES[dataset], {"a": 150, "c": 19, "v": 21}[dataset[0]]
        window = (preset.crop_size, preset.stride) if preset.stride else ()
        with torch.device("meta"):
            empty = MODELS[model](classes, int(depth), preset.align_corners).eval()
            count = multiply_adds(empty, torch.empty(1, 3, *size), *window)
        parameters = sum(parameter.numel() for parameter in empty.parameters())
        shared = ["--model", model, "--depth", depth, "--classes", classes, "--amp", args.amp]
        shared += ["--align-corners"] * preset.align_corners + ["--compile"] * args.compile
        windows = ["--slide", *preset.crop_size, *preset.stride] if window else []
        inferred = measure(args, "infer", "--size", *size, *windows, *shared)
        fps, memory, training = inferred["images_per_second"], f"{inferred['peak_memory_gb']:.1f}", "-"
        if gpu:
            trained = measure(args, "train", "--size", *preset.crop_size, "--batch", preset.batch_size, *shared)
            training = f"{trained['peak_memory_gb']:.1f}"
        cells = [f"{model} R-{depth}", dataset, f"{parameters / 1e6:.1f}", f"{count / 1e9:.0f}", f"{fps:.3g}", memory]
        print(" | ".join(["", *cells, training, str(known["fps"]), str(known["memory_gb"]), ""]).strip(), flush=True)


def measure(args, *task):
    """The result of a task in a process of its own, whose peak memory no other has raised."""
    words = [str(word) for word in (*task, "--warmup", args.warmup, "--repeat", args.repeat, "--json")]
    command = [sys.executable, "-m", "tools.benchmark", *words]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise InputError(f"{' '.join(words)}: ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def grow(args):
    """Time and memory of the blocks in eval mode at 512 channels, batch 1, from 24^2 to 181^2 positions; a picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("the picture needs matplotlib: pip install matplotlib") from None
    if Path(args.out).suffix not in (".svg", ".png", ".pdf"):
        raise InputError(f"--out {args.out}: name a picture that ends in .svg, .png or .pdf")
    if Path(args.out).exists() or not Path(args.out).parent.is_dir():
        raise InputError(f"--out {args.out}: name a new picture, in a folder that is there")
    blocks = {"NL": NonLocalBlock(512), "ANN (APNB)": APNB(512, 256), "GC": GCBlock(512)}
    rows = {name: [] for name in blocks}
    print(f"{'block':<12}{'positions':>10}{'ms':>10}{'MB':>10}")
    for name, block in blocks.items():
        block.eval().to(DEVICE, memory_format=torch.channels_last)
        for side in SIDES:
            x = torch.randn(1, 512, side, side, device=DEVICE).contiguous(memory_format=torch.channels_last)
            with torch.inference_mode():
                seconds = timed(lambda: block(x), args)  # noqa: B023
                before = reset_peak()
                block(x)
            rows[name].append((side**2, 1e3 * seconds, (peak_memory() - before) / 2**20))
            print(f"{name:<12}{rows[name][-1][0]:>10}{rows[name][-1][1]:>10.1f}{rows[name][-1][2]:>10.1f}", flush=True)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, column, unit in zip(figure.subplots(1, 2), (1, 2), ("ms", "MB beside the input"), strict=True):
        for name, points in rows.items():
            axes.loglog([row[0] for row in points], [row[column] for row in points], marker=".", label=name)
        axes.set(xlabel="positions (H x W at 1/8)", ylabel=unit)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(args.out)
    print(args.out)


PAPERS_HEAD = """Parameters (M) and multiply-adds (G) here, and as published in GCNet's tables.

| task | block | place | parameters | published | multiply-adds | published | why they differ |
|---|---|---|--:|--:|--:|--:|---|"""


def sizes(args):
    """Prints the models of GCNet's tables."""
    print(PAPERS_HEAD)
    for row in papers.ROWS:
        parameters, multiply_adds = papers.measure(row)
        counts = [papers.like(parameters, row.parameters), row.parameters]
        counts += [papers.like(multiply_adds, row.multiply_adds), row.multiply_adds]
        print(f"| {' | '.join([row.task, row.block, row.place, *counts, row.unmet])} |", flush=True)


MEASURED = {"infer": infer, "aug": infer, "train": train, "data": data}  # tasks of one measurement
PRINTED = {"table": table, "grow": grow, "papers": sizes}  # tasks that print their own


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("task", choices=(*MEASURED, *PRINTED))
    add("--model", choices=MODELS, default="gcnet", help="default: gcnet")
    add("--depth", type=int, choices=tuple(ResNetD8.BLOCKS), default=50, help="of the ResNet (default: 50)")
    add("--classes", type=positive, default=150, help="default: 150")
    add("--size", type=positive, nargs=2, metavar=("H", "W"), default=[512, 512], help="of an image (default: 512 512)")
    add("--batch", type=positive, default=1, help="images per step (default: 1; data: 4)")
    add("--align-corners", action="store_true", help="resize logits as the 769x769 settings do")
    add(
        "--slide", type=positive, nargs=4, metavar=("H", "W", "SH", "SW"), help="sliding windows: their size and stride"
    )
    add("--dataset", choices=("ade20k", "cityscapes"), default="ade20k", help="of data (default: ade20k)")
    add("--cache", action="store_true", help="data: from decoded images, as train.py --cache")
    add("--amp", choices=AMP, default="none", help="mixed precision")
    add("--compile", action="store_true", help="torch.compile")
    add("--warmup", type=whole_number, default=1, help="runs before the first that counts (default: 1)")
    add("--repeat", type=positive, default=3, help="runs that count (default: 3)")
    add("--out", default="growth.svg", help="grow's picture (default: growth.svg)")
    add("--json", action="store_true", help="print one line of JSON")
    args = parser.parse_args()
    if args.classes > 255:
        raise InputError(f"--classes {args.classes}: labels have 8 bits, for at most 255 classes")
    if args.task == "train" and args.batch == 1 and max(args.size) <= 8:
        raise InputError("--batch 1 with --size 8 8 or less: BatchNorm needs more than one value per channel")
    return args


def main():
    args = parse_arguments()
    if args.task in PRINTED:
        return PRINTED[args.task](args)
    images = 4 if args.task == "data" else args.batch
    seconds = MEASURED[args.task](args)
    result = {"task": args.task, "model": args.model, "seconds": seconds, "images_per_second": images / seconds}
    result["peak_memory_gb"] = peak_memory() / 2**30
    if args.json:
        print(json.dumps(result))
    else:
        print("{seconds:.4f} s, {images_per_second:.2f} images/s, {peak_memory_gb:.2f} GB".format(**result))


if __name__ == "__main__":
    run_command(main)
