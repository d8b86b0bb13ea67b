"""``python -m lessor_server.worker NUMBER``: one of the processes of ``lessor server --workers N``.

Its settings are in its environment. Its standard output is a pipe to the
process that started it (see :mod:`.workers`): the line with the address once it
listens, and the line that says why it ends, if it does not end because it was
asked to.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys

import uvloop

from lessor_server import main
from lessor_server.config import ServerSettings
from lessor_server.workers import ERROR


class NumberFilter(logging.Filter):
    """Adds the worker's number to every record as the field ``worker``."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def filter(self, record: logging.LogRecord) -> bool:
        """Marks the record, and lets it pass."""
        record.worker = self._number
        return True


def run(number: int) -> None:
    """Serves until SIGTERM; raises what :func:`lessor_server.main.serve` raises."""
    settings = ServerSettings()
    main.configure_logging(settings)
    for handler in logging.getLogger().handlers:
        handler.addFilter(NumberFilter(number))
    uvloop.run(main.serve_here(settings))


def start(number: int) -> int:
    """Runs worker ``number``; returns its exit code."""
    code, message = main.outcome(lambda: run(number))
    if message:
        # Not by print: if the parent is gone, what is left in a buffer would be complained about at exit.
        with contextlib.suppress(OSError):
            os.write(sys.stdout.fileno(), f"{ERROR}{message}\n".encode())
    return code


if __name__ == "__main__":
    sys.exit(start(int(sys.argv[1])))
