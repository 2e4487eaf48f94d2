"""Evaluates the published models, plain and with multi-scale + flip, beside their published figures.

    python -m tools.reproduce                             # all models whose data set is a folder of data/
    python -m tools.reproduce '*ade20k' --data-root DIR   # those of one data set, which is elsewhere
    torchrun --nproc_per_node=4 -m tools.reproduce 'nonlocal*512x1024*'   # whose ms + flip was not published

Each measurement is added to --out when it is finished, and not repeated: after a stop the same command goes on. The
table at the end is Markdown: mIoU in percent, as published, as measured, and the difference.
"""

import fnmatch
import json
from itertools import product
from pathlib import Path

from data import open_data
from evaluate import check_classes, evaluate, evaluation_loader
from support import zoo
from support.checkpoint import load_model
from support.command import InputError, Parser, run_command, whole_number
from support.fast import for_inference
from support.files import write_file
from support.processes import from_rank_0, rank_and_world, start_process

MODES = {"plain": "mIoU", "ms+flip": "mIoU_ms_flip"}  # and what zoo.json calls the published figure
HEAD = "| name | mIoU | measured | difference | ms + flip | measured | difference |\n|---|--:|--:|--:|--:|--:|--:|"


def select_models(patterns, data_root):
    """{name: what zoo.json says} of the models that fit a pattern; without patterns of those whose data is there."""
    models = zoo.published()
    if not patterns:
        patterns = ["*"] if data_root else [f"*_{folder.name}" for folder in Path("data").glob("*")]
    elif unknown := [pattern for pattern in patterns if not fnmatch.filter(models, pattern)]:
        raise InputError(f"{unknown[0]}: there is no published model of that name (ZOO.md lists them)")
    found = {name: models[name] for name in models if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
    if not found:
        raise InputError("data/: holds no data set of the published models; name models, and --data-root")
    return found


def read_results(out):
    """{(published file, mode): result} of a file of results, if there is one. Raises InputError if it is some other
    file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        results = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        return {(result["published"], result["mode"]): result for result in results}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{out}: holds something else than results of this command; name another --out") from None


def measure(name, data, device, workers, aug):
    """mIoU, mAcc and aAcc of a published model on a data set, in percent."""
    model, settings = load_model(name)
    check_classes(data, settings, name)
    loader = evaluation_loader(data, workers)
    result = evaluate(for_inference(model, device), data, loader, settings, aug)
    return {key: 100 * result[key] for key in ("mIoU", "mAcc", "aAcc")}


def table_row(name, model, results):
    """A model's line of the table. A cell is empty where nothing was published, or measured."""
    cells = [name]
    for mode, key in MODES.items():
        published = model[key]
        measured = results.get((Path(model["url"]).name, mode), {}).get("mIoU")
        difference = None if None in (published, measured) else measured - published
        forms = ((published, ".2f"), (measured, ".2f"), (difference, "+.2f"))
        cells += ["" if value is None else format(value, form) for value, form in forms]
    return f"| {' | '.join(cells)} |"


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="published names or patterns (default: all with a data set in data/)")
    add("--data-root", help="the folder of the models' data set (default: its name below data/)")
    add("--plain", action="store_true", help="leave out multi-scale + flip, which has 17 times as many pixels")
    add("--out", type=Path, default=Path("reproduce.jsonl"), help="the file of results (default: reproduce.jsonl)")
    add("--workers", type=whole_number, default=2, help="processes that read images (default: 2)")
    return parser.parse_args()


def main():
    args = parse_arguments()
    device = start_process()
    rank, _ = rank_and_world()
    models = select_models(args.names, args.data_root)
    dataset_of = {name: name.rpartition("_")[2] for name in models}
    opened = {dataset: open_data(dataset, args.data_root, "val") for dataset in sorted(set(dataset_of.values()))}
    results = from_rank_0(read_results, args.out)
    for name, mode in product(models, ["plain"] if args.plain else MODES):
        data = opened[dataset_of[name]]
        key = Path(models[name]["url"]).name, mode
        images = results.get(key, {}).get("images", len(data))
        if images != len(data):
            raise InputError(f"{args.out}: {name} was measured on {images} images, not {len(data)}; name another --out")
        if key in results:
            continue
        figures = measure(name, data, device, args.workers, mode == "ms+flip")
        results[key] = {"published": key[0], "mode": mode, "images": len(data)} | figures
        if rank == 0:
            all_results = read_results(args.out) | results  # another command may have added some
            lines = "".join(json.dumps(result) + "\n" for result in all_results.values())
            write_file(args.out, lambda file, lines=lines: file.write(lines.encode()))
            print(f"{name}, {mode}, {len(data)} images: mIoU {figures['mIoU']:.2f}", flush=True)
    if rank == 0:
        print(HEAD, *(table_row(name, model, results) for name, model in models.items()), sep="\n")


if __name__ == "__main__":
    run_command(main)
