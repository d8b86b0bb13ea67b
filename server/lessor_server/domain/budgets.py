"""What becomes of a job when its lease ends, and how long a retry waits.

A job has two budgets. ``max_failures`` counts attempts that failed or timed out
by their own doing; ``max_losses`` counts attempts that vanished (a dead host, an
expired lease), so that a job that kills its hosts stops in the end. Whatever else
ends a lease costs nothing. The SQL statements that end and expire leases apply
the same table; tests hold the two together.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import assert_never

from lessor.lifecycle import Outcome
from lessor.timing import BACKOFF_JITTER
from lessor_server.domain.states import JobState

REJECTED_DELAY = timedelta(seconds=1)
"""A rejected job waits at least this long, so that an agent that refuses it makes no hot loop."""

REJECTED_DELAY_MAX = timedelta(minutes=1)
"""And at most this long, however often it was refused."""

_AT_ONCE = timedelta(0)
_MICROSECOND = timedelta(microseconds=1)
_MAX_DOUBLINGS = 64
"""Beyond this many doublings even one microsecond is over every maximum."""


class Budget(StrEnum):
    """A limit of a job's retry policy, by the name of its field."""

    MAX_FAILURES = "max_failures"
    MAX_LOSSES = "max_losses"


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of the job."""

    final: JobState | None
    """The terminal state it takes; None: it waits again."""
    failures: int
    """Failures so far, this end included."""
    losses: int
    """Losses so far, this end included."""
    backoff: bool = False
    """It waits for its backoff, see :func:`backoff`."""
    delay: timedelta = _AT_ONCE
    """It waits this long, whatever its backoff."""
    exhausted: Budget | None = None
    """The budget that this end exhausted."""


def fate(
    outcome: Outcome,
    failures: int,
    losses: int,
    max_failures: int,
    max_losses: int,
    retryable: bool,
    cancel_requested: bool,
) -> Fate:
    """Returns what becomes of a job whose lease ended with ``outcome``.

    | outcome | cancel not asked | cancel asked |
    | --- | --- | --- |
    | SUCCEEDED | SUCCEEDED | SUCCEEDED |
    | CANCELLED | CANCELLED | CANCELLED |
    | FAILED, TIMED_OUT | failures + 1; FAILED if that reaches max_failures or a retry cannot help; else backoff | CANCELLED |
    | LOST | losses + 1; FAILED if that reaches max_losses; else at once | CANCELLED |
    | PREEMPTED, WITHDRAWN | waits again at once, at no cost | CANCELLED |
    | REJECTED | waits :func:`rejection_delay`, at no cost | CANCELLED |

    A job that succeeds or is cancelled keeps the counts it had.

    Args:
        outcome: How the lease ended.
        failures: Failures before this end, >= 0.
        losses: Losses before this end, >= 0.
        max_failures: Failures after which the job is FAILED; 0 and 1 both mean the first.
        max_losses: Losses after which the job is FAILED; 0 and 1 both mean the first.
        retryable: False when a retry cannot help; only failures ask for it.
        cancel_requested: A user asked to cancel the job.
    """  # noqa: E501 - a table row cannot be wrapped
    if outcome is Outcome.SUCCEEDED:
        return Fate(JobState.SUCCEEDED, failures, losses)
    if cancel_requested:
        return Fate(JobState.CANCELLED, failures, losses)
    match outcome:
        case Outcome.CANCELLED:
            return Fate(JobState.CANCELLED, failures, losses)
        case Outcome.FAILED | Outcome.TIMED_OUT:
            failures += 1
            if failures >= max_failures:
                return Fate(JobState.FAILED, failures, losses, exhausted=Budget.MAX_FAILURES)
            if not retryable:
                return Fate(JobState.FAILED, failures, losses)
            return Fate(None, failures, losses, backoff=True)
        case Outcome.LOST:
            losses += 1
            if losses >= max_losses:
                return Fate(JobState.FAILED, failures, losses, exhausted=Budget.MAX_LOSSES)
            return Fate(None, failures, losses)
        case Outcome.PREEMPTED | Outcome.WITHDRAWN:
            return Fate(None, failures, losses)
        case Outcome.REJECTED:
            return Fate(None, failures, losses, delay=REJECTED_DELAY)
    assert_never(outcome)


def late_fate(
    outcome: Outcome,
    failures: int,
    losses: int,
    max_failures: int,
    max_losses: int,
    retryable: bool,
    cancel_requested: bool,
    *,
    loss_charged: bool,
) -> Fate:
    """Returns what becomes of a waiting job when the true end of its last attempt comes in late.

    The loss that was charged when the lease expired is taken back before the
    true outcome is applied. The other arguments are those of :func:`fate`.

    Args:
        loss_charged: The attempt was recorded as LOST; False: as WITHDRAWN, which cost nothing.
    """
    refunded = max(0, losses - 1) if loss_charged else losses
    return fate(outcome, failures, refunded, max_failures, max_losses, retryable, cancel_requested)


def backoff(failures: int, initial: timedelta, maximum: timedelta, jitter: float) -> timedelta:
    """Returns how long a job waits after its ``failures``-th failure.

    That is ``initial`` doubled with each failure after the first, at most
    ``maximum``, then spread by :data:`~lessor.timing.BACKOFF_JITTER` (so up to a
    fifth above ``maximum``). Never overflows, never negative.

    Args:
        failures: Failures so far; less than 1 counts as 1.
        initial: Wait after the first failure, >= 0.
        maximum: The longest wait before jitter, >= 0.
        jitter: Random, from -1 (shortest) to 1 (longest).
    """
    doublings = min(max(failures - 1, 0), _MAX_DOUBLINGS)
    wait_us = min(maximum // _MICROSECOND, (initial // _MICROSECOND) << doublings)
    spread_us = round(wait_us * (1 + BACKOFF_JITTER * jitter))
    return timedelta(microseconds=min(max(spread_us, 0), timedelta.max // _MICROSECOND))


def rejection_delay(attempt: int) -> timedelta:
    """Returns how long a job is kept back whose ``attempt``-th offer was refused: 1 s, 2 s, 4 s, … at most a minute."""
    # Six doublings are past the maximum; more could overflow.
    return min(REJECTED_DELAY_MAX, REJECTED_DELAY * (1 << min(max(attempt - 1, 0), 6)))


def requeue_delay(end: Fate, attempt: int, initial: timedelta, maximum: timedelta, jitter: float) -> timedelta:
    """Returns how long a job that waits again is kept back; zero: not at all.

    See :func:`backoff` and :func:`rejection_delay`; ``attempt`` is the number of the one that ended.
    """
    if end.backoff:
        return backoff(end.failures, initial, maximum, jitter)
    return rejection_delay(attempt) if end.delay else _AT_ONCE


def exhausted_budget(outcome: Outcome, failures: int, losses: int, max_failures: int, max_losses: int) -> Budget | None:
    """Returns which budget a final attempt exhausted, from the counts that stand after it; None: neither."""
    if outcome in (Outcome.FAILED, Outcome.TIMED_OUT) and failures >= max(max_failures, 1):
        return Budget.MAX_FAILURES
    if outcome is Outcome.LOST and losses >= max(max_losses, 1):
        return Budget.MAX_LOSSES
    return None


def exhausted_message(end: Fate, max_failures: int) -> str:
    """Returns which budget is exhausted, with its numbers; empty when none is."""
    match end.exhausted:
        case Budget.MAX_FAILURES:
            # A limit of 0 acts as 1, and "1 of 0" would read as a mistake.
            return f"failed {end.failures} of {max(max_failures, 1)} times (max_failures)"
        case Budget.MAX_LOSSES:
            times = "once" if end.losses == 1 else f"{end.losses} times"
            return f"lost {times} (max_losses)"
        case None:
            return ""
    assert_never(end.exhausted)
