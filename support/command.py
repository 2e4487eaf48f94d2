"""What every command needs: the parser, a mistake as one line, Ctrl-C and SIGTERM."""

import argparse
import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch.distributed as dist

# Of tqdm. In a log file, instead of a terminal, a bar is written every 10 seconds.
BAR = {"dynamic_ncols": True, "mininterval": 0.1 if sys.stderr.isatty() else 10}


class InputError(Exception):
    """A mistake of the user, not of the program: `run_command` prints the message alone and exits with status 2."""


class Parser(argparse.ArgumentParser):
    """Shows a module's docstring unchanged. Raises InputError for a mistake on the command line."""

    def __init__(self, description=None, **options):
        spec = sys.modules["__main__"].__spec__  # of a module that was run with -m
        prog = f"python -m {spec.name}" if spec else None
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=formatter, allow_abbrev=False, **options)

    def error(self, message):
        raise InputError(message)

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        for before, word in zip(["an argument", *words], words, strict=False):
            if not word or word.startswith("--") and word.endswith("="):  # such as "$DATA" where DATA is not set
                raise InputError(f"{word or before}: is empty; a variable that is not set?")
        return super().parse_known_args(args, namespace)

    def add_device(self):
        text = "default: cuda if there is one, else cpu; mps and xpu are untried"
        self.add_argument("--device", choices=("cuda", "cpu", "mps", "xpu"), help=text)

    def add_stride(self):
        text = "run the model on windows of the training crop's size, this far apart; needs less memory"
        self.add_argument("--stride", type=positive, nargs=2, metavar=("H", "W"), help=text)

    def add_overwrite(self):
        self.add_argument("--overwrite", action="store_true", help="overwrite existing output files")


def whole_number(text):
    """A whole number from 0 to 2^31 - 1, for argparse."""
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2147483647")
    return int(text)


def positive(text):
    """A whole number from 1, for argparse."""
    if whole_number(text) == 0:
        raise argparse.ArgumentTypeError("0 is not a whole number from 1")
    return int(text)


def collect_signals():
    """A list to which SIGINT, SIGTERM and SIGHUP are added from now on, instead of ending the process; a second Ctrl-C
    ends it, a second SIGTERM does not: a scheduler and torchrun may send one each. SIGHUP stays ignored under nohup."""
    received = []

    def add(number, frame):
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
            signal.signal(number, add)
    return received


def run_command(main):
    """Calls main(). A mistake that the user can correct is one line on stderr and exit status 2, not a traceback."""
    sys.stdout.reconfigure(errors="replace")  # a class's name may hold letters that the terminal lacks
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        exit_at_once(130)
    except SystemExit as error:  # after --help, or a signal
        exit_at_once(error.code or 0)
    except Exception as error:
        end_with(error)
    if dist.is_initialized():
        dist.destroy_process_group()
    exit_at_once(0)


def end_with(error):
    """Ends the process: with one line and status 2 if the user can do something, else with a traceback and 1."""
    message = explain(error)
    if message is None:
        # If a connection to another process has ended, that one has failed, and says why.
        if not (dist.is_initialized() and re.search("(closed|reset) by peer", str(error))):
            traceback.print_exception(error)
        exit_at_once(1)
    # If all processes meet the mistake, rank 0 reports it, and torchrun ends the others while they wait here.
    if os.environ.get("RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    start = "\n" if dist.is_initialized() else ""  # another process's progress bar may be on this line
    line = message.strip().replace("\n", "\\n")  # a file's name may hold one
    with contextlib.suppress(OSError):
        print(f"{start}{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr, flush=True)
    exit_at_once(2)


def explain(error):
    """What went wrong and what to do about it, in one line; None if the error is the program's own."""
    message = str(error) or type(error).__name__
    if isinstance(error, InputError):
        # From a data-loading worker it arrives behind a traceback.
        return message.partition(f"\n{InputError.__module__}.InputError: ")[2] or message
    no_memory = "out of memory|can't allocate memory|ALLOC_FAILED|unable to find an engine"  # the last is cuDNN's
    if isinstance(error, MemoryError) or re.search(no_memory, message):
        to_train = "to train, lower --batch-size or --crop-size, or try --amp bf16"
        return f"out of memory; {to_train}; to evaluate, leave out --aug, or give --stride"
    if isinstance(error, FloatingPointError):
        return f"{message}: the training has diverged, the checkpoint is damaged, or --amp fp16 overflows"
    if isinstance(error, BrokenPipeError):
        return "the output was closed"
    if isinstance(error, RuntimeError) and re.search("(timed out|timeout) (waiting|after)", message, re.I):
        return f"waited too long for another process ({message.splitlines()[0]})"
    if "DataLoader worker (pid" in message or isinstance(error, (EOFError, ConnectionError)):
        return f"a data-loading worker died ({message.splitlines()[0]}); if memory is short, lower --workers"
    if "shared memory" in message:
        return "/dev/shm is full; lower --workers, or give the container more (docker run --shm-size=8g)"
    if isinstance(error, OSError):
        return message.splitlines()[-1]
    return None


def exit_at_once(status):
    """Ends the process and its data-loading workers. An orderly exit could wait for ever: they ignore its SIGTERM."""
    for worker in multiprocessing.active_children():
        worker.kill()
    shutil.rmtree(multiprocessing.current_process()._config.get("tempdir") or "", ignore_errors=True)  # its sockets
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status)
