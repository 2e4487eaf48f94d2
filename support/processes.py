"""Several processes that work as one: rank 0 decides and writes, the others receive. And the workers that load data."""

import multiprocessing
import os
import signal
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from support.command import InputError

WAIT = timedelta(minutes=20)  # for another process; after that it is treated as dead


def start_process(device_name=None):
    """Sets torch up, and joins the processes that torchrun has started into one group. Returns this process's device:
    that of --device, by default CUDA where there is one. Raises InputError if there is none."""
    torch.set_flush_denormal(True)  # fresh weights drive activations to denormals, on which a CPU is slow
    name = device_name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and not getattr(torch, name).is_available():
        raise InputError(f"--device {name}: torch finds none here")
    device = torch.device(name)
    if name == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise InputError(f"{torch.cuda.device_count()} GPUs are too few here; lower --nproc_per_node")
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        store, rank, world = join_rendezvous()
        # Tensors on the CPU go through gloo on a machine with GPUs, too.
        backends = "cpu:gloo,cuda:nccl" if name == "cuda" else "gloo"
        dist.init_process_group(backends, store=store, rank=rank, world_size=world, timeout=WAIT)
    return device


def join_rendezvous():
    """(store, rank, number of processes): torch's own rendezvous of the processes that torchrun has started.

    One agent (a torchrun on one machine) keeps the store over restarts, and what dead processes wrote is still in it;
    so each restart gets a prefix of its own. Several agents, which count restarts each for itself, make a new store for
    each, but only if a variable says so. Raises InputError if it does not.
    """
    several = int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if several and restarts and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        raise InputError("--max-restarts on several machines needs: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    store, rank, world = next(rendezvous("env://", timeout=WAIT))
    if not several:
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    return store, rank, world


def rank_and_world():
    """This process's number among those that work together, from 0, and how many they are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_processes(tensor):
    """Sums a tensor over all processes, in place, and returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def from_rank_0(make, *arguments):
    """make(*arguments), called in rank 0 alone; all processes receive the result. If it raises InputError or OSError
    there, all raise it."""
    if not dist.is_initialized():
        return make(*arguments)
    sent = [None, None]
    if dist.get_rank() == 0:
        try:
            sent[0] = make(*arguments)
        except (InputError, OSError) as error:
            sent[1] = error
    dist.broadcast_object_list(sent)
    if sent[1]:
        raise sent[1]
    return sent[0]


def worker_options(workers):
    """DataLoader arguments for this many workers, which live as long as the loader. They are forked from a server
    process, not from this one: a fork of a process with threads may block forever on a lock that a thread held."""
    if workers == 0:
        return {}
    options = {"num_workers": workers, "persistent_workers": True, "worker_init_fn": follow_parent}
    if os.name == "nt":  # Windows has no fork
        return options | {"multiprocessing_context": "spawn"}
    start_server()
    return options | {"multiprocessing_context": "forkserver"}


def start_server():
    """Starts the server from which workers are forked. It and they ignore SIGTERM and SIGHUP that are sent to a whole
    group of processes: the main process decides what follows."""
    from multiprocessing import forkserver, resource_tracker  # which Windows lacks

    sys.warnoptions.append("ignore::UserWarning:multiprocessing.resource_tracker")  # of what a killed process leaves
    forkserver.set_forkserver_preload(["torch"])  # once, not in each worker
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    resource_tracker.ensure_running()  # which unblocks SIGTERM
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_parent(worker):
    """Makes a data-loading worker ignore Ctrl-C, and end when the main process does, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
