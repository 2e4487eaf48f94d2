import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the scripts stand beside the folder of tests


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


@pytest.fixture
def run_script(tmp_path):
    """Runs one of the project's commands as its user does: run_script("train.py", "--iters", 4) in an empty folder."""

    def run(script, *arguments, processes=None, status=0):
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes else []
        tool = script.startswith("tools/")
        command = [sys.executable, *launcher, *(["-m", f"tools.{script[6:-3]}"] if tool else [ROOT / script]), *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 300}
        done = subprocess.run([str(part) for part in command], **options)
        assert done.returncode == status, done.stdout + done.stderr
        return done

    return run
