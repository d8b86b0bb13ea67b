"""One lease in the hands of the agent."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import IntEnum, StrEnum

from google.protobuf.duration_pb2 import Duration

from lessor import timing
from lessor.lifecycle import LeasePhase
from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import job_pb2
from lessor_agent.protocol.logflow import LeaseLog
from lessor_agent.runtimes.base import StopCause

DEFAULT_RUNTIME = "process"
"""The runtime of a spec that names none."""

_SECOND_NS = 1_000_000_000


class Stage(IntEnum):
    """How far a lease has come on the agent; only ever grows."""

    INTENT = 1
    """The intent is on its way to the journal; nothing exists yet."""
    PREPARING = 2
    """The runtime prepares; a keeper may stand."""
    SECURING = 3
    """The keeper stands; its handle and Accepted are on their way to the journal."""
    ACCEPTED = 4
    """Accepted is journalled; the workload may begin."""
    RUNNING = 5
    """The workload runs."""
    ENDED = 6
    """The workload's tree is gone and Ended is journalled or on its way there."""


PHASES = {
    Stage.INTENT: LeasePhase.OFFERED,
    Stage.PREPARING: LeasePhase.OFFERED,
    Stage.SECURING: LeasePhase.OFFERED,
    Stage.ACCEPTED: LeasePhase.ACCEPTED,
    Stage.RUNNING: LeasePhase.RUNNING,
    Stage.ENDED: LeasePhase.DRAINING,
}
"""Stage → the phase the server knows."""


class Fate(StrEnum):
    """What a restarted agent found of a journalled lease."""

    FOUND = "found"
    """Its execution was adopted: prepared, running or ended."""
    VANISHED = "vanished"
    """Nothing is left of its execution."""
    REBOOTED = "rebooted"
    """The host has booted since: nothing of it can run."""
    NEVER_PREPARED = "never_prepared"
    """Only the intent was journalled; whatever stood has been ended."""


@dataclass(frozen=True, slots=True)
class RestoredLease:
    """A journalled lease, as a restarted agent found it."""

    grant: pb.Grant
    phase: LeasePhase
    fate: Fate


@dataclass(frozen=True, slots=True)
class StopRequest:
    """A stop asked for before or after the execution stood."""

    cause: StopCause
    grace: timedelta | None


INTENT, PREPARING, SECURING, ACCEPTED, RUNNING, ENDED = Stage
"""Each by its own name: to look one up in its class is dear where every job does it a dozen times."""


@dataclass(slots=True, eq=False)
class Lease:
    """A lease and what the core must remember of it."""

    grant: pb.Grant
    stage: Stage
    confirmed: bool
    """The current session of the server keeps it: it is renewed with the session."""
    log: LeaseLog
    lease_id: int = field(init=False)
    """The fencing token."""
    job_id: str = field(init=False)
    """The public id of the job."""
    runtime: str = field(init=False)
    """Name of the runtime that runs it."""
    term_ns: int = field(init=False)
    """From an acked send time to when its tree must be gone: ttl − margin."""
    told_deadline_ns: int = 0
    """The deadline that its execution has; 0: not known."""
    restored: bool = False
    begun: bool = False
    stop: StopRequest | None = None
    stale: bool = False
    """The server said that it is over: its end interests nobody."""
    withdrawn: str | None = None
    """Why an offer is given back; answered by Released once nothing of it is left."""
    accepted_seq: int = 0
    """Number of its Accepted; 0: not accepted by this process of the agent."""
    rejected: job_pb2.JobError | None = None
    """Why it cannot be taken; answered by Rejected once nothing of it is left."""
    start_time: datetime | None = None
    """When its workload began; None: it has not, or an earlier agent began it."""
    ended_event: pb.Ended | None = None
    end_acked: bool = False
    listed: LeasePhase | None = None
    """As the last Hello listed it; None: it did not."""
    progress: job_pb2.Progress | None = None
    """Latest progress not sent yet."""
    progress_due_ns: int = 0
    """The next progress may be sent from then on."""
    checkpoint_seq: int = 0
    """Newest checkpoint event that is not acked; 0: none."""
    checkpoint_next: str | None = None
    """Newest cursor that waits while an older one is on its way to the journal."""

    def __post_init__(self) -> None:
        grant = self.grant
        self.lease_id = grant.lease_id
        self.job_id = grant.job_id
        self.runtime = grant.spec.runtime or DEFAULT_RUNTIME
        self.term_ns = term_ns(grant)

    @property
    def phase(self) -> LeasePhase:
        """Where it stands, in the server's words."""
        return PHASES[self.stage]

    @property
    def owes_an_end(self) -> bool:
        """It has ended, and whatever the server says of it was said without knowing so.

        The server may count it as lost and its job as waiting: the next Hello, which
        lists it as ended, has finished work not run again.
        """
        return self.stage is ENDED and not self.end_acked and self.listed is not LeasePhase.DRAINING

    @property
    def unanswered(self) -> bool:
        """The server did not say of it whether it stands: it is held, and not renewed."""
        return not self.confirmed and not self.abandoned and self.stage is not ENDED

    @property
    def abandoned(self) -> bool:
        """It is being given back or dropped: it will never run (again)."""
        return self.stale or self.withdrawn is not None or self.rejected is not None

    def deadline_ns(self, renewed_ns: int) -> int:
        """Returns when its tree must be gone if ``renewed_ns`` was the last acked send time."""
        return renewed_ns + self.term_ns


def term_ns(grant: pb.Grant) -> int:
    """Returns how long a grant's execution may go on after an acked send time: ttl − margin, in nanoseconds."""
    ttl, margin = grant.ttl, grant.margin
    ttl_ns = ttl.seconds * _SECOND_NS + ttl.nanos
    if ttl_ns == 0 and not grant.HasField("ttl"):
        ttl_ns = nanoseconds(timing.DEFAULT_TTL)
    margin_ns = margin.seconds * _SECOND_NS + margin.nanos
    if margin_ns == 0 and not grant.HasField("margin"):
        margin_ns = nanoseconds(timing.margin(timedelta(microseconds=ttl_ns // 1000)))
    return ttl_ns - margin_ns


def duration(value: Duration) -> timedelta:
    """Returns a proto duration as a timedelta."""
    return timedelta(seconds=value.seconds, microseconds=value.nanos / 1000)


def nanoseconds(value: timedelta) -> int:
    """Returns a timedelta in whole nanoseconds."""
    return value // timedelta(microseconds=1) * 1000
