"""Waiting for processes that may not be our children."""

from __future__ import annotations

import os
import select


def wait_gone(pid: int, timeout_s: float = 60.0) -> None:
    """Returns once process ``pid`` has ended, whoever its parent is.

    Raises:
        TimeoutError: It still runs after ``timeout_s``.
    """
    try:
        watch = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not select.select([watch], [], [], timeout_s)[0]:
            raise TimeoutError(f"process {pid} still runs after {timeout_s} s")
    finally:
        os.close(watch)
