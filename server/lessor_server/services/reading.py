"""When what is known of the database is to be read anew."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_MAX_AGE_S = 1.0
_MAX_REST_S = 60.0


class Reading:
    """The last read: when it ended and what it took.

    A read that takes long is followed by a rest, so that reading cannot fill the
    time of whoever reads. What a read takes is the shorter of the last two: one
    that waited for a database, or a host, that stood still says nothing of the
    next, and no job is to wait twenty times as long as the outage lasted.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        """Begins with none, by a ``clock`` of seconds that never goes back; None: the host's."""
        self._given_clock = clock
        self._at_s = 0.0
        self._last_s = 0.0
        self.took_s = 0.0
        """The shorter of the last two reads; 0 until there were two."""

    def _clock(self) -> float:
        # Looked up at each call: whoever simulates a process puts another clock there.
        return time.monotonic() if self._given_clock is None else self._given_clock()

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Takes note of the read that the block does, unless it fails."""
        began_s = self._clock()
        yield
        self._at_s = self._clock()
        before_s, self._last_s = self._last_s, self._at_s - began_s
        self.took_s = min(before_s, self._last_s)

    def due_in_s(self, *, stale: bool, rest: float) -> float:
        """Returns in how many seconds the next read is due, a minute at most; 0: now.

        Args:
            stale: Something is known to have changed; else a read is due by age.
            rest: How many times what a read takes are to pass before the next.
        """
        age_s = self._clock() - self._at_s
        rest_s = min(self.took_s * rest, _MAX_REST_S)
        return max(0.0, max(rest_s, 0.0 if stale else _MAX_AGE_S) - age_s)
