"""The three standard streams of the command: closed, full, or with nobody who reads."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from typing import TextIO

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""What a write meets when there is no room for it; nothing else that a command does leaves these uncaught."""


def open_missing() -> None:
    """Opens the null device for each standard stream that the caller closed.

    Without it the next file or socket gets that number, and what was meant for
    the stream goes there.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            # A job or a server that this process starts inherits it, as it would the stream itself.
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, errors="replace", closefd=False))


def is_full(error: OSError) -> bool:
    """Returns whether ``error`` is that of a write to a stream that takes no more."""
    return error.errno in _FULL and error.filename is None


def complain(line: str) -> None:
    """Prints ``line`` to standard error; where that takes no more, nobody is left to tell."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Sends what ``stream`` still holds to the null device, so that its flush at exit cannot fail."""
    with suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
