"""The ablation: every model on one set of drawn scenes, with several seeds and one recipe, as tables in Markdown.

    python -m tools.ablation                              # 15 runs below runs/ablation/, on two CPU cores under an hour
    python -m tools.ablation --dataset legend             # where the query matters; over an hour
    python -m tools.ablation --model fcn gcnet --seeds 1  # finished runs are not run again, stopped ones are continued

mIoU is the mean over the seeds, with the lowest and the highest; multiply-adds are those of one image in eval mode;
images/s are what the training took in. The second table is the share of pixels that are classified right, for each
seed, in those objects whose class the other end of a scene decides.
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
from support.checkpoint import load_model, read_checkpoint
from support.command import InputError, Parser, positive, run_command
from support.fast import for_inference
from support.run import read_log
from support.scenes import LEGEND_FORMS, decided_by_far_end
from support.settings import PRESETS, Settings, defaults

TRAIN = Path(__file__).parent.parent / "train.py"
MODELS = ("fcn", "snlnet", "gcnet", "nonlocal_net", "ann")  # the baseline first


def train(out, given):
    """Trains the run with the settings `given` in the folder `out`; continues it if it was stopped, and does nothing if
    it is finished. Raises InputError if the folder holds another run, or the training ends early."""
    if (out / "last.pt").exists():
        refuse_another_run(out, given)
        if given["iters"] in validations(out):
            return
    options = [f"--{name}={value}" for name, value in given.items()]
    process = subprocess.Popen([sys.executable, TRAIN, "--out", out, "--resume", *options])
    try:
        process.wait()
    except KeyboardInterrupt:
        process.terminate()  # as Ctrl-C, which it has received too, this has it save
        process.wait()
        raise
    if process.returncode:
        raise InputError(f"{out}: its training ended early, see above; repeat the command to continue it")


def refuse_another_run(out, given):
    """Raises InputError if the run in a folder has other settings than those `given` and the data set's defaults."""
    settings = read_checkpoint(out / "last.pt")["settings"]
    expected = Settings(**defaults(given) | given)
    expected.effective_batch = expected.batch_size  # one process trains
    for each in fields(Settings):
        had, wanted = getattr(settings, each.name), getattr(expected, each.name)
        if had != wanted and not each.metadata["free"] and each.name not in ("classes", "palette"):
            raise InputError(f"{out}: holds a run with {each.name} {had}, not {wanted}; name another --out")


def validations(out):
    """{iteration: mIoU in percent} of the run in a folder."""
    return {line["iteration"]: 100 * line["mIoU"] for line in read_log(out) if "mIoU" in line}


def results_table(runs, iters):
    """Rows of cells, the head first, from {model: folders of its runs}."""
    rows = [["model", "mIoU", "lowest, highest", "parameters (M)", "multiply-adds (G)", "images/s"]]
    for model, folders in runs.items():
        mious = [validations(out)[iters] for out in folders]
        speeds = [line["images_per_second"] for out in folders for line in read_log(out) if "loss" in line]
        network, settings = load_model(folders[0] / "last.pt")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.eval()(torch.zeros(1, 3, *settings.crop_size))
        parameters = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        multiply_adds = counter.get_total_flops() / 2e9
        cells = [f"{statistics.mean(mious):.1f}", f"{min(mious):.1f}, {max(mious):.1f}"]
        cells += [f"{parameters:.2f}", f"{multiply_adds:.3f}", f"{statistics.median(speeds):.1f}"]
        rows.append([model, *cells])
    return rows


def forms_table(runs):
    """Rows of cells: right_by_form of each model's runs, in percent."""
    rows = []
    for model, folders in runs.items():
        shares = [right_by_form(out) for out in folders]
        rows.append([model, *(", ".join(f"{100 * share[form]:.0f}" for share in shares) for form in shares[0])])
    return [["right, by form (%)", *shares[0]], *rows]


def right_by_form(out):
    """{form: share of its pixels classified right}, in a finished run's validation scenes, of the objects whose class
    the other end decides."""
    model, settings = load_model(out / "last.pt")
    model = for_inference(model, torch.device("cpu"))
    data = open_data(settings.dataset, None, "val")
    right, count = Counter(), Counter()
    for i in range(len(data)):
        image, label = data[i]
        hit = predict(model, image, settings)[0] == label
        afar = decided_by_far_end(settings.dataset, image, label)
        for kind in label[afar].unique().tolist():
            form = next(form for form in LEGEND_FORMS if form in settings.classes[kind])
            pixels = afar & (label == kind)
            right[form] += (hit & pixels).sum().item()
            count[form] += pixels.sum().item()
    return {form: right[form] / count[form] for form in LEGEND_FORMS if count[form]}


def markdown(rows):
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([lines[0], "|---" + "|--:" * (len(rows[0]) - 1) + "|", *lines[1:]])


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", choices=MODELS, nargs="+", default=MODELS, help="default: all five")
    add("--seeds", type=positive, default=3, help="runs of each model, seeds 0, 1, ... (default: 3)")
    add("--dataset", choices=("context", "legend"), default="context", help="the scenes (default: context)")
    add("--iters", type=positive, help="steps of a run (default: the data set's)")
    add("--amp", choices=("none", "bf16"), default="none", help="mixed precision (default: none)")
    add("--out", default="runs/ablation", help="where the runs' folders are (default: runs/ablation)")
    args = parser.parse_args()
    iters = args.iters or PRESETS[args.dataset].iters
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: raises KeyboardInterrupt
    seeds = range(args.seeds)
    runs = {model: [Path(args.out, f"{args.dataset}-{model}-{seed}") for seed in seeds] for model in args.model}
    for seed in seeds:
        for model, folders in runs.items():
            given = {"dataset": args.dataset, "model": model, "seed": seed, "iters": iters, "amp": args.amp}
            train(folders[seed], given)
    tables = (results_table(runs, iters), forms_table(runs))
    print(*map(markdown, tables), sep="\n\n")


if __name__ == "__main__":
    run_command(main)
