"""Several processes as one: how they are started, who decides, and that no worker or rank is waited for in vain."""

import datetime
import os
import signal
import subprocess
import time

import pytest
import torch
from conftest import ROOT, read_log, run_together, start, train_arguments

import train
from support import processes, settings
from support.command import InputError
from support.settings import Settings, complete, defaults


@pytest.mark.parametrize(
    "given",
    [
        {"RANK": "1"},
        {"WORLD_SIZE": "2"},
        {"RANK": "", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "abc", "LOCAL_RANK": "0"},
        {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    ],
    ids=str,
)
def test_an_environment_that_is_not_torchruns(given, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="start it with torchrun"):
        processes.start_process()


def test_no_launcher_or_one_process(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert processes.launched() == (0, 1, 0)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert processes.launched() == (0, 1, 1)


def test_resume_starts_a_run_and_continues_it(folder, tmp_path, run_inside):
    arguments = [*train_arguments(folder, "run", 2, workers=0)[1:], "--resume"]
    assert "from iteration 0 to 2" in run_inside(train, *arguments)
    assert "from iteration 2 to 2" in run_inside(train, *arguments)
    assert "the run in run has 2" in run_inside(train, *arguments, "--iters", 3, fails=True)
    assert max(line["iteration"] for line in read_log(tmp_path / "run")) == 2


def test_a_restart_continues_only_what_its_launch_began(folder, tmp_path, run_inside, monkeypatch):
    """torchrun --max-restarts: its store tells whether this launch has a run."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(processes, "launch_store", lambda: store)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    arguments = train_arguments(folder, "run", 2, workers=0)[1:]
    for _ in range(2):
        assert "already holds a run" in run_inside(train, *arguments, fails=True)
    (tmp_path / "run/config.json").unlink()
    assert "from iteration 0 to 2" in run_inside(train, *arguments)
    assert "from iteration 2 to 2" in run_inside(train, *arguments)


@pytest.mark.parametrize("world, accumulate", [(1, 4), (2, 2), (4, 1), (3, None), (8, None)])
def test_the_images_per_step_stay_with_another_number_of_processes(world, accumulate, folder, monkeypatch):
    given = {"dataset": "folder", "depth": 18, "batch_size": 2}
    config = Settings(**defaults(given) | given)
    config.effective_batch = 8
    monkeypatch.setattr(settings, "rank_and_world", lambda: (0, world))
    data = train.open_data("folder", folder, "train")
    if accumulate is None:
        with pytest.raises(InputError, match=f"has 8 images per step, no multiple of these {2 * world}"):
            complete(config, "run", data, data)
    else:
        complete(config, "run", data, data)
        assert (config.accumulate, config.effective_batch) == (accumulate, 8)


class Stuck(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, i):
        time.sleep(60)


@pytest.mark.slow
def test_a_worker_that_gives_nothing_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(processes, "WORKER_WAIT", datetime.timedelta(seconds=3))
    loader = torch.utils.data.DataLoader(Stuck(), **processes.loading(1))
    with pytest.raises(InputError, match="waited 0.05 minutes for a data-loading worker"):
        list(processes.patient(loader))
    for worker in loader._iterator._workers:
        worker.kill()


TOGETHER = """
import sys
from support import processes
from support.command import InputError, run_command
def main():
    processes.start_process()
    rank, world = processes.rank_and_world()
    assert processes.gather(rank) == [0, 1]
    assert processes.share(lambda: rank, leader=1) == 1
    def mistake():
        raise InputError(f"of {rank}")
    try:
        processes.share(mistake, leader=1)
    except InputError as error:
        assert str(error) == "of 1"
    processes.check_same("this", 3)
    try:
        processes.check_same("that", rank)
    except InputError as error:
        assert str(error).startswith("that: not the same for process 1")
    print("equal", flush=True)
run_command(main)
"""


def test_what_processes_share(tmp_path):
    (tmp_path / "script.py").write_text(TOGETHER)
    out, err, status = run_together([tmp_path / "script.py"], tmp_path)
    assert status == 0 and out.count("equal") == 2, err


@pytest.mark.slow
def test_a_rank_that_never_comes_is_not_waited_for(tmp_path):
    code = "from datetime import timedelta; from support import processes, command; import os, time\n"
    code += "processes.WAIT = timedelta(seconds=5)\n"
    code += "if os.environ['RANK'] == '1': time.sleep(600)\n"
    code += "command.run_command(processes.start_process)"
    (tmp_path / "script.py").write_text(code)
    out, err, status = run_together([tmp_path / "script.py"], tmp_path)
    assert status == 1 and "script.py: error: waited" in err


@pytest.mark.slow
def test_kills_and_restarts_under_load(folder, tmp_path):
    """Ranks that are killed again and again while both cores are busy: no hang, and nothing is left over."""
    load = [subprocess.Popen(["python3", "-c", "while True: pass"]) for _ in range(2)]
    try:
        options = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=3"]
        process = start([*options, ROOT / "train.py", *train_arguments(folder, "run", 30)[1:]], tmp_path)
        log = tmp_path / "run/log.jsonl"
        for kill in range(2):
            deadline = time.monotonic() + 120
            began = log.stat().st_size if log.exists() else 0
            while not log.exists() or log.stat().st_size == began:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            os.kill(int(found[kill % 2]), signal.SIGKILL)
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, out + err
    finally:
        for each in load:
            each.kill()
