"""What the protocol core asks for, in the order it must be done.

The core performs nothing itself. Whoever drives it (the supervisor on a host,
the simulator in virtual time) carries out the actions and reports back what
came of them.

Nobody changes one once it is made. Those that every job needs are not frozen
all the same: to make a frozen one takes more than twice as long.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from lessor.lifecycle import LeasePhase
from lessor.v1 import agent_service_pb2 as pb
from lessor_agent.runtimes.base import Handle, StopCause


@dataclass(frozen=True, slots=True)
class OpenStream:
    """Open a stream to the server. Any earlier one is closed and no longer read."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class CloseStream:
    """Close the stream. What it still says is ignored; no ``stream_lost`` is expected."""

    stream_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class Send:
    """Write a message to the stream; ``urgent`` ones overtake all others."""

    stream_id: int
    message: pb.ConnectRequest
    urgent: bool = False


@dataclass(slots=True)
class SendLog:
    """Read ``length`` bytes of an output file and write them to the stream as one log chunk."""

    stream_id: int
    job_id: str
    lease_id: int
    offset: int
    """Offset in the attempt's log, both streams together."""
    stream: int
    """A value of the enum LogStream."""
    file_offset: int
    length: int


@dataclass(slots=True)
class PutLease:
    """A lease is about to be prepared: the intent of a start."""

    lease_id: int
    job_id: str
    grant: bytes


@dataclass(slots=True)
class PutHandle:
    """The keeper of a lease stands and is found by ``handle``."""

    lease_id: int
    handle: Handle


@dataclass(slots=True)
class PutPhase:
    """A lease moved on."""

    lease_id: int
    phase: LeasePhase


@dataclass(slots=True)
class PutEvent:
    """A durable event to be sent until it is acked."""

    seq: int
    lease_id: int
    event: bytes


@dataclass(frozen=True, slots=True)
class DropEvents:
    """Events that are acked, or that nobody wants any more."""

    seqs: tuple[int, ...]


@dataclass(slots=True)
class DropLease:
    """A lease that is over and done with; it leaves a tombstone."""

    lease_id: int


Entry = PutLease | PutHandle | PutPhase | PutEvent | DropEvents | DropLease


@dataclass(frozen=True, slots=True)
class Journal:
    """Commit the entries in one transaction, then report the ticket; tickets commit in order."""

    ticket: int
    entries: tuple[Entry, ...]


@dataclass(slots=True)
class Prepare:
    """Prepare an execution; answered by ``prepared`` or ``prepare_refused``."""

    lease_id: int
    runtime: str
    grant: pb.Grant
    deadline_ns: int
    """CLOCK_BOOTTIME."""


@dataclass(slots=True)
class Begin:
    """Let the prepared execution run; answered by ``running``."""

    lease_id: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop the execution; answered by ``ended`` when its tree is gone."""

    lease_id: int
    cause: StopCause
    grace: timedelta | None
    """None: the grant's."""


@dataclass(slots=True)
class Renew:
    """Move the execution's deadline."""

    lease_id: int
    deadline_ns: int
    """CLOCK_BOOTTIME."""


@dataclass(slots=True)
class Forget:
    """Remove what the execution left on the host, if it has one."""

    lease_id: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the agent: it can never work with this server. It holds no lease."""

    message: str


Action = OpenStream | CloseStream | Send | SendLog | Journal | Prepare | Begin | Stop | Renew | Forget | GiveUp
