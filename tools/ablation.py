"""The ablation: every model on one set of drawn scenes, with several seeds and one recipe, as tables in Markdown.

    python -m tools.ablation                              # 15 runs below runs/ablation/, on two CPU cores under an hour
    python -m tools.ablation --dataset legend4            # where the query matters; over an hour
    python -m tools.ablation --model fcn gcnet --seeds 1  # what is finished is not run again; what was stopped goes on

mIoU is the mean over the seeds, with the lowest and the highest; multiply-adds are those of one image in eval mode;
images/s are what the training took in. The second table is the mean mIoU on the way there. The third is the share of
pixels that are classified right, for each seed, in those objects whose class the other end of a scene decides.
"""

import signal
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from data import open_data
from evaluate import predict
from support.checkpoint import build_model, load_model
from support.command import InputError, Parser, positive, run_command
from support.fast import for_inference
from support.run import read_config, read_log
from support.scenes import LEGEND_FORMS, decided_afar
from support.settings import DRAWN, PRESETS, Settings, defaults, read_settings

TRAIN = Path(__file__).parent.parent / "train.py"
ROWS = ("fcn", "snlnet", "gcnet", "nonlocal_net", "ann")  # of the table, the baseline first
HEAD = "| model | mIoU | lowest, highest | parameters (M) | multiply-adds (G) | images/s |\n|---|--:|--:|--:|--:|--:|"


def result(out, model, seed, args):
    """The mIoU of the run in a folder at its end, None if it has not come so far. Raises InputError if it is another
    run."""
    if not (out / "config.json").exists():
        return None
    config = read_settings(out)
    given = {"dataset": args.dataset, "model": model, "seed": seed, "iters": args.iters, "amp": args.amp}
    expected = Settings(**defaults(given) | given)
    expected.effective_batch = expected.batch_size  # one process trains
    for each in fields(Settings):
        value = getattr(expected, each.name)
        had = config.get(each.name, value)
        if had != value and not each.metadata["free"] and each.name not in ("classes", "palette"):
            raise InputError(f"{out}: holds a run with {each.name} {had}, not {value}; name another --out")
    return validations(out).get(args.iters)


def validations(out):
    """{iteration: mIoU} of the run in a folder."""
    return {line["iteration"]: line["mIoU"] for line in read_log(out) if "mIoU" in line}


def train(out, model, seed, args):
    """Runs train.py, which goes on with what the folder holds."""
    command = [sys.executable, TRAIN, "--dataset", args.dataset, "--out", out, "--amp", args.amp]
    command += ["--model", model, "--seed", seed, "--iters", args.iters]
    command += ["--resume"] * (out / "config.json").exists()
    process = subprocess.Popen([str(word) for word in command])
    try:
        process.wait()
    except KeyboardInterrupt:
        process.terminate()  # as Ctrl-C, which it has received too, this has it save
        process.wait()
        raise
    if process.returncode == 2:
        raise InputError(f"{out}: its training was refused; the line above says why")
    if process.returncode or result(out, model, seed, args) is None:
        raise InputError(f"{out}: its training has stopped; to go on, repeat the command")


def row(model, runs, iters):
    """A model's line of the table, from the folders of its runs."""
    results = [validations(out)[iters] for out in runs]
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


def course(runs):
    """Lines of a table: the mean mIoU of each model's runs at every other validation, and at the last."""
    steps = sorted(validations(next(iter(runs.values()))[0]))[::-2][::-1]
    lines = ["| mIoU after | " + " | ".join(map(str, steps)) + " |", "|---" + "|--:" * len(steps) + "|"]
    for model, folders in runs.items():
        values = [statistics.mean(validations(out)[step] for out in folders) for step in steps]
        lines.append(f"| {model} | " + " | ".join(f"{100 * value:.1f}" for value in values) + " |")
    return lines


def right_by_form(out):
    """{form: share of its pixels classified right}, in a finished run's validation scenes, of the objects whose class
    the other end decides."""
    model, config = load_model(out / "last.pt")
    model = for_inference(model, torch.device("cpu"))
    data = open_data(config["dataset"], None, "val")
    right, count = Counter(), Counter()
    for i in range(len(data)):
        image, label = data[i]
        afar = decided_afar(config["dataset"], image, label)
        hit = predict(model, image[None], config)[0] == label
        for kind in label[afar].unique().tolist():
            form = next(form for form in LEGEND_FORMS if form in config["classes"][kind])
            pixels = afar & (label == kind)
            right[form] += int((hit & pixels).sum())
            count[form] += int(pixels.sum())
    return {form: right[form] / count[form] for form in LEGEND_FORMS if count[form]}


def forms_table(runs):
    """Lines of a table: right_by_form of each model's runs, in percent."""
    shares = {model: [right_by_form(out) for out in folders] for model, folders in runs.items()}
    forms = list(next(iter(shares.values()))[0])
    lines = ["| right, by form (%) | " + " | ".join(forms) + " |", "|---" + "|--:" * len(forms) + "|"]
    for model, seeds in shares.items():
        cells = [", ".join(f"{100 * share[form]:.0f}" for share in seeds) for form in forms]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return lines


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", choices=ROWS, nargs="+", default=ROWS, help="default: all five")
    add("--seeds", type=positive, default=3, help="runs of each model, seeds 0, 1, ... (default: 3)")
    add("--dataset", choices=DRAWN[1:], default="context", help="the scenes (default: context)")
    add("--iters", type=positive, help="steps of a run (default: the data set's)")
    add("--amp", choices=("none", "bf16"), default="none", help="mixed precision (default: none)")
    add("--out", default="runs/ablation", help="where the runs' folders are (default: runs/ablation)")
    args = parser.parse_args()
    args.iters = args.iters or PRESETS[args.dataset].iters
    args.model = list(dict.fromkeys(args.model))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: raises KeyboardInterrupt
    runs = {
        model: [Path(args.out, f"{args.dataset}-{model}-{seed}") for seed in range(args.seeds)] for model in args.model
    }
    for seed in range(args.seeds):
        for model in args.model:
            if result(runs[model][seed], model, seed, args) is None:
                train(runs[model][seed], model, seed, args)
    print(HEAD, *(row(model, runs[model], args.iters) for model in args.model), sep="\n")
    print("", *course(runs), "", *forms_table(runs), sep="\n")


if __name__ == "__main__":
    run_command(main)
