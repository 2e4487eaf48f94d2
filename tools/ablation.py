"""The ablation: every model on one set of drawn scenes, with several seeds and one recipe, as a table in Markdown.

    python -m tools.ablation                              # 15 runs below runs/ablation/; two CPU cores: under an hour
    python -m tools.ablation --dataset legend             # where the query matters; two hours
    python -m tools.ablation --model fcn gcnet --seeds 1  # finished runs are not run again, stopped ones are continued

mIoU is the mean over the seeds, with the lowest and the highest. For each form of those objects whose class the other
end of a scene decides: the percentage of their pixels that are classified right, with each seed.
"""

import signal
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch

from data import open_data
from evaluate import predict
from support.checkpoint import load_model, read_checkpoint
from support.command import InputError, Parser, positive, run_command
from support.fast import for_inference
from support.images import VOID
from support.run import read_log
from support.scenes import LEGEND_FORMS
from support.settings import PRESETS, defaults, refuse_changes

TRAIN = Path(__file__).parent.parent / "train.py"
COMPARED = ("fcn", "snlnet", "gcnet", "nonlocal_net", "ann")  # the baseline first


def train(out, given):
    """Trains the run with the settings `given` in the folder `out`; continues it if it was stopped, and does nothing if
    it is finished. Raises InputError if the folder holds another run, or the training ends early."""
    if (out / "last.pt").exists():
        expected = {"blocks": None, "class_weights": None, "init": None} | defaults(given) | given
        expected["effective_batch"] = expected["batch_size"]  # images per step, which a resumed run keeps
        refuse_changes(expected, read_checkpoint(out / "last.pt")["settings"], out)
        if given["iters"] in validations(out):
            return
    options = [f"--{name}={value}" for name, value in given.items()]
    process = subprocess.Popen([sys.executable, TRAIN, "--out", out, "--resume", *options])
    try:
        process.wait()
    except KeyboardInterrupt:
        process.terminate()  # as Ctrl-C, which it has received too, this makes it save
        process.wait()
        raise
    if process.returncode:
        raise InputError(f"{out}: its training ended early, see above; repeat the command to continue it")


def validations(out):
    """{iteration: mIoU in percent} of the run in a folder."""
    return {line["iteration"]: 100 * line["mIoU"] for line in read_log(out) if "mIoU" in line}


def results_table(runs, iters):
    """The lines of a Markdown table of {model: folders of its runs}."""
    lines = []
    for model, folders in runs.items():
        mious = [validations(out)[iters] for out in folders]
        shares = [right_by_form(out) for out in folders]
        forms = [", ".join(f"{100 * share[form]:.0f}" for share in shares) for form in shares[0]]
        cells = [model, f"{statistics.mean(mious):.1f}", f"{min(mious):.1f}, {max(mious):.1f}", *forms]
        lines.append(f"| {' | '.join(cells)} |")
    head = f"| model | mIoU | lowest, highest | {' | '.join(shares[0])} |"
    return [head, "|---" + "|--:" * (head.count("|") - 2) + "|", *lines]


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


def decided_by_far_end(dataset, image, label):
    """Where the other end of a scene of "context" or "legend" decides the class, and nothing nearer: bool (H, W). image
    is uint8 (H, W, 3), label uint8 (H, W)."""
    if dataset == "context":
        return (label > 2) & (label != VOID)
    grey = image.amax(2).int() - image.amin(2) < 64  # noise included
    return grey & (label > 0) & (label != VOID)


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", choices=COMPARED, nargs="+", default=COMPARED, help="default: all five")
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
    print(*results_table(runs, iters), sep="\n")


if __name__ == "__main__":
    run_command(main)
