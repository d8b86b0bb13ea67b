"""Which log bytes to send next.

The log of an attempt is one sequence of bytes, numbered by one offset over both
output streams; a chunk belongs to one of them. The order in which the agent
sends is the order of the log. The server's position names how much of each
stream it has, so the agent remembers nothing across a restart: it goes on from
there.

A position that repeats the last one while later bytes are under way says that a
chunk was refused: the flow goes back to it, once. Should that be lost too, it
goes back when nothing was acked for a while. Bytes sent twice do no harm: the
server takes a chunk only at its end offset.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import job_pb2

MAX_CHUNK_BYTES = 64 * 1024
"""Longest chunk sent."""

DEFAULT_WINDOW_BYTES = 4 * 1024 * 1024
"""Unacked bytes of all leases together, until the server says otherwise."""

RESEND_AFTER_NS = 10_000_000_000
"""Bytes that are not acked for this long are sent again."""


@dataclass(slots=True, unsafe_hash=True)
class Position:
    """A place in an attempt's log. Nobody changes one; not frozen, since to make a frozen one is dear."""

    stdout: int = 0
    stderr: int = 0
    offset: int = field(init=False, repr=False, compare=False)
    """Bytes of both streams together."""

    def __post_init__(self) -> None:
        self.offset = self.stdout + self.stderr


_START = Position()


@dataclass(slots=True)
class Chunk:
    """Bytes to send: ``length`` bytes of ``stream`` from ``file_offset`` on, at ``offset`` of the log."""

    offset: int
    stream: int
    file_offset: int
    length: int


@dataclass(slots=True)
class LeaseLog:
    """The flow of one attempt's log."""

    available: Position = _START
    """What the output files hold."""
    sent: Position = _START
    acked: Position = _START
    final_offset: int | None = None
    """Length of the whole log, once the workload is over."""
    is_open: bool = False
    """The server of this session has said where to go on."""
    moved_ns: int = 0
    """When the first unacked byte was sent, or the last ack came."""
    went_back_at: int = -1
    """Offset of the last return, so that repeated refusals cause one."""
    counted_bytes: int = 0
    """What the shared window counts of it; see :class:`lessor_agent.protocol.logwindow.LogWindow`."""

    @property
    def in_flight(self) -> int:
        """Bytes sent and not acked."""
        return self.sent.offset - self.acked.offset

    @property
    def pending(self) -> int:
        """Bytes that wait to be sent."""
        return self.available.offset - self.sent.offset

    @property
    def complete(self) -> bool:
        """The whole log is acked."""
        return self.final_offset is not None and self.acked.offset >= self.final_offset

    def grow(self, stdout_bytes: int, stderr_bytes: int) -> None:
        """Takes note of what the files hold; a file that shrank counts with its former length."""
        known = self.available
        if stdout_bytes > known.stdout or stderr_bytes > known.stderr:
            self.available = Position(max(known.stdout, stdout_bytes), max(known.stderr, stderr_bytes))

    def resume(self, position: Position, now_ns: int) -> None:
        """Goes on from ``position``: the server's word at the start of a session."""
        self.is_open = True
        self._go_to(position, now_ns)
        self.went_back_at = -1

    def pause(self) -> None:
        """Sends nothing until the next :meth:`resume`; what was under way is not counted on."""
        self.is_open = False
        self.sent = self.acked

    def acknowledge(self, position: Position, now_ns: int) -> None:
        """Takes an acked position; goes back to it where it says that bytes were refused."""
        if position.offset > self.sent.offset or position.offset < self.acked.offset:
            self._go_to(position, now_ns)
        elif position.offset > self.acked.offset:
            self.acked = position
            self.moved_ns = now_ns
        elif self.in_flight and self.went_back_at != position.offset:
            self._go_to(position, now_ns)
            self.went_back_at = position.offset

    def check(self, now_ns: int) -> None:
        """Goes back to the acked position if nothing was acked for too long."""
        if self.in_flight and now_ns - self.moved_ns >= RESEND_AFTER_NS:
            self._go_to(self.acked, now_ns)

    def next_chunk(self, room_bytes: int, now_ns: int) -> Chunk | None:
        """Returns the next chunk of at most ``room_bytes``, or None; counts it as sent."""
        if not self.is_open or room_bytes <= 0:
            return None
        length = min(self.available.stdout - self.sent.stdout, room_bytes, MAX_CHUNK_BYTES)
        if length > 0:
            chunk = Chunk(self.sent.offset, job_pb2.LOG_STREAM_STDOUT, self.sent.stdout, length)
            after = Position(self.sent.stdout + length, self.sent.stderr)
        else:
            length = min(self.available.stderr - self.sent.stderr, room_bytes, MAX_CHUNK_BYTES)
            if length <= 0:
                return None
            chunk = Chunk(self.sent.offset, job_pb2.LOG_STREAM_STDERR, self.sent.stderr, length)
            after = Position(self.sent.stdout, self.sent.stderr + length)
        if not self.in_flight:
            self.moved_ns = now_ns
        self.sent = after
        return chunk

    def _go_to(self, position: Position, now_ns: int) -> None:
        self.acked = self.sent = position
        self.moved_ns = now_ns
        # The server may hold more than was seen of the files so far: an agent
        # that has just started has not looked yet.
        self.grow(position.stdout, position.stderr)


def position_of(message: pb.LogPosition) -> Position | None:
    """Returns the position a message names; None if its numbers contradict each other."""
    if message.stdout_bytes < 0 or message.stderr_bytes < 0:
        return None
    if message.end_offset != message.stdout_bytes + message.stderr_bytes:
        return None
    return Position(message.stdout_bytes, message.stderr_bytes)
