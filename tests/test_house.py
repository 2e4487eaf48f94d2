"""The rules of the house: which files there are, who imports whom, how long functions are, where a step passes."""

import ast
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import train
from data import distort_and_normalise, open_data, training_loader
from support.checkpoint import State
from support.run import add_classes
from support.settings import Settings, defaults

SEVEN = {"resnet_d8.py", "nonlocal_net.py", "gcnet.py", "ann.py", "data.py", "train.py", "evaluate.py"}
FILES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
    for place in (".", "support", "tools", "tests")
    for path in (ROOT / place).glob("*.py")
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def imports(name):
    """The modules that a file's import statements name, ours and others'."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= modules & FILES.keys() or {node.module}
    return found


USES = {name: imports(name) & FILES.keys() for name in FILES}


def test_seven_scripts_stand_at_the_top():
    assert {path.name for path in ROOT.glob("*.py")} == SEVEN


@pytest.mark.parametrize("model", ["resnet_d8", "nonlocal_net", "gcnet", "ann"])
def test_models_import_torch_and_the_backbone_alone(model):
    assert {name.split(".")[0] for name in imports(model)} <= {"torch", "resnet_d8"}


def test_no_file_is_reached_from_itself():
    for start in FILES:
        seen, ahead = set(), set(USES[start])
        while ahead:
            name = ahead.pop()
            seen.add(name)
            ahead |= USES[name] - seen
        assert start not in seen, start


def test_support_is_imported_and_tools_are_run():
    for name, tree in TREES.items():
        runs = any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)
        if name.startswith("support."):
            assert not runs, name
            assert not {used for used in USES[name] if used in ("data", "train", "evaluate")}, name
        if name.startswith("tools.") and name != "tools.__init__":
            assert runs, name
        if not name.startswith("tests."):
            assert not {used for used in USES[name] if used.startswith(("tools", "tests"))}, name


def test_no_test_file_imports_another():
    for name in FILES:
        if name.startswith("tests."):
            assert not {used for used in imports(name) if used.split(".")[-1].startswith("test_")}, name


def test_no_function_is_longer_than_a_screen():
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{name}.{node.name}: {length} lines"


def test_one_training_step_executes_few_files(folder):
    """From image files to updated weights: at most 6 files of this repository, with at most 1,000 lines in them."""
    settings = Settings(**defaults({"dataset": "folder", "depth": 18}) | {"dataset": "folder", "depth": 18})
    settings.data_root, settings.crop_size, settings.workers = str(folder), [32, 32], 0
    settings.pretrained = "none"
    data = open_data("folder", folder, "train")
    add_classes(settings, data, data, Path("run"))
    model = train.initial_model(settings, torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), settings.lr)
    state = State(model, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    loader = training_loader(data, settings, 0, 0, 1, False)
    executed = set()

    def trace(frame, event, argument):
        executed.add(frame.f_code.co_filename)

    def step():
        batches = [distort_and_normalise(next(loader), "cpu")]
        lr = train.poly_lr(0, settings.iters, settings.lr)
        train.training_step(state.model, state.optimizer, state.scaler, batches, lr)

    before = state.model.decode_head.conv_seg.weight.clone()
    sys.settrace(trace)
    try:
        step()
    finally:
        sys.settrace(None)
        torch.set_flush_denormal(False)
    assert not before.equal(state.model.decode_head.conv_seg.weight)
    ours = {Path(name) for name in executed} & set(FILES.values()) - {Path(__file__)}
    lines = {path.name: len(path.read_text().splitlines()) for path in ours}
    assert sum(lines.values()) <= 1000, lines
    assert {"train.py", "data.py", "gcnet.py", "resnet_d8.py", "images.py", "fast_loss.py"} == lines.keys()
