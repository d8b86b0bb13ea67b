"""Lease phases and outcomes, as the server and the agent both know them.

The numbers are those of the enums in ``proto/lessor/v1/job.proto``; a test
holds the two together.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum


class LeasePhase(IntEnum):
    """Where a lease stands."""

    OFFERED = 1
    ACCEPTED = 2
    RUNNING = 3
    DRAINING = 4
    ENDED = 5


class Outcome(IntEnum):
    """How a lease ended."""

    SUCCEEDED = 1
    FAILED = 2
    CANCELLED = 3
    TIMED_OUT = 4
    PREEMPTED = 5
    LOST = 6
    REJECTED = 7
    WITHDRAWN = 8


class LeaseEvent(StrEnum):
    """What can happen to a lease."""

    ACCEPT = "accept"
    """The agent took it and its keeper stands."""
    RUN = "run"
    """The workload began."""
    END = "end"
    """The agent says how it ended; log bytes may be missing."""
    LOGS_COMPLETE = "logs_complete"
    """The last log byte is committed."""
    REJECT = "reject"
    """The agent refuses the offer; nothing was started."""
    RELEASE = "release"
    """The agent says it does not hold it."""
    EXPIRE = "expire"
    """Its session was not renewed for ttl + margin of lease time."""


class InvalidTransition(ValueError):
    """An event that cannot happen in a phase: a bug, or a message of a ghost."""


LEASE_TRANSITIONS: dict[tuple[LeasePhase, LeaseEvent], LeasePhase] = {
    (LeasePhase.OFFERED, LeaseEvent.ACCEPT): LeasePhase.ACCEPTED,
    (LeasePhase.OFFERED, LeaseEvent.RUN): LeasePhase.RUNNING,
    (LeasePhase.ACCEPTED, LeaseEvent.RUN): LeasePhase.RUNNING,
    (LeasePhase.OFFERED, LeaseEvent.END): LeasePhase.DRAINING,
    (LeasePhase.ACCEPTED, LeaseEvent.END): LeasePhase.DRAINING,
    (LeasePhase.RUNNING, LeaseEvent.END): LeasePhase.DRAINING,
    (LeasePhase.DRAINING, LeaseEvent.LOGS_COMPLETE): LeasePhase.ENDED,
    (LeasePhase.OFFERED, LeaseEvent.REJECT): LeasePhase.ENDED,
    (LeasePhase.OFFERED, LeaseEvent.RELEASE): LeasePhase.ENDED,
    (LeasePhase.ACCEPTED, LeaseEvent.RELEASE): LeasePhase.ENDED,
    (LeasePhase.RUNNING, LeaseEvent.RELEASE): LeasePhase.ENDED,
    # The outcome stands; the log bytes that are missing will not come.
    (LeasePhase.DRAINING, LeaseEvent.RELEASE): LeasePhase.ENDED,
    (LeasePhase.OFFERED, LeaseEvent.EXPIRE): LeasePhase.ENDED,
    (LeasePhase.ACCEPTED, LeaseEvent.EXPIRE): LeasePhase.ENDED,
    (LeasePhase.RUNNING, LeaseEvent.EXPIRE): LeasePhase.ENDED,
    (LeasePhase.DRAINING, LeaseEvent.EXPIRE): LeasePhase.ENDED,
}
"""(phase, event) → phase. What is not here cannot happen."""


def advance(phase: LeasePhase, event: LeaseEvent) -> LeasePhase:
    """Returns the phase after ``event``.

    Raises:
        InvalidTransition: The event cannot happen in ``phase``.
    """
    try:
        return LEASE_TRANSITIONS[phase, event]
    except KeyError:
        raise InvalidTransition(f"a lease that is {phase.name} cannot {event}") from None


def outcome_without_word(phase: LeasePhase) -> Outcome:
    """Returns how a lease ended that expired or was released in ``phase`` with no outcome told.

    An offer never accepted costs nothing; what may have run counts as a loss.
    """
    return Outcome.WITHDRAWN if phase is LeasePhase.OFFERED else Outcome.LOST
