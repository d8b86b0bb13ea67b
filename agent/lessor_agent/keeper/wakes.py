"""What wakes a process of this package that waits in a poll: a pipe."""

from __future__ import annotations

import contextlib
import os
import signal


class Wakes:
    """A pipe that becomes readable when a child dies or stops, or when :meth:`ring` was called, in whatever thread."""

    def __init__(self) -> None:
        """Takes over this process's SIGCHLD."""
        self.fd, self._write_fd = os.pipe()
        for fd in (self.fd, self._write_fd):
            os.set_blocking(fd, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)

    def ring(self) -> None:
        """Wakes who waits; of many rings at once it may hear one."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._write_fd, b"\0")

    def drain(self) -> None:
        """Forgets what was rung so far."""
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self.fd, 512)) == 512:
                pass
