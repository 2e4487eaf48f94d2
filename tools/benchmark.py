"""Speed and memory of the models, measured on what evaluate.py and train.py run.

    python -m tools.benchmark infer --model gcnet --size 512 683  # one image; --slide H W SH SW: by windows
    python -m tools.benchmark train --model ann --size 256 256 --batch 2 --amp bf16
    python -m tools.benchmark aug --size 512 683                  # multi-scale + flip
    python -m tools.benchmark data --dataset cityscapes           # training samples of one core
    python -m tools.benchmark table                               # all models, beside the published figures

A time is the median of --repeat runs after --warmup others. Memory is the peak: what the GPU has allocated, or what of
the process is resident.
"""

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

from data import TrainData, distort_and_normalise, open_data
from evaluate import predict
from resnet_d8 import ResNetD8
from support import zoo
from support.checkpoint import build_model
from support.classes import CLASSES
from support.command import InputError, Parser, positive, run_command, whole_number
from support.fast import for_inference
from support.settings import AMP, MODELS, PRESETS, Settings
from train import initial_model, training_step

TEST_SIZES = {"cityscapes": (1024, 2048), "cityscapes769": (1025, 2049), "ade20k": (512, 683), "voc12aug": (512, 683)}
CLASS_COUNTS = {name: len(CLASSES[name.removesuffix("769")]) for name in TEST_SIZES}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(step, args):
    """Median seconds of step()."""
    seconds = []
    for _ in range(args.warmup + args.repeat):
        start = time.perf_counter()
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[args.warmup :])


def peak_memory():
    """The highest memory since the start, in bytes."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not ru_maxrss, which a process inherits from the one that started it.
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def build(args):
    """(model, settings). The weights keep the signal's size, as trained ones do; new ones shrink it to denormals, which
    are slow."""
    settings = Settings(model=args.model, depth=args.depth, classes=range(args.classes))
    settings.align_corners = args.align_corners
    if args.slide:
        settings.crop_size, settings.stride = args.slide[:2], args.slide[2:]
    torch.manual_seed(0)
    model = build_model(settings)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.7)
    return model, settings


def infer(args):
    """evaluate.py's way from images to their label maps, one image after another; for `aug` by multi-scale + flip."""
    model, settings = build(args)
    model = for_inference(model, DEVICE, AMP[args.amp], args.compile)
    aug = args.task == "aug"
    settings.scale = PRESETS["ade20k"].scale if aug else None
    image = torch.randint(256, (*args.size, 3), dtype=torch.uint8)
    return timed(lambda: [predict(model, image, settings, aug) for _ in range(args.batch)], args)


def train(args):
    """train.py's step, from a batch of uint8 crops, colour included, to the new weights."""
    built, settings = build(args)
    model = initial_model(settings, DEVICE, from_scratch=False)
    model.load_state_dict(built.state_dict())
    del built
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=args.amp == "fp16")
    model = torch.compile(model) if args.compile else model
    batch = {
        "image": torch.randint(256, (args.batch, 3, *args.size), dtype=torch.uint8),
        "label": torch.randint(args.classes, (args.batch, *args.size), dtype=torch.uint8),
        "size": torch.tensor([args.size] * args.batch),
        "colour": torch.tensor([[10, 1.2, 0.8, 0.05, 1]] * args.batch),
    }

    def step():
        batches = [distort_and_normalise(batch, DEVICE)]
        training_step(model, optimizer, scaler, batches, 0.01, None, AMP[args.amp], args.align_corners)

    return timed(step, args)


def data(args):
    """Training samples on one core, from files in the data set's own layout to crops; colour is the device's work."""
    torch.set_num_threads(1)
    image_name, label_name = {
        "ade20k": ("images/training/{}.jpg", "annotations/training/{}.png"),
        "cityscapes": ("leftImg8bit/train/a/{}_leftImg8bit.png", "gtFine/train/a/{}_gtFine_labelTrainIds.png"),
    }[args.dataset]
    preset, (height, width) = PRESETS[args.dataset], TEST_SIZES[args.dataset]
    with tempfile.TemporaryDirectory() as root:
        for i in range(4):  # images that are smooth but for a little noise, as photographs are
            rng = np.random.default_rng(i)
            colours = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
            smooth = np.array(colours.resize((width, height), Image.Resampling.BICUBIC))
            image = (smooth * 0.7 + 30 + rng.normal(0, 1.5, smooth.shape)).astype(np.uint8)
            classes = rng.integers(0, CLASS_COUNTS[args.dataset], (height // 64, width // 64), dtype=np.uint8)
            label = Image.fromarray(classes).resize((width, height), Image.Resampling.NEAREST)
            for name, picture in ((image_name, Image.fromarray(image)), (label_name, label)):
                path = Path(root, name.format(i))
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path, quality=92)  # of JPEG; PNG has none
        files = open_data(args.dataset, root, "train", root if args.cache else None)
        samples = TrainData(files, preset.crop_size, preset.scale, 0, preset.ratios)
        position = iter(range(10**9))
        return timed(lambda: [samples[next(position), i] for i in range(4)], args)


TABLE_HEAD = """Here: {device}, {precision}; images per second (fps) and peak memory of `infer`, one image at test size,
and, on a GPU, the peak memory of `train`. Published: fps on a V100, fp32; training 2 images (Cityscapes) or 4.

| model | setting | fps | published | GB | training GB | published |
|---|---|--:|--:|--:|--:|--:|"""


def table(args):
    """Prints the models at the settings published for them; each measurement is a process of its own."""
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    print(TABLE_HEAD.format(device=device, precision=args.amp.replace("none", "fp32") + ", compiled" * args.compile))
    rows = {}
    for name, figures in zoo.published().items():
        model, depth, crop, dataset = re.match(r"([a-z]+)_r(\d+)-d8_(\d+)x\d+_\d+k_(\w+)", name).groups()
        key = model.replace("nonlocal", "nonlocal_net"), int(depth), dataset + crop.replace("512", "")
        rows.setdefault(key, figures)  # a longer schedule has the same figures
    for key, figures in rows.items():
        print(table_row(*key, figures, args), flush=True)


def table_row(model, depth, dataset, figures, args):
    preset = PRESETS[dataset]
    options = ["--model", model, "--depth", depth, "--classes", CLASS_COUNTS[dataset], "--amp", args.amp]
    options += ["--align-corners"] * preset.align_corners + ["--compile"] * args.compile
    slide = ["--slide", *preset.crop_size, *preset.stride] if preset.stride else []
    inferred = measure(args, "infer", "--size", *TEST_SIZES[dataset], *slide, *options)
    cells = [f"{inferred['images_per_second']:.3g}", f"{figures['fps']}", f"{inferred['peak_memory_gb']:.1f}", "-"]
    if DEVICE.type == "cuda":
        trained = measure(args, "train", "--size", *preset.crop_size, "--batch", preset.batch_size, *options)
        cells[-1] = f"{trained['peak_memory_gb']:.1f}"
    return f"| {model} R-{depth} | {dataset} | {' | '.join(cells)} | {figures['memory_gb']} |"


def measure(args, *task):
    """The result of a task in a process of its own, whose peak memory no other has raised."""
    words = [str(word) for word in (*task, "--warmup", args.warmup, "--repeat", args.repeat, "--json")]
    command = [sys.executable, "-m", "tools.benchmark", *words]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise InputError(f"{' '.join(words)}: ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


TASKS = {"infer": infer, "aug": infer, "train": train, "data": data, "table": table}


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("task", choices=TASKS)
    add("--model", choices=MODELS, default="gcnet", help="default: gcnet")
    add("--depth", type=int, choices=tuple(ResNetD8.BLOCKS), default=50, help="of the ResNet (default: 50)")
    add("--classes", type=positive, default=150, help="default: 150")
    add("--size", type=positive, nargs=2, metavar=("H", "W"), default=[512, 512], help="of an image (default: 512 512)")
    add("--batch", type=positive, default=1, help="images of a step, or to infer one by one (default: 1)")
    add("--align-corners", action="store_true", help="resize logits as the 769x769 settings do")
    add("--slide", type=positive, nargs=4, metavar=("H", "W", "SH", "SW"), help="windows: their size and stride")
    add("--dataset", choices=("ade20k", "cityscapes"), default="ade20k", help="for the task data (default: ade20k)")
    add("--cache", action="store_true", help="data: from decoded images, as train.py --cache")
    add("--amp", choices=AMP, default="none", help="mixed precision")
    add("--compile", action="store_true", help="torch.compile")
    add("--warmup", type=whole_number, default=1, help="runs before the first that counts (default: 1)")
    add("--repeat", type=positive, default=3, help="runs that count (default: 3)")
    add("--json", action="store_true", help="print one line of JSON")
    return parser.parse_args()


def main():
    args = parse_arguments()
    seconds = TASKS[args.task](args)
    if seconds is None:  # the table is printed
        return
    images = 4 if args.task == "data" else args.batch
    result = {"task": args.task, "model": args.model, "seconds": seconds, "images_per_second": images / seconds}
    result["peak_memory_gb"] = peak_memory() / 2**30
    if args.json:
        print(json.dumps(result))
    else:
        print("{seconds:.4f} s, {images_per_second:.2f} images/s, {peak_memory_gb:.2f} GB".format(**result))


if __name__ == "__main__":
    run_command(main)
