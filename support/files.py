"""Writing files so that what was there before is not lost."""

import contextlib
import os
import secrets

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
