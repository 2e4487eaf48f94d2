"""Several processes that work as one: how they meet and exchange values; and the workers that load their data.

torchrun starts them, on one machine or on several, which need no common disk.
"""

import hashlib
import json
import multiprocessing
import os
import secrets
import signal
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from support.command import InputError

WAIT = timedelta(minutes=20)  # for another process, which is then taken for lost
CONNECT = timedelta(minutes=1)  # for torchrun's store, which is there before this process, or its machine is lost
WORKER_WAIT = timedelta(minutes=10)  # for a data-loading worker: less, so that its own process is the one to say so
BEGUN = "begun"  # a key in torchrun's store, set once this launch has started a run; it survives restarts


# ---------------------------------------------------------------------------------------------------------- to meet


def start_process(device_name=None):
    """Sets torch up, and joins the processes that torchrun has started into one group. Returns this one's device: of
    the kind that --device names, by default CUDA where there is one. Raises InputError if there is no such device, if
    the environment is not torchrun's, or if the others do not come."""
    torch.set_flush_denormal(True)  # fresh weights drive activations to denormals, on which a CPU is slow
    rank, world, local_rank = launched()
    name = device_name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and not getattr(torch, name).is_available():
        raise InputError(f"--device {name}: torch finds none here")
    cuda = name == "cuda"
    device = torch.device(name, local_rank) if cuda else torch.device(name)
    if cuda and local_rank >= torch.cuda.device_count():
        raise InputError(f"there are {torch.cuda.device_count()} GPUs for more processes; lower --nproc_per_node")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        # Tensors on the CPU go through gloo on a machine with GPUs, too.
        backends = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backends, store=meet(rank, world), rank=rank, world_size=world, timeout=WAIT)
        check_same("the kind of device", device.type)
    return device


def launched():
    """(rank, number of processes, rank on this machine) as the launcher has set them, (0, 1, 0) if there is none."""
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        return 0, 1, 0
    try:
        rank, world, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except (KeyError, ValueError):
        rank, world, local_rank = -1, 0, 0
    if not 0 <= rank < world or world > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise InputError("RANK, WORLD_SIZE and LOCAL_RANK are not set as torchrun sets them; start it with torchrun")
    return rank, world, local_rank


def launch_store():
    """torchrun's own store, which lives as long as torchrun does; None if this process has none."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, is_master=False, timeout=CONNECT)
    store.set_timeout(WAIT)
    return store


def meet(rank, world):
    """The store of the processes that were started together.

    torchrun keeps its store over restarts, so what dead processes wrote is still in it; and its agents, one on each
    machine, count restarts each for itself. So the processes agree on a prefix: each one shows a token of its own, and
    rank 0 answers to each token with the prefix until all have arrived.
    """
    store = launch_store()
    if store is None:
        return next(rendezvous("env://", timeout=WAIT))[0]
    token = secrets.token_hex(8)
    if rank > 0:
        store.set(f"here/{rank}", token)
        prefix = store.get(f"answer/{token}").decode()  # waits for it
        store.add(f"{prefix}/arrived", 1)
        return dist.PrefixStore(prefix, store)
    deadline = time.monotonic() + WAIT.total_seconds()
    while store.add(f"{token}/arrived", 0) < world - 1:
        if time.monotonic() > deadline:
            raise InputError(f"waited {describe(WAIT)} for the other processes, of {world} in all, to start")
        for other in range(1, world):
            if store.check([f"here/{other}"]):
                store.set(f"answer/{store.get(f'here/{other}').decode()}", token)
        time.sleep(0.05)
    return dist.PrefixStore(token, store)


def describe(wait):
    return f"{wait.total_seconds() / 60:g} minutes"


def mark_begun():
    """Notes that this launch has begun a run, which processes that torchrun restarts then continue."""
    store = launch_store()
    if store:
        store.set(BEGUN, "yes")


def has_begun():
    """Whether an earlier start of this launch began a run."""
    store = launch_store()
    return store is not None and store.check([BEGUN])


def be_deterministic():
    """Asks torch for deterministic kernels; where there is none, it warns."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)


# --------------------------------------------------------------------------------------------------- to work as one


def rank_and_world():
    """This process's number among those that work together, from 0, and how many they are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_processes(tensor):
    """Sums a tensor over all processes, in place, and returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(value):
    """The list of what each process calls this with."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def share(make, leader=0):
    """make() of the process `leader`, in all processes. If it raises InputError or OSError there, all raise it."""
    if not dist.is_initialized():
        return make()
    sent = [None, None]
    if dist.get_rank() == leader:
        try:
            sent[0] = make()
        except (InputError, OSError) as error:
            sent[1] = error
    dist.broadcast_object_list(sent, leader)
    if sent[1]:
        raise sent[1]
    return sent[0]


def check_same(what, value):
    """Raises InputError if a value, of what json takes, is not the same in all processes."""
    hashes = gather(hashlib.sha256(json.dumps(value).encode()).hexdigest())
    for rank, other in enumerate(hashes):
        if other != hashes[0]:
            raise InputError(f"{what}: not the same for process {rank} as for process 0")


# ------------------------------------------------------------------------------------------------ data-loading workers


def loading(workers):
    """DataLoader arguments for this many workers, which live as long as the loader.

    They are forked from a server process, not from this one: a fork of a process with threads may wait for ever for a
    lock that a thread held. Where there is no such server (Windows), each one is a new process.
    """
    if workers == 0:
        return {}
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    if method == "forkserver":
        start_server()
    arguments = {"num_workers": workers, "multiprocessing_context": method, "worker_init_fn": follow_parent}
    return arguments | {"persistent_workers": True}


def start_server():
    """Starts the server from which workers are forked. Signals that are sent to a whole group of processes do not end
    it, nor the workers: the main process decides what follows."""
    from multiprocessing import forkserver, resource_tracker  # which Windows lacks

    quiet = "ignore::UserWarning:multiprocessing.resource_tracker"  # after a kill it cleans up, and would warn
    if quiet not in sys.warnoptions:
        sys.warnoptions.append(quiet)
    forkserver.set_forkserver_preload(["torch"])  # once, not in each worker
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    resource_tracker.ensure_running()  # which unblocks SIGTERM
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def patient(loader):
    """Yields what a DataLoader gives. Raises InputError if it gives nothing for WORKER_WAIT. (DataLoader's own timeout
    would delay the report of a dead worker by as much.)"""
    iterator = None
    while True:
        if hasattr(signal, "setitimer"):  # not on Windows
            signal.signal(signal.SIGALRM, give_up)
            signal.setitimer(signal.ITIMER_REAL, WORKER_WAIT.total_seconds())
        try:
            iterator = iter(loader) if iterator is None else iterator
            item = next(iterator)
        except StopIteration:
            return
        finally:
            if hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_REAL, 0)
        yield item


def give_up(number, frame):
    raise InputError(f"waited {describe(WORKER_WAIT)} for a data-loading worker; does the disk of the data answer?")


def follow_parent(worker):
    """Has a data-loading worker ignore Ctrl-C, and end when the main process does, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
