"""What a keeper must do now: a pure function of the clock, the deadlines and what was asked."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from lessor_agent.keeper.record import EXPIRED

KILL_SLACK_NS = 250_000_000
"""SIGKILL, or the freeze, goes out this long before the deadline, so that the tree is *gone*, or still, by it."""

GATHER_AHEAD_NS = 3_000_000_000
"""A tree that is to be frozen is gathered where that takes no time, this long before it."""

LEFTOVER_GRACE_NS = 2_000_000_000
"""What a workload leaves behind after its main process ended by itself has at most this long after SIGTERM."""

LEASE_LOST = "lease_lost"
RUN_TIMEOUT = "run_timeout"
KEEPER_DIED = "keeper_died"
"""The keeper could not do its part; how the job would have ended is unknown."""

FREEZE = "freeze"
STOP = "stop"
CONTINUE = "continue"
"""What becomes of a tree whose lease is lost: it stands still, it has ended, or it goes on."""

_NEVER = 1 << 63


class Step(Enum):
    """What to do."""

    WAIT = "wait"
    """Nothing, until ``wake_at_ns``."""
    STOP = "stop"
    """Ask the tree to stop; kill it at ``kill_at_ns``."""
    KILL = "kill"
    """Kill the tree now."""
    GATHER = "gather"
    """Prepare the tree to be frozen."""
    FREEZE = "freeze"
    """Have the tree stand still."""
    THAW = "thaw"
    """Have the tree go on."""


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
    on_lost: str = STOP,
    frozen: bool = False,
    gathered: bool = False,
) -> Verdict:
    """Returns what to do at ``now_ns``.

    A tree that is to be stopped is killed by ``deadline_ns - KILL_SLACK_NS``
    whatever else was asked, and asked to stop ``grace_ns`` before that, so that a
    renewal up to that moment keeps it. A deadline in the past kills at once.

    One that is to be frozen is, at that same moment, and goes on when a renewal
    has moved the deadline on. It never runs without the lease: whoever stops it
    while it stands still, or asks it to stop shortly before, has it killed; and
    so has a deadline that is :data:`EXPIRED`, which nobody will ever move.

    Args:
        now_ns: CLOCK_BOOTTIME now.
        deadline_ns: By when the whole tree must be gone, or stand still.
        grace_ns: From SIGTERM to SIGKILL.
        run_until_ns: End of the run timeout; None: there is none, or it does not run yet.
        kill_at_ns: When a stop already under way kills; None: none is under way.
        on_lost: What becomes of the tree at the deadline; a word that is none of the three stops it.
        frozen: The tree stands still.
        gathered: It was prepared for that.
    """
    limit_ns = deadline_ns - KILL_SLACK_NS
    if on_lost == CONTINUE:
        limit_ns = _NEVER
    if kill_at_ns is not None:
        due_ns = 0 if frozen else min(kill_at_ns, limit_ns)
        return Verdict(Step.KILL if now_ns >= due_ns else Step.WAIT, None, due_ns, due_ns)
    run_due_ns = _NEVER if run_until_ns is None else run_until_ns
    freezes = on_lost == FREEZE and deadline_ns != EXPIRED
    if freezes and (frozen or now_ns < run_due_ns):
        return _judge_frozen(now_ns, limit_ns, run_due_ns, frozen=frozen, gathered=gathered)
    lease_due_ns = limit_ns if freezes or on_lost == CONTINUE else limit_ns - grace_ns
    due_ns = min(lease_due_ns, run_due_ns)
    if now_ns < due_ns:
        return Verdict(Step.WAIT, None, limit_ns, due_ns)
    cause = RUN_TIMEOUT if run_due_ns <= lease_due_ns or freezes else LEASE_LOST
    kill_due_ns = min(limit_ns, now_ns + grace_ns)
    step = Step.KILL if now_ns >= kill_due_ns else Step.STOP
    return Verdict(step, cause, kill_due_ns, kill_due_ns)


def _judge_frozen(now_ns: int, limit_ns: int, run_due_ns: int, *, frozen: bool, gathered: bool) -> Verdict:
    """Returns what to do with a tree that is to be frozen and is not asked to stop."""
    if frozen:
        if now_ns < limit_ns:
            # First of all, also if its time is over: asked to stop it must be able to hear it.
            return Verdict(Step.THAW, None, limit_ns, now_ns)
        if now_ns >= run_due_ns:
            return Verdict(Step.KILL, RUN_TIMEOUT, now_ns, now_ns)
        return Verdict(Step.WAIT, None, limit_ns, run_due_ns)
    if now_ns >= limit_ns:
        return Verdict(Step.FREEZE, None, limit_ns, now_ns)
    gather_ns = limit_ns if gathered else limit_ns - GATHER_AHEAD_NS
    if now_ns >= gather_ns:
        return Verdict(Step.GATHER, None, limit_ns, now_ns)
    return Verdict(Step.WAIT, None, limit_ns, min(gather_ns, run_due_ns))
