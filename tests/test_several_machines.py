"""Two torchrun agents that share the run's folder, as on two machines with a common disk: they train as one, and
outlive the death of a process or of an agent."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, make_folder, read_log, same_weights, train_arguments

pytestmark = pytest.mark.slow


ONCE_IT_ANSWERS = 'until (exec 3<>/dev/tcp/localhost/$0) 2>/dev/null; do sleep 0.1; done; exec "$@"'  # $0: a port


def launch(place, name, arguments, port, nodes="2", **variables):
    """An agent with the README's variable and options. That of "a" keeps the rendezvous; the other starts after it."""
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=run"]
    rendezvous.append("--rdzv-conf=join_timeout=40,last_call_timeout=5")  # how long agents wait for others
    options = [f"--nnodes={nodes}", "--nproc_per_node=1", "--max-restarts=3", *rendezvous]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} | variables
    output = open(place / f"{name}.txt", "a")  # noqa: SIM115
    command = [] if name == "a" else ["bash", "-c", ONCE_IT_ANSWERS, port]
    command += [sys.executable, "-m", "torch.distributed.run", *options, ROOT / arguments[0], *arguments[1:]]
    return subprocess.Popen(list(map(str, command)), cwd=place, env=environment, stdout=output, stderr=output)


def launch_two(place, arguments, order="ab", **options):
    """Both agents, as [a, b]. The one started first is rank 0: torchrun sorts by address and process number."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    agents = {name: launch(place, name, arguments, port, **options) for name in order}
    return [agents["a"], agents["b"]]


def workers_of(agent):
    found = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found]


def wait_for_steps(run, agents, seconds=120):
    deadline = time.monotonic() + seconds
    while max((line["iteration"] for line in read_log(run)) if (run / "log.jsonl").exists() else [-1], default=-1) <= 8:
        assert time.monotonic() < deadline, "waited too long"
        assert all(agent.poll() is None for agent in agents), [agent.poll() for agent in agents]
        time.sleep(0.05)


def finish(agents, place, seconds=240):
    try:
        return [agent.wait(timeout=seconds) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
        for name in ("a", "b"):
            print((place / f"{name}.txt").read_text()[-3000:])


@pytest.fixture
def two(folder, tmp_path):
    """Starts the same training on both machines; gives the agents."""

    def begin(**options):
        return launch_two(tmp_path, [*train_arguments(folder, "run", 30), "--resume"], **options)

    yield begin
    left = subprocess.run(["pgrep", "-af", str(tmp_path)], capture_output=True, text=True).stdout
    subprocess.run(["pkill", "-9", "-f", str(tmp_path)])
    assert not left, left


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """last.pt of the run that nothing disturbs."""
    place = tmp_path_factory.mktemp("whole")
    agents = launch_two(place, train_arguments(make_folder(place), "run", 30))
    assert finish(agents, place) == [0, 0]
    for name in ("a", "b"):
        (place / f"{name}.txt").write_text("")
    assert finish(launch_two(place, ["evaluate.py", "run/best.pt"]), place) == [0, 0]
    assert sum("mIoU" in (place / f"{name}.txt").read_text() for name in "ab") == 1
    return place / "run/last.pt"


@pytest.mark.parametrize("number", [0, 1], ids=["of rank 0", "of the other"])
def test_a_worker_is_killed(number, two, whole, tmp_path):
    agents = two()
    wait_for_steps(tmp_path / "run", agents)
    os.kill(workers_of(agents[number])[0], signal.SIGKILL)
    assert finish(agents, tmp_path) == [0, 0]
    assert same_weights(whole, tmp_path / "run/last.pt")


def test_the_machine_of_rank_0_is_lost(two, tmp_path):
    """Its agent and its worker are killed. The other one continues alone, with two batches per step."""
    agents = two(nodes="1:2", order="ba")
    wait_for_steps(tmp_path / "run", agents)
    for pid in (agents[1].pid, *workers_of(agents[1])):
        os.kill(pid, signal.SIGKILL)
    assert finish(agents, tmp_path)[0] == 0
    assert max(line["iteration"] for line in read_log(tmp_path / "run")) == 30
    assert "4 images per step: 1 (processes) x 2 (--batch-size) x 2 (--accumulate)" in (tmp_path / "a.txt").read_text()


def test_stopped_and_continued(two, whole, tmp_path):
    agents = two()
    wait_for_steps(tmp_path / "run", agents)
    agents[1].send_signal(signal.SIGTERM)
    assert 0 not in finish(agents, tmp_path)
    assert finish(two(), tmp_path) == [0, 0]
    assert same_weights(whole, tmp_path / "run/last.pt")
