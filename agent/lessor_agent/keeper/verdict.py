"""What a keeper must do now: a pure function of the clock, the deadlines and what was asked."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

KILL_SLACK_NS = 250_000_000
"""SIGKILL goes out this long before the deadline, so that the tree is *gone* by it."""

LEFTOVER_GRACE_NS = 2_000_000_000
"""What a workload leaves behind after its main process ended by itself has at most this long after SIGTERM."""

LEASE_LOST = "lease_lost"
RUN_TIMEOUT = "run_timeout"
KEEPER_DIED = "keeper_died"
"""The keeper could not do its part; how the job would have ended is unknown."""

_NEVER = 1 << 63


class Step(Enum):
    """What to do."""

    WAIT = "wait"
    """Nothing, until ``wake_at_ns``."""
    STOP = "stop"
    """Ask the tree to stop; kill it at ``kill_at_ns``."""
    KILL = "kill"
    """Kill the tree now."""


class Verdict(NamedTuple):
    """A step and its particulars. All times are CLOCK_BOOTTIME nanoseconds."""

    step: Step
    cause: str | None
    """Why, when this verdict begins the stop; None otherwise."""
    kill_at_ns: int
    wake_at_ns: int


def judge(
    *,
    now_ns: int,
    deadline_ns: int,
    grace_ns: int,
    run_until_ns: int | None,
    kill_at_ns: int | None,
) -> Verdict:
    """Returns what to do at ``now_ns``.

    The tree is killed by ``deadline_ns - KILL_SLACK_NS`` whatever else was
    asked, and asked to stop ``grace_ns`` before that, so that a renewal up to
    that moment keeps it. A deadline in the past kills at once.

    Args:
        now_ns: CLOCK_BOOTTIME now.
        deadline_ns: By when the whole tree must be gone.
        grace_ns: From SIGTERM to SIGKILL.
        run_until_ns: End of the run timeout; None: there is none, or it does not run yet.
        kill_at_ns: When a stop already under way kills; None: none is under way.
    """
    limit_ns = deadline_ns - KILL_SLACK_NS
    if kill_at_ns is not None:
        due_ns = min(kill_at_ns, limit_ns)
        return Verdict(Step.KILL if now_ns >= due_ns else Step.WAIT, None, due_ns, due_ns)
    lease_due_ns = limit_ns - grace_ns
    run_due_ns = _NEVER if run_until_ns is None else run_until_ns
    due_ns = min(lease_due_ns, run_due_ns)
    if now_ns < due_ns:
        return Verdict(Step.WAIT, None, limit_ns, due_ns)
    cause = RUN_TIMEOUT if run_due_ns <= lease_due_ns else LEASE_LOST
    kill_due_ns = min(limit_ns, now_ns + grace_ns)
    step = Step.KILL if now_ns >= kill_due_ns else Step.STOP
    return Verdict(step, cause, kill_due_ns, kill_due_ns)
