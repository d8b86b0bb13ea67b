"""Job states and everything that can happen to a job, once.

A job's state is the table it stands in (QUEUED: ``ready`` or ``delayed``; LEASED
and RUNNING: ``lease``; the rest: the last row of ``attempt``), so nothing stores
it. The proto enum, the SQL statements and the diagram in the docs are derived
from :data:`TRANSITIONS` or tested against it.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum

from lessor.lifecycle import InvalidTransition

__all__ = ["TERMINAL", "TRANSITIONS", "InvalidTransition", "JobEvent", "JobState", "advance", "ending_event", "mermaid"]


class JobState(IntEnum):
    """Where a job stands. The numbers are those of the proto enum."""

    QUEUED = 1
    """Waiting for a place, or for the end of a retry's backoff."""
    LEASED = 2
    """An attempt is offered or accepted, and does not run yet."""
    RUNNING = 3
    """An attempt runs, or has ended and its last log bytes are on their way."""
    SUCCEEDED = 4
    FAILED = 5
    CANCELLED = 6


TERMINAL: frozenset[JobState] = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
"""States that never change."""


class JobEvent(StrEnum):
    """What can happen to a job.

    A cancel that is *asked* of a leased job is no event: it sets a flag on the
    lease, and the end of the lease decides (see :mod:`lessor_server.domain.budgets`).
    """

    GRANT = "grant"
    """It was given to an agent: a lease began."""
    RUN = "run"
    """Its workload runs."""
    SUCCEED = "succeed"
    """Its attempt succeeded."""
    FAIL = "fail"
    """A budget is exhausted, a retry cannot help, or its queue timeout passed."""
    CANCEL = "cancel"
    """It was cancelled while it waited, or its attempt ended after a cancel."""
    REQUEUE = "requeue"
    """Its attempt failed with budget left, or was lost, preempted, withdrawn or rejected."""
    LATE_SUCCEED = "late_succeed"
    """The end of an attempt given up as lost came in while the job waited: it had succeeded."""
    LATE_FAIL = "late_fail"
    """As LATE_SUCCEED, but the attempt had failed for good."""
    LATE_CANCEL = "late_cancel"
    """As LATE_SUCCEED, but the attempt had been cancelled."""
    LATE_REQUEUE = "late_requeue"
    """As LATE_SUCCEED, but the attempt had failed with budget left: the job goes on waiting, by its backoff."""


TRANSITIONS: dict[tuple[JobState, JobEvent], JobState] = {
    (JobState.QUEUED, JobEvent.GRANT): JobState.LEASED,
    (JobState.QUEUED, JobEvent.FAIL): JobState.FAILED,
    (JobState.QUEUED, JobEvent.CANCEL): JobState.CANCELLED,
    (JobState.QUEUED, JobEvent.LATE_SUCCEED): JobState.SUCCEEDED,
    (JobState.QUEUED, JobEvent.LATE_FAIL): JobState.FAILED,
    (JobState.QUEUED, JobEvent.LATE_CANCEL): JobState.CANCELLED,
    (JobState.QUEUED, JobEvent.LATE_REQUEUE): JobState.QUEUED,
    (JobState.LEASED, JobEvent.RUN): JobState.RUNNING,
    (JobState.LEASED, JobEvent.SUCCEED): JobState.SUCCEEDED,
    (JobState.LEASED, JobEvent.FAIL): JobState.FAILED,
    (JobState.LEASED, JobEvent.CANCEL): JobState.CANCELLED,
    (JobState.LEASED, JobEvent.REQUEUE): JobState.QUEUED,
    (JobState.RUNNING, JobEvent.SUCCEED): JobState.SUCCEEDED,
    (JobState.RUNNING, JobEvent.FAIL): JobState.FAILED,
    (JobState.RUNNING, JobEvent.CANCEL): JobState.CANCELLED,
    (JobState.RUNNING, JobEvent.REQUEUE): JobState.QUEUED,
}
"""(state, event) → state. What is not here cannot happen."""

_ENDING_EVENTS: dict[JobState | None, tuple[JobEvent, JobEvent]] = {
    JobState.SUCCEEDED: (JobEvent.SUCCEED, JobEvent.LATE_SUCCEED),
    JobState.FAILED: (JobEvent.FAIL, JobEvent.LATE_FAIL),
    JobState.CANCELLED: (JobEvent.CANCEL, JobEvent.LATE_CANCEL),
    None: (JobEvent.REQUEUE, JobEvent.LATE_REQUEUE),
}


def advance(state: JobState, event: JobEvent) -> JobState:
    """Returns the state after ``event``.

    Raises:
        InvalidTransition: The event cannot happen in ``state``.
    """
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise InvalidTransition(f"a job that is {state.name} cannot {event}") from None


def ending_event(final: JobState | None, *, late: bool = False) -> JobEvent:
    """Returns the event by which the end of an attempt changes its job.

    Args:
        final: The terminal state the job takes; None when it goes back to waiting.
        late: The lease was gone when the end came in, and the job waits.

    Raises:
        InvalidTransition: ``final`` is not terminal.
    """
    try:
        in_time, after = _ENDING_EVENTS[final]
    except KeyError:
        raise InvalidTransition(f"an attempt's end cannot leave its job {final.name if final else None}") from None
    return after if late else in_time


def mermaid() -> str:
    """Returns the states and transitions as a Mermaid state diagram, one edge per pair of states."""
    edges: dict[tuple[JobState, JobState], list[JobEvent]] = {}
    for (source, event), target in TRANSITIONS.items():
        edges.setdefault((source, target), []).append(event)
    lines = ["stateDiagram-v2", f"    [*] --> {JobState.QUEUED.name}: submit"]
    lines += [
        f"    {source.name} --> {target.name}: {', '.join(events)}"
        for (source, target), events in sorted(edges.items())
    ]
    lines += [f"    {state.name} --> [*]" for state in sorted(TERMINAL)]
    return "\n".join(lines) + "\n"
