"""A GPU computes what a processor does, several processes on it what one does, and it does so twice.

Run by python -m pytest tests/test_gpu.py; skipped where there is no GPU, and among the other tests. A command takes
seconds to start, so all commands of this file run at once, beside the tests; each test waits for its own.
"""

import math
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, one_line, read_log, start
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ann import ANN
from gcnet import GCNet, SNLNet
from nonlocal_net import NonLocalNet
from resnet_d8 import FCN
from train import training_step

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and pytest tests/test_gpu.py"),
    # What torch's C++ code has to say about the kernels for this GPU is shown, but is no error.
    pytest.mark.filterwarnings("default:(?s).*Triggered internally at:UserWarning"),
]

DEVICE = "cuda"
BACKENDS = "cpu:gloo,cuda:nccl"  # train.py's, on GPUs
CLASSES = 5
DETERMINISTIC = ("gcnet", "fcn")  # for NonLocalNet and ANN torch lacks some of the kernels
EVALUATED = ("gcnet", "nonlocal_net", "ann")
VIEWS = {"whole": (), "aug": ("--aug",), "stride": ("--stride", 32, 32)}  # windows of 48x48 on scenes of 64x64

# --------------------------------------------------------------------------------------------------------------- steps


def trainable(model, dtype=torch.float32):
    """A small model on the GPU as it trains, the same in each call, but without dropout. No weight is zero, as some
    are at first: a gradient of zero would be the same whatever went wrong."""
    torch.manual_seed(0)
    model = model(CLASSES, depth=18).to(dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.eval()
    return model.to(DEVICE, memory_format=torch.channels_last)


def drawn_batch(dtype=torch.float32):
    """Four images and their labels. The last two images have other means and deviations than the first two."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 64, 64, generator=generator, dtype=torch.float64)
    images[2:] = 3 * images[2:] + 1
    labels = torch.randint(0, CLASSES, (4, 64, 64), generator=generator)
    labels[:, :8] = 255
    return images.to(DEVICE, dtype), labels.to(DEVICE)


def step(model, images, labels, amp=None, scaler=None):
    """The losses of a training step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scaler = scaler or torch.amp.GradScaler(DEVICE, enabled=amp == torch.float16)
    return training_step(model, optimizer, scaler, [(images, labels)], 0.01, dtype=amp)


def assert_near(found, expected, tolerance):
    """Dicts of tensors: the norm of no difference is larger than tolerance times that of the expected tensor (or than
    a millionth of the largest norm, for tensors that are zero but for rounding)."""
    assert found.keys() == expected.keys()
    least = 1e-6 * max(value.double().norm().item() for value in expected.values())
    far = {}
    for name, value in expected.items():
        error = (found[name].double() - value.double()).norm().item()
        if not error <= max(tolerance * value.double().norm().item(), least):
            far[name] = error / value.double().norm().item()
    assert not far, f"{len(far)} of {len(expected)} tensors are not within {tolerance}: {far}"


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model", [GCNet, SNLNet, NonLocalNet, ANN, FCN])
def test_steps_in_each_precision(model, amp):
    trained, exact = trainable(model), trainable(model)
    batch = drawn_batch()
    scaler = torch.amp.GradScaler(DEVICE, enabled=amp == torch.float16)
    losses = [step(trained, *batch, amp, scaler) for _ in range(8)]
    assert np.isfinite(losses).all(), losses
    np.testing.assert_allclose(losses[0], step(exact, *batch), rtol=0.03)
    assert not trained.decode_head.conv_seg.weight.equal(trainable(model).decode_head.conv_seg.weight)
    assert all(value.isfinite().all() for value in trained.state_dict().values())
    assert losses[-1][0] < losses[0][0], losses


def test_fp16_skips_a_step_whose_gradient_overflows():
    model = trainable(GCNet)
    before = [parameter.clone() for parameter in model.parameters()]
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**40)
    losses = step(model, *drawn_batch(), torch.float16, scaler)
    assert np.isfinite(losses).all() and scaler.get_scale() == 2.0**39, (losses, scaler.get_scale())
    assert all(old.equal(new) for old, new in zip(before, model.parameters(), strict=True))


# ----------------------------------------------------------------------------------------------------------- processes


def join(backends, rank, world, place):
    options = {"init_method": f"file://{place}/store", "timeout": timedelta(minutes=1)}
    dist.init_process_group(backends, rank=rank, world_size=world, **options)


def synchronised(model, dtype=torch.float32):
    return nn.SyncBatchNorm.convert_sync_batchnorm(trainable(model, dtype))


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def half_of_a_batch(rank, dtype, tolerance, place):
    """One of two processes. gloo carries the GPU's tensors by way of the processor; NCCL would need a GPU for each."""
    join("gloo", rank, 2, place)
    torch.backends.cudnn.allow_tf32 = False
    whole, shared = trainable(GCNet, dtype), synchronised(GCNet, dtype)
    images, labels = drawn_batch(dtype)
    mine = slice(2 * rank, 2 * rank + 2)
    expected = dict(zip(["logits", "aux_logits"], whole(images), strict=True))
    outputs = dict(zip(expected, shared(images[mine]), strict=True))
    assert_near(outputs, {name: value[mine] for name, value in expected.items()}, tolerance)
    losses = step(DistributedDataParallel(shared), images[mine], labels[mine])
    np.testing.assert_allclose(losses, step(whole, images, labels), rtol=tolerance)
    assert_near(dict(shared.named_buffers()), dict(whole.named_buffers()), tolerance)
    assert_near(gradients(shared), gradients(whole), tolerance)
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-2)], ids=["fp64", "fp32"])
def test_two_processes_on_one_gpu_normalise_as_one(dtype, tolerance, tmp_path):
    torch.multiprocessing.spawn(half_of_a_batch, (dtype, tolerance, tmp_path), 2)


def one_process_in_a_group(rank, place):
    from torch.nn.modules._functions import SyncBatchNorm as Synchronised

    from support.processes import sum_over_processes

    batch = drawn_batch()
    alone = trainable(GCNet)
    losses = step(alone, *batch)
    join(BACKENDS, rank, 1, place)
    model = synchronised(GCNet)
    np.testing.assert_allclose(step(DistributedDataParallel(model), *batch), losses, rtol=1e-4)
    assert np.isfinite(losses).all()
    assert not model.backbone.layer1[0].conv1.weight.equal(trainable(GCNet).backbone.layer1[0].conv1.weight)
    assert_near(gradients(model), gradients(alone), 2e-2)
    assert_near(model.state_dict(), alone.state_dict(), 1e-4)
    for device in ("cpu", DEVICE):
        assert sum_over_processes(torch.ones(2, device=device)).tolist() == [1, 1]
    # Alone, SyncBatchNorm does what BatchNorm does. This is how it works with others.
    x, weight, bias = torch.randn(2, 8, 5, 6, device=DEVICE), torch.rand(8, device=DEVICE), torch.rand(8, device=DEVICE)
    statistics = [torch.zeros(8, device=DEVICE), torch.ones(8, device=DEVICE)]
    found = Synchronised.apply(x, weight, bias, *statistics, 1e-5, 0.1, dist.group.WORLD, 1)
    expected = F.batch_norm(x, None, None, weight, bias, True, 0.1, 1e-5)
    assert_near({"normalised": found}, {"normalised": expected}, 1e-4)
    dist.destroy_process_group()


def test_a_group_of_one_process_trains_as_none_does(tmp_path):
    torch.multiprocessing.spawn(one_process_in_a_group, (tmp_path,), 1)


# ------------------------------------------------------------------------------------------------------------ commands

INTERRUPTED = """  # train.py, which a scheduler ends at iteration 6
import os, signal, train
from support.command import run_command

def poly_lr(iteration, *others, poly_lr=train.poly_lr):
    if iteration == 6:
        os.kill(os.getpid(), signal.SIGTERM)
    return poly_lr(iteration, *others)

train.poly_lr = poly_lr
run_command(train.main)
"""
SMALL_GPU = """  # the script that is named first, on a GPU of 1 GiB
import runpy, sys, torch
torch.cuda.set_per_process_memory_fraction(2**30 / torch.cuda.get_device_properties(0).total_memory)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory):
    """The commands, which run from now on, as futures by name. result() is the folder that a command wrote, or raises
    what went wrong."""
    place = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(64) as pool:
        patch.setenv("OMP_NUM_THREADS", "2")  # since there are many of them
        futures = {"compile": pool.submit(train, place / "compile", "--compile", "--iters", 3)}
        futures["memory"] = pool.submit(run_out_of_memory, place / "memory")
        for model in DETERMINISTIC:
            options = ("--model", model, "--deterministic", "--iters", 12)
            futures[model, "once"] = pool.submit(train, place / f"{model}-once", *options)
            futures[model, "again"] = pool.submit(train, place / f"{model}-again", *options)
            futures[model, "resumed"] = pool.submit(stop_and_resume, place / f"{model}-resumed", *options)
        for model in EVALUATED:
            options = ("--model", model, "--crop-size", 48, 48, "--iters", 60)
            trained = pool.submit(train, place / model, *options)
            for view in VIEWS:
                for device in (DEVICE, "cpu"):
                    futures[model, view, device] = pool.submit(save_label_maps, trained, view, device)
        yield futures


def run(*arguments, status=0):
    """A command's CompletedProcess. AssertionError shows its output if it ends with another exit status."""
    process = start(arguments, ROOT)
    try:
        out, err = process.communicate(timeout=110)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    command = " ".join(str(argument) for argument in arguments)
    assert process.returncode == status, f"{command}\nended with {process.returncode}, not {status}:\n{out}\n{err}"
    return subprocess.CompletedProcess(command, status, out, err)


def train(out, *options):
    run("train.py", *options, "--workers", 2, "--out", out)
    return out


def stop_and_resume(out, *options):
    stopped = run("-c", INTERRUPTED, *options, "--workers", 2, "--out", out, status=143)
    assert torch.load(out / "last.pt", map_location="cpu", weights_only=True)["iteration"] == 7, stopped
    return train(out, "--resume")


def run_out_of_memory(out):
    options = ("--batch-size", 16, "--crop-size", 512, 512, "--iters", 3, "--workers", 2, "--out", out)
    return run("-c", SMALL_GPU, ROOT / "train.py", *options, status=2)


def save_label_maps(trained, view, device):
    run_folder = trained.result()
    folder = run_folder / f"{view}-{device}"
    run("evaluate.py", run_folder / "last.pt", *VIEWS[view], "--device", device, "--workers", 2, "--save", folder)
    return folder


@pytest.mark.parametrize("other", ["again", "resumed"])
@pytest.mark.parametrize("model", DETERMINISTIC)
def test_deterministic_runs_end_with_equal_weights(model, other, runs):
    folders = runs[model, "once"].result(), runs[model, other].result()
    one, two = (torch.load(folder / "last.pt", map_location="cpu", weights_only=True)["model"] for folder in folders)
    assert one.keys() == two.keys()
    differences = {name: (one[name] - two[name]).abs().max().item() for name in one if not one[name].equal(two[name])}
    assert not differences, f"{len(differences)} of {len(one)} tensors differ, by up to: {differences}"


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("model", EVALUATED)
def test_evaluation_agrees_with_the_processor(model, view, runs):
    ours, expected = (runs[model, view, device].result() for device in (DEVICE, "cpu"))
    names = sorted(path.relative_to(expected) for path in expected.rglob("*.png"))
    assert len(names) == 50 and names == sorted(path.relative_to(ours) for path in ours.rglob("*.png"))
    equal = [np.asarray(Image.open(ours / name)) == np.asarray(Image.open(expected / name)) for name in names]
    assert np.mean(equal) >= 0.999, f"{np.mean(equal):.4%} of the pixels"


@pytest.mark.skipif(
    not (shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"))
    or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="torch.compile needs a C compiler and Python.h",
)
def test_compile_trains(runs):
    losses = [line["loss"] for line in read_log(runs["compile"].result()) if "loss" in line]
    assert len(losses) == 3 and all(map(math.isfinite, losses)), losses


def test_out_of_memory_is_one_line(runs):
    one_line(runs["memory"].result(), "train.py", ["out of memory", "--batch-size", "--crop-size", "--amp"])
