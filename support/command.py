"""What the commands share: the parser, the process among its like, and mistakes as one line."""

import argparse
import multiprocessing
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from support.layouts import InputError


def start_process():
    """(device, rank, world) of this process, alone or one of torchrun's."""
    cuda = torch.cuda.is_available()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        # torchrun keeps its store over restarts: without the prefix a rank may read where a dead one listened.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), next(rendezvous("env://"))[0])
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
    return device, rank, world


def ignore_signals(worker):
    """For data-loading workers: Ctrl-C and SIGTERM, sent to all, are the main process's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def whole_number(text):
    """A whole number from 0 to 2^31 - 1, for argparse."""
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2147483647")
    return int(text)


class Parser(argparse.ArgumentParser):
    """Shows a module's docstring as it is written; a mistake on the command line is one line like any other."""

    def __init__(self, description=None, **options):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        raise InputError(message)


def end(status):
    """Exits at once, without waiting for what an orderly exit would join: data-loading workers, other processes."""
    sys.stdout.flush()
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(status)


def run(main):
    """Calls main(). What its user can mend is one line on stderr and exit status 2, not a traceback."""
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a letter of a class's name ends no run
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = str(error) or type(error).__name__
        # What a data-loading worker raises arrives with its traceback as text; the message is the end of it.
        if isinstance(error, InputError):
            message = message.rpartition("InputError: ")[2]
        elif isinstance(error, MemoryError) or "out of memory" in message or "can't allocate memory" in message:
            message = "out of memory; to train, lower --batch-size or --crop-size, or try --amp bf16; "
            message += "to evaluate, leave out --aug, or make the images smaller"
        elif "DataLoader worker (pid" in message or isinstance(error, (EOFError, ConnectionError)):
            message = f"a data-loading worker died ({message.splitlines()[0]}); if memory is short, lower --workers"
        elif "shared memory" in message:
            message = "/dev/shm is full; lower --workers, or give the container more (docker run --shm-size=8g)"
        elif dist.is_initialized() and "peer" in message:
            end(1)  # another process has failed: the message is its own
        elif isinstance(error, (FileExistsError, NotADirectoryError)):
            message = f"{error.filename}: a file stands where a folder must be; move it, or name another folder"
        elif isinstance(error, OSError):
            message = message.splitlines()[-1]
        else:
            traceback.print_exc()
            end(1)  # an orderly exit would wait for workers that wait for work
        if os.environ.get("RANK", "0") != "0":  # what all processes meet, the first one says: torchrun ends the others
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(2)
        start = "\n" if dist.is_initialized() else ""  # another process's progress bar may stand on the line
        print(f"{start}{Path(sys.argv[0]).name}: error: {message.strip()}", file=sys.stderr, flush=True)
        end(2)
    if dist.is_initialized():
        dist.destroy_process_group()
