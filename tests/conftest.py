"""What the tests share: small data sets, checkpoints, and the commands, each as its user runs it or in this process."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the scripts stand beside the folder of tests

from support import checkpoint, command  # noqa: E402
from support.settings import MODELS, Settings  # noqa: E402


def pytest_configure(config):
    """Hides a GPU from all tests but those of test_gpu.py: what the others compare is exact on a processor alone, and
    their several processes need a GPU each."""
    if not any("test_gpu" in argument for argument in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


# ---------------------------------------------------------------------------------------------------------- data sets


def write_scene(images, labels, name, seed, size=(40, 48), classes=3):
    """An image whose red channel is 60 times its class + 30, so that label and image can be compared."""
    rng = np.random.default_rng(seed)
    label = np.kron(rng.integers(0, classes, (5, 6)), np.ones((8, 8))).astype(np.uint8)[: size[0], : size[1]]
    image = np.stack([60 * label + 30, np.full_like(label, 90), rng.integers(0, 255, label.shape)], -1).astype(np.uint8)
    label[0, :3] = 255
    for folder, array, path in ((images, image, f"{name}.png"), (labels, label, f"{name}.png")):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / path)


def make_folder(place):
    """A data set of own images and masks: 6 to train on, 3 to validate on, one of them in a subfolder."""
    root = place / "own"
    for split, count in (("train", 6), ("val", 3)):
        for i in range(count):
            name = f"street/scene{i}" if i == 0 else f"scene{i}"
            write_scene(root / "images" / split, root / "annotations" / split, name, seed=10 * count + i)
    (root / "classes.txt").write_text("road\nhouse\ntree\n")
    return root


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


# --------------------------------------------------------------------------------------------------------- checkpoints


def save_model(path, model, classes=("road", "house", "tree"), **others):
    """A checkpoint with random weights, of which attention's are so large that it depends on the query."""
    torch.manual_seed(0)
    palette = [[i, 2 * i, 99] for i in range(len(classes))]
    given = {"dataset": "folder", "depth": 18, "crop_size": [32, 32], "classes": list(classes), "palette": palette}
    settings = Settings(model=model, **given | others)
    weights = checkpoint.build_model(settings).state_dict()
    for name, weight in weights.items():
        if re.search("theta.*weight|phi.*weight|conv_mask.weight|conv_out.bn.weight", name):
            weight.normal_(std=0.5)
    torch.save({"model": weights, "config": vars(settings)}, path)
    return path


WHOLE, SLIDE = "mode='whole'", "mode='slide', crop_size=(769, 769),\n        stride=(513, 513)"
PUBLISHED_CONFIG = """
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    decode_head=dict(
        type='any',
        align_corners={align}),
    test_cfg=dict({test}))
dataset_type = '{dataset}Dataset'
test_pipeline = [
    dict(
        type='MultiScaleFlipAug',
        img_scale={scale},
        flip=False)
]
"""


def published(name="gcnet", depth=18, classes=19, dataset="Cityscapes", scale=(2048, 1024), align=False, test=WHOLE):
    """What a file of the published form holds."""
    weights = MODELS[name](classes, depth).state_dict()
    text = PUBLISHED_CONFIG.format(align=align, test=test, dataset=dataset, scale=scale)
    names = [f"class {i}" for i in range(classes)]
    meta = {"CLASSES": tuple(names), "PALETTE": [[i, 0, 0] for i in range(classes)], "config": text, "time": "now"}
    return {"meta": meta, "state_dict": weights, "optimizer": {"state": {}, "param_groups": []}}


def changed(path):
    return path.stat().st_mtime if path.exists() else 0


def same_weights(one, two):
    one, two = (torch.load(path, weights_only=True)["model"] for path in (one, two))
    return all(value.equal(two[key]) for key, value in one.items())


def read_log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------ commands

SMALL = ("--depth", 18, "--crop-size", 32, 32, "--batch-size", 2)


def train_arguments(folder, out, iters=4, workers=1, weights=("--pretrained", "none")):
    """train.py and its arguments, for a small run on own images."""
    where = ("--dataset", "folder", "--data-root", folder, "--out", out)
    return ["train.py", *where, *SMALL, *weights, "--workers", workers, "--iters", iters]


def contents(folder):
    """{path: content} of all files below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(arguments, place, **options):
    """A process that runs train.py, evaluate.py, tools.NAME, or Python with other arguments, in the folder `place`."""
    first, *others = (str(argument) for argument in arguments)
    command_line = ["-m", first] if first.startswith("tools.") else [ROOT / first if first.endswith(".py") else first]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command_line, *others], cwd=place, env=environment, **pipes, **options)


def run_together(arguments, place, processes=2):
    """(stdout, stderr, status) of a script that torchrun starts several times."""
    process = start(["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *arguments], place)
    return (*process.communicate(timeout=300), process.returncode)


@pytest.fixture
def run_script(tmp_path):
    """Runs a command as its user does: run_script("train.py", "--iters", 4) in an empty folder, to its end."""

    def run(script, *arguments, processes=None, status=0):
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", ROOT / script]
        process = start([*(launcher if processes else [script]), *arguments], tmp_path)
        try:
            out, err = process.communicate(timeout=300)
        finally:
            process.kill()
        assert process.returncode == status, out + err
        return subprocess.CompletedProcess(process.args, status, out, err)

    return run


@pytest.fixture
def run_inside(tmp_path, monkeypatch, capsys):
    """Calls a command's main() in this process, which saves seconds: run_inside(train, "--iters", 4) gives what it
    prints, and with fails=True the line with which it refuses."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def run(module, *arguments, fails=False):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        try:
            module.main()
        except Exception as error:
            message = command.explain(error)
            if message is None or not fails:
                raise
            return message
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            torch.set_flush_denormal(False)
        assert not fails
        return capsys.readouterr().out

    return run


def one_line(process, script, words):
    """The line on which a process ended, which must hold the words."""
    assert "Traceback" not in process.stderr, process.stderr
    message = process.stderr.strip().splitlines()[-1]
    assert message.startswith(f"{script}: error: "), process.stderr
    for word in words:
        assert word in message, message
