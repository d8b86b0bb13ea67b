"""The agent's connection lease: which stream is live, when to try again, what was renewed when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

BACKOFF_FIRST_NS = 100_000_000
BACKOFF_MAX_NS = 5_000_000_000
"""A lost stream is tried again after a random part of 0.1 s, 0.2 s, … 5 s."""

RECONNECT_SPREAD_NS = 200_000_000
"""Asked to connect elsewhere, an agent does so within this, at random."""

SLOW_RETRY_NS = 30_000_000_000
"""A refusal that time alone may heal is tried again after half to all of this."""

WELCOME_TIMEOUT_NS = 10_000_000_000
"""A Hello that is not answered for this long is given up, and its stream."""

SILENT_INTERVALS = 3
SILENT_AT_LEAST_NS = 3_000_000_000
"""A stream on which no heartbeat was acked for this many intervals is given up."""


NEVER_NS = (1 << 63) - 1
"""Later than any time."""


class Link(StrEnum):
    """Where the connection stands."""

    DOWN = "down"
    """No stream; the next is opened at ``retry_at_ns``."""
    CONNECTING = "connecting"
    """A stream is being opened."""
    GREETING = "greeting"
    """Hello is sent, Welcome is awaited."""
    UP = "up"
    """Welcome came: this is the session's stream."""
    CLOSED = "closed"
    """The agent is leaving."""


@dataclass(slots=True)
class Session:
    """State of the connection. Times are CLOCK_BOOTTIME nanoseconds."""

    interval_ns: int
    """Between two heartbeats."""
    random: Callable[[], float]
    """Uniform in [0, 1)."""
    link: Link = Link.DOWN
    stream_id: int = 0
    session_id: int = 0
    epoch: int = 0
    attempts: int = 0
    """Streams lost since the last Welcome."""
    retry_at_ns: int = NEVER_NS
    """No stream is opened before this time; before the start, none at all."""
    hello_sent_ns: int = 0
    renewed_ns: int = 0
    """Send time of the last heartbeat, or Hello, that the server has committed."""
    heartbeat_seq: int = 0
    heartbeat_due_ns: int = 0
    answered_ns: int = 0
    """When the server last acked a heartbeat, or welcomed."""
    _unacked: dict[int, int] = field(default_factory=dict)
    """Heartbeat seq → send time."""

    def open(self) -> int:
        """Begins a new stream; returns its id."""
        self.stream_id += 1
        self.link = Link.CONNECTING
        self.heartbeat_seq = 0
        self._unacked.clear()
        return self.stream_id

    def greet(self, now_ns: int) -> None:
        """Takes note of a Hello sent now: heartbeats sent before it no longer count."""
        self.link = Link.GREETING
        self.hello_sent_ns = now_ns
        self._unacked.clear()

    def welcome(self, session_id: int, epoch: int, now_ns: int) -> None:
        """Takes note of a Welcome: the Hello is committed and counts as a heartbeat."""
        self.link = Link.UP
        self.session_id = session_id
        self.epoch = epoch
        self.attempts = 0
        self.renewed_ns = max(self.renewed_ns, self.hello_sent_ns)
        self.heartbeat_due_ns = self.hello_sent_ns + self.interval_ns
        self.answered_ns = now_ns

    def beat(self, now_ns: int) -> int:
        """Returns the number of the heartbeat that is sent now."""
        self.heartbeat_seq += 1
        self._unacked[self.heartbeat_seq] = now_ns
        # Counted from now, not from when it was due: after a pause of the whole
        # host one heartbeat is enough.
        self.heartbeat_due_ns = now_ns + self.interval_ns
        return self.heartbeat_seq

    def heartbeat_acked(self, seq: int, now_ns: int) -> bool:
        """Takes an ack of heartbeat ``seq``; True if it moved :attr:`renewed_ns`."""
        sent_ns = self._unacked.get(seq)
        if sent_ns is None:
            return False
        for older in [number for number in self._unacked if number <= seq]:
            del self._unacked[older]
        self.answered_ns = now_ns
        if sent_ns <= self.renewed_ns:
            return False
        self.renewed_ns = sent_ns
        return True

    @property
    def silent_at_ns(self) -> int:
        """When the stream is given up unless the server acks a heartbeat."""
        return self.answered_ns + max(SILENT_INTERVALS * self.interval_ns, SILENT_AT_LEAST_NS)

    def back_off(self, now_ns: int) -> int:
        """Schedules the next try after a loss; returns the delay."""
        ceiling = min(BACKOFF_MAX_NS, BACKOFF_FIRST_NS << min(self.attempts, 16))
        self.attempts += 1
        return self._retry_in(int(self.random() * ceiling), now_ns)

    def retry_soon(self, now_ns: int) -> int:
        """Schedules the next try at once, with enough spread that agents do not come as one."""
        return self._retry_in(int(self.random() * RECONNECT_SPREAD_NS), now_ns)

    def retry_slowly(self, now_ns: int) -> int:
        """Schedules the next try after a refusal that will last a while."""
        return self._retry_in(int((0.5 + self.random() / 2) * SLOW_RETRY_NS), now_ns)

    def _retry_in(self, delay_ns: int, now_ns: int) -> int:
        self.link = Link.DOWN
        self._unacked.clear()
        self.retry_at_ns = now_ns + delay_ns
        return delay_ns
