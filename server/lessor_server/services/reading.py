"""When what is known of the database is to be read anew."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

_MAX_AGE_S = 1.0


class Reading:
    """The last read: when it ended and what it took.

    A read that takes long is followed by a rest, so that reading cannot fill the
    time of whoever reads.
    """

    def __init__(self) -> None:
        """Begins with none."""
        self._at_s = 0.0
        self.took_s = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Takes note of the read that the block does, unless it fails."""
        began_s = time.monotonic()
        yield
        self._at_s = time.monotonic()
        self.took_s = self._at_s - began_s

    def due_in_s(self, *, stale: bool, rest: float) -> float:
        """Returns in how many seconds the next read is due; 0: now.

        Args:
            stale: Something is known to have changed; else a read is due by age.
            rest: How many times what the last read took are to pass before the next.
        """
        age_s = time.monotonic() - self._at_s
        return max(0.0, max(self.took_s * rest, 0.0 if stale else _MAX_AGE_S) - age_s)
