"""Several processes as one: how they are started, who decides, and that no rank is waited for in vain."""

import os
import signal
import subprocess
import time

import pytest
import torch
from conftest import ROOT, read_log, run_together, start, train_arguments

import train
from support import processes, run
from support.checkpoint import State, write_checkpoint
from support.command import InputError
from support.settings import Settings, defaults


def test_restarts_on_several_machines_need_a_variable(monkeypatch):
    """Else a restart meets what the dead processes left in the store, and hangs or fails."""
    for name, value in {"GROUP_WORLD_SIZE": "2", "WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        processes.start_process("cpu")


def test_resume_starts_a_run_and_continues_it(folder, tmp_path, run_inside):
    arguments = [*train_arguments(folder, "run", 2, workers=0)[1:], "--resume"]
    assert "from iteration 0 to 2" in run_inside(train, *arguments)
    assert "from iteration 2 to 2" in run_inside(train, *arguments)
    assert "the run in run has 2" in run_inside(train, *arguments, "--iters", 3, fails=True)
    assert max(line["iteration"] for line in read_log(tmp_path / "run")) == 2


@pytest.mark.parametrize("world, accumulate", [(1, 4), (2, 2), (4, 1), (3, None), (8, None)])
def test_the_images_per_step_stay_with_another_number_of_processes(world, accumulate, tmp_path, monkeypatch, capsys):
    """Of a run that was begun by 4 processes with 2 images each."""
    settings = Settings(**defaults({}) | {"batch_size": 2, "effective_batch": 8})
    model = torch.nn.Linear(1, 1)
    state = State(model, torch.optim.SGD(model.parameters()), torch.amp.GradScaler("cpu", enabled=False))
    write_checkpoint(state, settings, tmp_path / "last.pt")
    monkeypatch.setattr(run, "rank_and_world", lambda: (0, world))
    if accumulate is None:
        with pytest.raises(InputError, match=f"has 8 images per step, no multiple of {2 * world}"):
            run.open_run(tmp_path, {}, resume=True)
    else:
        settings, _ = run.open_run(tmp_path, {"accumulate": 3}, resume=True)
        assert (settings.accumulate, settings.effective_batch) == (accumulate, 8)
        note = f"note: --accumulate {accumulate}, since the run in {tmp_path} has 8 images per step"
        assert capsys.readouterr().out.strip() == note


TOGETHER = """
import sys
from support import processes
from support.command import InputError, run_command
def main():
    processes.start_process()
    rank, world = processes.rank_and_world()
    assert processes.from_rank_0(lambda: rank) == 0
    def mistake():
        raise InputError(f"of {rank}")
    try:
        processes.from_rank_0(mistake)
    except InputError as error:
        assert str(error) == "of 0"
    print("equal", flush=True)
run_command(main)
"""


def test_what_process_0_makes_is_received_by_all(tmp_path):
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
        arguments = [*train_arguments(folder, "run", 30)[1:], "--resume"]
        process = start([*options, ROOT / "train.py", *arguments], tmp_path)
        log = tmp_path / "run/log.jsonl"
        for kill in range(2):
            deadline = time.monotonic() + 120
            began = log.stat().st_size if log.exists() else 0
            while not log.exists() or log.stat().st_size == began:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            os.kill(int(found[kill % 2]), signal.SIGKILL)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
    finally:
        for each in load:
            each.kill()
