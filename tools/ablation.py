"""The ablation: every model on the scenes `context`, with several seeds and one recipe, as one table in Markdown.

    python -m tools.ablation                              # 15 runs below runs/ablation/, on two CPU cores under an hour
    python -m tools.ablation --model fcn gcnet --seeds 1  # what is finished is not run again; what was stopped goes on

mIoU is the mean over the seeds, with the lowest and the highest; multiply-adds are those of one image in eval mode;
images/s are what the training took in.
"""

import signal
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from support.checkpoint import build_model
from support.command import InputError, Parser, positive, run_command
from support.run import read_config, read_log
from support.settings import PRESETS

TRAIN = Path(__file__).parent.parent / "train.py"
ROWS = ("fcn", "snlnet", "gcnet", "nonlocal_net", "ann")  # of the table, the baseline first
HEAD = "| model | mIoU | lowest, highest | parameters (M) | multiply-adds (G) | images/s |\n|---|--:|--:|--:|--:|--:|"


def result(out, model, seed, iters):
    """The mIoU of the run in a folder after `iters` steps, None if it has not come so far. Raises InputError if it is
    another run."""
    if not (out / "config.json").exists():
        return None
    config = read_config(out)
    expected = {"dataset": "context", "model": model, "seed": seed, "iters": iters, "lr": PRESETS["context"].lr}
    for name, value in expected.items():
        if config.get(name) != value:
            raise InputError(f"{out}: holds a run with {name} {config.get(name)}, not {value}; name another --out")
    lines = read_log(out)
    return next((line["mIoU"] for line in lines if line["iteration"] == iters and "mIoU" in line), None)


def train(out, model, seed, iters):
    """Runs train.py, which goes on with what the folder holds."""
    command = [sys.executable, TRAIN, "--dataset", "context", "--out", out]
    command += ["--model", model, "--seed", seed, "--iters", iters]
    command += ["--resume"] * (out / "config.json").exists()
    process = subprocess.Popen([str(word) for word in command])
    try:
        process.wait()
    except KeyboardInterrupt:
        process.terminate()  # as Ctrl-C, which it has received too, this has it save
        process.wait()
        raise
    if process.returncode or result(out, model, seed, iters) is None:
        raise InputError(f"{out}: its training has stopped; to go on, repeat the command")


def row(model, runs, iters):
    """A model's line of the table, from the folders of its runs."""
    results = [result(out, model, seed, iters) for seed, out in enumerate(runs)]
    lines = [line for out in runs for line in read_log(out) if "loss" in line]
    speed = statistics.median(line["images_per_second"] for line in lines)
    config = read_config(runs[0])
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        empty = build_model(config).eval()
        empty(torch.empty(1, 3, *config["crop_size"]))
    parameters = sum(p.numel() for p in empty.parameters()) / 1e6
    multiply_adds = counter.get_total_flops() / 2e9
    mean, low, high = (100 * value for value in (statistics.mean(results), min(results), max(results)))
    return f"| {model} | {mean:.1f} | {low:.1f}, {high:.1f} | {parameters:.2f} | {multiply_adds:.3f} | {speed:.1f} |"


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", choices=ROWS, nargs="+", default=ROWS, help="default: all five")
    add("--seeds", type=positive, default=3, help="runs of each model, seeds 0, 1, ... (default: 3)")
    add("--iters", type=positive, default=PRESETS["context"].iters, help="steps of a run (default: %(default)s)")
    add("--out", default="runs/ablation", help="where the runs' folders are (default: runs/ablation)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: raises KeyboardInterrupt
    runs = {model: [Path(args.out, f"{model}-{seed}") for seed in range(args.seeds)] for model in args.model}
    for seed in range(args.seeds):
        for model in args.model:
            if result(runs[model][seed], model, seed, args.iters) is None:
                train(runs[model][seed], model, seed, args.iters)
    print(HEAD, *(row(model, runs[model], args.iters) for model in args.model), sep="\n")


if __name__ == "__main__":
    run_command(main)
