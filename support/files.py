"""Writing files so that nothing is lost or left half written, the rules for outputs, and downloads."""

import contextlib
import os
import secrets
import socket
import tempfile
import urllib.request
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from support.command import BAR, InputError


def write_file(path, write, sync=True):
    """Calls write(file) on a new file, which then replaces `path`: at any moment there is a whole file or none, with
    `sync` even if the machine goes down. Raises InputError if it cannot be written; what was there before stays."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")  # several processes may write one path
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        while error.__context__:  # torch.save raises its own error while it handles the disk's
            error = error.__context__
        with contextlib.suppress(OSError):
            partial.unlink()
        kept = "; the file that was there is whole" if path.exists() else ""
        raise InputError(f"{path}: cannot be written to ({error}){kept}") from None


def refuse_existing(paths, overwrite):
    """Raises InputError for the first of the paths that exists, unless `overwrite`; and always for a folder."""
    for path in paths:
        if path.is_dir():
            raise InputError(f"{path}: is a folder; name a file")
        if path.exists() and not overwrite:
            raise InputError(f"{path}: already exists; --overwrite replaces it")


def is_inside(path, folder):
    """Whether a path is `folder` or lies below it, with links followed."""
    return Path(path).resolve().is_relative_to(Path(folder).resolve())


def refuse_output_folder(folder, inputs):
    """Raises InputError if `folder` is, or holds, the folder in which one of the files `inputs` (paths) lies."""
    for parent in sorted({path.parent for path in inputs}):
        if is_inside(parent, folder):
            raise InputError(f"{folder}: is, or holds, {parent}, where images or labels are; name another folder")


def download(url, path):
    """Fetches the file of a URL, with a progress bar. Raises InputError, and leaves nothing at `path`, if it cannot be
    fetched or comes incomplete."""
    socket.setdefaulttimeout(30)  # seconds without an answer
    bar = tqdm(desc=path.name, unit="B", unit_scale=True, **BAR)

    def show(blocks, size, total):  # total is -1 if the server does not say it
        bar.total = total if total > 0 else None
        bar.update(blocks * size - bar.n)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with bar, tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
            partial, _ = urllib.request.urlretrieve(url, Path(folder, path.name), show)
            os.replace(partial, path)
    except (OSError, HTTPException, ValueError) as error:
        raise InputError(f"{url}: cannot be fetched ({error}); if you have the file, put it here: {path}") from None
    finally:
        socket.setdefaulttimeout(None)
