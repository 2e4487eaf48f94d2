"""Writing files so that what was there before is not lost, and so that one process at a time does."""

import contextlib
import errno
import os
import secrets

try:
    import fcntl
except ImportError:  # Windows has other locks: nothing keeps two processes from one file there
    fcntl = None

from support.command import InputError


def replace(path, write, sync=True):
    """Has write(file) fill a new file, which then takes the place of `path`: at any moment that is a whole file.

    sync  whether the file is on the disk, not only on its way there, before it takes its name

    Raises InputError if it cannot be written; what was there before stays.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")  # for one writer alone
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        while error.__context__:  # torch's own complaint hides the disk's
            error = error.__context__
        with contextlib.suppress(OSError):
            partial.unlink()
        kept = "; the one before it is whole" if path.exists() else ""
        raise InputError(f"{path}: cannot be written to ({error}){kept}") from None


def lock_file(file, wait):
    """Takes the lock of an open file, until it is closed or this process ends; if another one has it, waits for it or
    returns False."""
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        # Else the file system has no locks.
    return True
