"""Two torchrun agents without a common disk, as on two machines: they train as one, and outlive each other's deaths."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, make_folder, read_log, same_weights, train_arguments

pytestmark = pytest.mark.slow


ONCE_THERE = 'until (exec 3<>/dev/tcp/localhost/$0) 2>/dev/null; do sleep 0.1; done; exec "$@"'  # $0: a port


def launch(place, name, arguments, port, nodes="2", restarts=3, **variables):
    """An agent that works in the folder `name`, with its own cache of downloads. That of "a" keeps the rendezvous; the
    other one starts once it answers."""
    (place / name).mkdir(exist_ok=True)
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=run"]
    rendezvous.append("--rdzv-conf=join_timeout=40,last_call_timeout=5")  # how long agents wait for others
    options = [f"--nnodes={nodes}", "--nproc_per_node=1", f"--max-restarts={restarts}", *rendezvous]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TORCH_HOME": str(place / name / "home")}
    environment |= {"OMP_NUM_THREADS": "1"} | variables
    output = open(place / name / "output.txt", "a")  # noqa: SIM115
    command = [] if name == "a" else ["bash", "-c", ONCE_THERE, port]
    command += [sys.executable, "-m", "torch.distributed.run", *options, ROOT / arguments[0], *arguments[1:]]
    return subprocess.Popen(list(map(str, command)), cwd=place / name, env=environment, stdout=output, stderr=output)


def launch_two(place, arguments, order="ab", **options):
    """Both agents, as [a, b]. The one started first is rank 0, since torchrun sorts by address and process number, and
    keeps the run's folder if there is none yet."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    agents = {name: launch(place, name, arguments, port, **options) for name in order}
    return [agents["a"], agents["b"]]


def workers_of(agent):
    found = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found]


def wait_for(condition, agents, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        assert all(agent.poll() is None for agent in agents), [agent.poll() for agent in agents]
        time.sleep(0.05)


def iteration(run):
    lines = read_log(run) if (run / "log.jsonl").exists() else []
    return max((line["iteration"] for line in lines), default=-1)


def finish(agents, place, seconds=240):
    try:
        return [agent.wait(timeout=seconds) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
        for name in ("a", "b"):
            print((place / name / "output.txt").read_text()[-3000:])


@pytest.fixture
def two(folder, tmp_path):
    """Starts the same training on both machines; gives the agents."""

    def begin(*extra, **options):
        return launch_two(tmp_path, [*train_arguments(folder, "run", 30), *extra], **options)

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
    (run,) = place.glob("?/run")  # one of them writes
    for name in ("a", "b"):
        (place / name / "output.txt").write_text("")
    assert finish(launch_two(place, ["evaluate.py", "run/best.pt"]), place) == [0, 0]
    assert sum("mIoU" in (place / name / "output.txt").read_text() for name in "ab") == 1
    return run / "last.pt"


def progress(place):
    return max((iteration(run) for run in place.glob("?/run")), default=-1)


def last(place):
    (run,) = place.glob("?/run")
    return run / "last.pt"


def test_a_worker_is_killed(two, whole, tmp_path):
    agents = two()
    wait_for(lambda: progress(tmp_path) > 8, agents)
    os.kill(workers_of(agents[1])[0], signal.SIGKILL)
    assert finish(agents, tmp_path) == [0, 0]
    assert same_weights(whole, last(tmp_path))


def test_the_machine_of_rank_0_is_lost(two, tmp_path):
    """Its agent and its worker are killed, and with them the state is gone. With the README's variable the other one
    begins anew, alone."""
    agents = two("--resume", nodes="1:2", order="ba", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    wait_for(lambda: progress(tmp_path) > 8, agents)
    assert not (tmp_path / "a/run").exists()
    for pid in (agents[1].pid, *workers_of(agents[1])):
        os.kill(pid, signal.SIGKILL)
    assert finish(agents, tmp_path)[0] == 0
    assert iteration(tmp_path / "a/run") == 30
    assert "1 x 2 x 1 = 2 images per step" in (tmp_path / "a/output.txt").read_text()


def test_stopped_and_continued_with_the_state_on_the_other_machine(two, whole, tmp_path):
    agents = two()
    wait_for(lambda: progress(tmp_path) > 8, agents)
    agents[1].send_signal(signal.SIGTERM)
    assert 0 not in finish(agents, tmp_path)
    state = last(tmp_path)
    here, there = state.parent, tmp_path / ("b/run" if state.parent.parent.name == "a" else "a/run")
    here.rename(there)
    assert finish(two("--resume"), tmp_path) == [0, 0]
    assert not here.exists() and same_weights(whole, last(tmp_path))
