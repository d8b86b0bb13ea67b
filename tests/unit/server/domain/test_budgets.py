"""What becomes of a job when a lease ends: the whole table, and the waits."""

from __future__ import annotations

from datetime import timedelta
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lessor.lifecycle import Outcome
from lessor_server.domain.budgets import (
    REJECTED_DELAY,
    Budget,
    Fate,
    backoff,
    exhausted_message,
    fate,
    late_fate,
    rejection_delay,
    requeue_delay,
)
from lessor_server.domain.states import TERMINAL, JobState

S = timedelta(seconds=1)
COUNTS = range(4)
ALL = list(product(Outcome, COUNTS, COUNTS, COUNTS, COUNTS, (False, True), (False, True)))


def test_every_combination_keeps_the_rules() -> None:
    for outcome, failures, losses, max_failures, max_losses, retryable, cancel_requested in ALL:
        end = fate(outcome, failures, losses, max_failures, max_losses, retryable, cancel_requested)
        case = (outcome, failures, losses, max_failures, max_losses, retryable, cancel_requested, end)
        assert end.final is None or end.final in TERMINAL, case
        if outcome is Outcome.SUCCEEDED:
            assert end == Fate(JobState.SUCCEEDED, failures, losses), case
        elif cancel_requested or outcome is Outcome.CANCELLED:
            assert end == Fate(JobState.CANCELLED, failures, losses), case
        elif outcome in (Outcome.FAILED, Outcome.TIMED_OUT):
            assert (end.failures, end.losses) == (failures + 1, losses), case
            over = failures + 1 >= max_failures
            assert end.final is (JobState.FAILED if over or not retryable else None), case
            assert end.exhausted is (Budget.MAX_FAILURES if over else None), case
            assert (end.backoff, end.delay) == (end.final is None, timedelta(0)), case
        elif outcome is Outcome.LOST:
            assert (end.failures, end.losses) == (failures, losses + 1), case
            over = losses + 1 >= max_losses
            assert end.final is (JobState.FAILED if over else None), case
            assert end.exhausted is (Budget.MAX_LOSSES if over else None), case
            assert (end.backoff, end.delay) == (False, timedelta(0)), case
        else:
            delay = REJECTED_DELAY if outcome is Outcome.REJECTED else timedelta(0)
            assert end == Fate(None, failures, losses, delay=delay), case


@pytest.mark.parametrize("limit", [0, 1])
def test_limits_of_zero_and_one_make_the_first_final(limit: int) -> None:
    failed = fate(Outcome.FAILED, 0, 0, limit, 10, True, False)
    assert (failed.final, failed.exhausted) == (JobState.FAILED, Budget.MAX_FAILURES)
    lost = fate(Outcome.LOST, 0, 0, 10, limit, True, False)
    assert (lost.final, lost.exhausted) == (JobState.FAILED, Budget.MAX_LOSSES)


def test_losses_never_consume_the_failure_budget() -> None:
    failures = losses = 0
    for _ in range(9):
        end = fate(Outcome.LOST, failures, losses, 1, 10, True, False)
        failures, losses = end.failures, end.losses
        assert end.final is None
    assert (failures, losses) == (0, 9)
    assert fate(Outcome.LOST, failures, losses, 1, 10, True, False).exhausted is Budget.MAX_LOSSES


def test_a_failure_no_retry_can_help_names_no_budget() -> None:
    end = fate(Outcome.FAILED, 0, 0, 5, 10, retryable=False, cancel_requested=False)
    assert end == Fate(JobState.FAILED, 1, 0)
    assert exhausted_message(end, 5) == ""


@pytest.mark.parametrize(
    ("end", "max_failures", "message"),
    [
        (fate(Outcome.FAILED, 2, 0, 3, 10, True, False), 3, "failed 3 of 3 times (max_failures)"),
        (fate(Outcome.TIMED_OUT, 0, 0, 0, 10, True, False), 0, "failed 1 of 1 times (max_failures)"),
        (fate(Outcome.LOST, 0, 9, 1, 10, True, False), 1, "lost 10 times (max_losses)"),
        (fate(Outcome.LOST, 0, 0, 1, 0, True, False), 1, "lost once (max_losses)"),
        (fate(Outcome.SUCCEEDED, 0, 0, 1, 1, True, False), 1, ""),
    ],
)
def test_the_message_names_the_budget_and_its_numbers(end: Fate, max_failures: int, message: str) -> None:
    assert exhausted_message(end, max_failures) == message


def test_a_late_end_takes_the_loss_back() -> None:
    def late(outcome: Outcome, *, losses: int, loss_charged: bool = True) -> Fate:
        return late_fate(outcome, 0, losses, 2, 3, True, False, loss_charged=loss_charged)

    assert late(Outcome.SUCCEEDED, losses=2) == Fate(JobState.SUCCEEDED, 0, 1)
    assert late(Outcome.FAILED, losses=2) == Fate(None, 1, 1, backoff=True)
    assert late(Outcome.LOST, losses=2) == Fate(None, 0, 2)
    assert late(Outcome.SUCCEEDED, losses=2, loss_charged=False) == Fate(JobState.SUCCEEDED, 0, 2)
    assert late(Outcome.SUCCEEDED, losses=0) == Fate(JobState.SUCCEEDED, 0, 0)


def test_backoff_doubles_up_to_its_maximum() -> None:
    waits = [backoff(failures, S, 300 * S, 0) for failures in range(0, 12)]
    assert waits == [1 * S, 1 * S, 2 * S, 4 * S, 8 * S, 16 * S, 32 * S, 64 * S, 128 * S, 256 * S, 300 * S, 300 * S]


def test_jitter_is_a_fifth_both_ways() -> None:
    assert backoff(1, 10 * S, 300 * S, -1) == 8 * S
    assert backoff(1, 10 * S, 300 * S, 1) == 12 * S
    assert backoff(99, 10 * S, 300 * S, 1) == 360 * S


@given(
    failures=st.integers(min_value=-1, max_value=10**12),
    initial=st.timedeltas(min_value=timedelta(0), max_value=timedelta.max),
    maximum=st.timedeltas(min_value=timedelta(0), max_value=timedelta.max),
    jitter=st.floats(min_value=-1, max_value=1),
)
def test_backoff_never_overflows(failures: int, initial: timedelta, maximum: timedelta, jitter: float) -> None:
    wait = backoff(failures, initial, maximum, jitter)
    wait_s, maximum_s = wait.total_seconds(), maximum.total_seconds()
    # A float holds a wait of a thousand years to some microseconds only.
    assert 0 <= wait_s <= maximum_s * 1.2 * (1 + 1e-12) + 1e-6
    if initial and failures > 100:
        assert wait_s >= min(maximum_s, 86_400) * 0.8 - 1e-6


@pytest.mark.parametrize(
    ("outcome", "wait"),
    [(Outcome.FAILED, 4 * S), (Outcome.REJECTED, S), (Outcome.LOST, 0 * S), (Outcome.PREEMPTED, 0 * S)],
)
def test_a_job_waits_by_what_happened_to_it(outcome: Outcome, wait: timedelta) -> None:
    end = fate(outcome, 1, 0, 5, 5, True, False)
    assert requeue_delay(end, 1, 2 * S, 300 * S, 0) == wait


@pytest.mark.parametrize(("attempt", "wait"), [(0, S), (1, S), (2, 2 * S), (6, 32 * S), (7, 60 * S), (10_000, 60 * S)])
def test_a_refused_job_waits_longer_each_time(attempt: int, wait: timedelta) -> None:
    assert rejection_delay(attempt) == wait
