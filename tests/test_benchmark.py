"""tools/benchmark.py: every task runs, and what it reports is what it measured."""

import json

import pytest
import torch

from tools import benchmark

SMALL = ["--depth", "18", "--size", "40", "56", "--classes", "5", "--warmup", "0", "--repeat", "1", "--json"]


@pytest.fixture
def bench(run_inside):
    return lambda *arguments: run_inside(benchmark, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["infer", "--model", "ann", "--batch", "2", "--amp", "bf16"],
        ["infer", "--model", "nonlocal_net", "--slide", "32", "32", "16", "16", "--align-corners"],
        ["train", "--model", "gcnet", "--batch", "2", "--amp", "bf16"],
        ["aug", "--model", "fcn"],
    ],
    ids=" ".join,
)
def test_a_task_reports_its_rate(arguments, bench, monkeypatch):
    monkeypatch.setattr("evaluate.RATIOS", (0.5,))
    result = json.loads(bench(*arguments, *SMALL))
    images = int(arguments[arguments.index("--batch") + 1]) if "--batch" in arguments else 1
    assert result["images_per_second"] == pytest.approx(images / result["seconds"])
    assert (result["task"], result["model"]) == (arguments[0], arguments[2]) and result["peak_memory_gb"] > 0.1


def test_images_are_inferred_one_after_another(bench, monkeypatch):
    shapes = []
    monkeypatch.setattr(benchmark, "predict", lambda model, image, *others: shapes.append(tuple(image.shape)))
    bench("infer", "--batch", "3", *SMALL)
    assert shapes == [(40, 56, 3)] * 3


@pytest.mark.parametrize("cache", [[], ["--cache"]], ids=["files", "cache"])
def test_data_makes_samples(cache, bench):
    threads = torch.get_num_threads()
    result = json.loads(bench("data", *cache, *SMALL))
    torch.set_num_threads(threads)
    assert result["images_per_second"] == pytest.approx(4 / result["seconds"])


@pytest.mark.slow
def test_table(bench, monkeypatch):
    known = {"fps": 23.38, "memory_gb": 8.5}
    names = ("gcnet_r50-d8_512x512_80k_ade20k", "gcnet_r50-d8_512x512_160k_ade20k")
    monkeypatch.setattr(benchmark.zoo, "published", lambda: dict.fromkeys(names, known))
    monkeypatch.setitem(benchmark.TEST_SIZES, "ade20k", (64, 64))
    lines = bench("table", "--warmup", "0", "--repeat", "1").splitlines()
    (row,) = (line for line in lines if "R-50" in line)  # the longer schedule is the same model
    name, setting, fps, published_fps, memory, _, published_memory = row.strip("| ").split(" | ")
    assert (name, setting, published_fps, published_memory) == ("gcnet R-50", "ade20k", "23.38", "8.5")
    assert float(fps) > 0 and float(memory) > 0.2
