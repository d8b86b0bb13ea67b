"""The keeper's decisions, on both sides of every deadline."""

from __future__ import annotations

import pytest

from lessor_agent.keeper import verdict
from lessor_agent.keeper.record import EXPIRED
from lessor_agent.keeper.verdict import GATHER_AHEAD_NS, KILL_SLACK_NS, Step, Verdict, judge
from lessor_agent.runtimes.base import OnLost, StopCause

S = 1_000_000_000
DEADLINE = 100 * S
GRACE = 10 * S
LIMIT = DEADLINE - KILL_SLACK_NS


def at(
    now_ns: int, *, run_until_ns: int | None = None, kill_at_ns: int | None = None, grace_ns: int = GRACE
) -> Verdict:
    return judge(
        now_ns=now_ns, deadline_ns=DEADLINE, grace_ns=grace_ns, run_until_ns=run_until_ns, kill_at_ns=kill_at_ns
    )


def test_causes_are_those_of_the_interface() -> None:
    assert verdict.LEASE_LOST == StopCause.LEASE_LOST
    assert verdict.RUN_TIMEOUT == StopCause.RUN_TIMEOUT
    assert {verdict.FREEZE, verdict.STOP, verdict.CONTINUE} == set(OnLost)


@pytest.mark.parametrize(
    ("now_ns", "step"),
    [(0, Step.WAIT), (LIMIT - GRACE - 1, Step.WAIT), (LIMIT - GRACE, Step.STOP), (LIMIT - 1, Step.STOP)],
)
def test_the_stop_begins_grace_and_slack_before_the_deadline(now_ns: int, step: Step) -> None:
    result = at(now_ns)
    assert result.step is step
    assert result.kill_at_ns == LIMIT
    if step is Step.WAIT:
        assert (result.cause, result.wake_at_ns) == (None, LIMIT - GRACE)
    else:
        assert (result.cause, result.wake_at_ns) == ("lease_lost", LIMIT)


@pytest.mark.parametrize("now_ns", [LIMIT, DEADLINE, DEADLINE + 1, DEADLINE + 1000 * S])
def test_too_late_for_a_grace_kills_at_once(now_ns: int) -> None:
    assert (at(now_ns).step, at(now_ns).cause) == (Step.KILL, "lease_lost")


def test_a_record_that_is_not_to_be_trusted_kills_at_once() -> None:
    result = judge(now_ns=1, deadline_ns=EXPIRED, grace_ns=GRACE, run_until_ns=None, kill_at_ns=None)
    assert (result.step, result.cause) == (Step.KILL, "lease_lost")
    assert judge(now_ns=1, deadline_ns=EXPIRED, grace_ns=0, run_until_ns=None, kill_at_ns=50 * S).step is Step.KILL


@pytest.mark.parametrize(("now_ns", "step"), [(50 * S - 1, Step.WAIT), (50 * S, Step.STOP)])
def test_run_timeout(now_ns: int, step: Step) -> None:
    result = at(now_ns, run_until_ns=50 * S)
    assert result.step is step
    if step is Step.STOP:
        assert (result.cause, result.kill_at_ns) == ("run_timeout", 60 * S)
    else:
        assert result.wake_at_ns == 50 * S


def test_the_grace_of_a_run_timeout_ends_at_the_lease() -> None:
    result = at(LIMIT - GRACE - 1, run_until_ns=LIMIT - GRACE - 1)
    assert (result.step, result.cause, result.kill_at_ns) == (Step.STOP, "run_timeout", LIMIT - 1)
    result = judge(now_ns=50 * S, deadline_ns=55 * S, grace_ns=GRACE, run_until_ns=44 * S, kill_at_ns=None)
    assert (result.cause, result.kill_at_ns) == ("run_timeout", 55 * S - KILL_SLACK_NS)


@pytest.mark.parametrize(
    ("run_until_ns", "cause"),
    [
        (LIMIT - GRACE - 1, "run_timeout"),
        (LIMIT - GRACE, "run_timeout"),
        (LIMIT - GRACE + 1, "lease_lost"),
    ],
)
def test_of_two_that_are_due_the_earlier_is_the_cause(run_until_ns: int, cause: str) -> None:
    assert at(LIMIT - 1, run_until_ns=run_until_ns).cause == cause


def test_without_grace_a_stop_is_a_kill() -> None:
    assert at(50 * S, run_until_ns=50 * S, grace_ns=0).step is Step.KILL
    assert at(LIMIT - 1, grace_ns=0).step is Step.WAIT
    assert at(LIMIT, grace_ns=0).step is Step.KILL


@pytest.mark.parametrize(("now_ns", "step"), [(30 * S - 1, Step.WAIT), (30 * S, Step.KILL)])
def test_a_stop_under_way_kills_when_its_grace_is_over(now_ns: int, step: Step) -> None:
    result = at(now_ns, kill_at_ns=30 * S)
    assert (result.step, result.cause, result.wake_at_ns) == (step, None, 30 * S)


@pytest.mark.parametrize(("now_ns", "step"), [(LIMIT - 1, Step.WAIT), (LIMIT, Step.KILL)])
def test_a_stop_under_way_never_outlasts_the_lease(now_ns: int, step: Step) -> None:
    assert at(now_ns, kill_at_ns=DEADLINE + 60 * S).step is step


def test_a_run_timeout_during_a_stop_changes_nothing() -> None:
    assert at(20 * S, run_until_ns=10 * S, kill_at_ns=30 * S).step is Step.WAIT


def freezing(
    now_ns: int,
    *,
    frozen: bool = False,
    gathered: bool = True,
    run_until_ns: int | None = None,
    kill_at_ns: int | None = None,
    deadline_ns: int = DEADLINE,
) -> Verdict:
    return judge(
        now_ns=now_ns, deadline_ns=deadline_ns, grace_ns=GRACE, run_until_ns=run_until_ns, kill_at_ns=kill_at_ns,
        on_lost="freeze", frozen=frozen, gathered=gathered,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("now_ns", "step"),
    [
        (0, Step.WAIT), (LIMIT - GRACE, Step.WAIT), (LIMIT - 1, Step.WAIT),
        (LIMIT, Step.FREEZE), (DEADLINE, Step.FREEZE), (DEADLINE + 1000 * S, Step.FREEZE),
    ],
)  # fmt: skip
def test_the_freeze_is_at_the_slack_before_the_deadline_and_needs_no_grace(now_ns: int, step: Step) -> None:
    result = freezing(now_ns)
    assert (result.step, result.cause) == (step, None)
    if step is Step.WAIT:
        assert result.wake_at_ns == LIMIT


@pytest.mark.parametrize(
    ("now_ns", "step"),
    [(LIMIT - GATHER_AHEAD_NS - 1, Step.WAIT), (LIMIT - GATHER_AHEAD_NS, Step.GATHER), (LIMIT, Step.FREEZE)],
)
def test_a_tree_is_gathered_ahead_of_its_freeze_and_not_instead_of_it(now_ns: int, step: Step) -> None:
    result = freezing(now_ns, gathered=False)
    assert result.step is step
    if step is Step.WAIT:
        assert result.wake_at_ns == LIMIT - GATHER_AHEAD_NS


@pytest.mark.parametrize(("now_ns", "step"), [(LIMIT - 1, Step.THAW), (LIMIT, Step.WAIT), (DEADLINE + S, Step.WAIT)])
def test_what_stands_still_goes_on_only_under_a_deadline_in_the_future(now_ns: int, step: Step) -> None:
    assert freezing(now_ns, frozen=True).step is step


@pytest.mark.parametrize("now_ns", [LIMIT, DEADLINE + S])
def test_a_stop_of_what_stands_still_kills(now_ns: int) -> None:
    assert freezing(now_ns, frozen=True, kill_at_ns=now_ns + GRACE).step is Step.KILL


@pytest.mark.parametrize(("now_ns", "step"), [(LIMIT - 1, Step.WAIT), (LIMIT, Step.KILL)])
def test_what_is_asked_to_stop_before_the_deadline_is_killed_at_it_and_not_frozen(now_ns: int, step: Step) -> None:
    assert freezing(now_ns, kill_at_ns=DEADLINE + GRACE).step is step


def test_a_run_timeout_of_what_stands_still_kills_unless_it_may_go_on() -> None:
    result = freezing(DEADLINE + 5 * S, frozen=True, run_until_ns=DEADLINE + 5 * S)
    assert (result.step, result.cause) == (Step.KILL, "run_timeout")
    assert freezing(DEADLINE + 5 * S - 1, frozen=True, run_until_ns=DEADLINE + 5 * S).wake_at_ns == DEADLINE + 5 * S
    # Renewed meanwhile: it goes on first, so that it can hear that it is to stop.
    assert freezing(50 * S, frozen=True, run_until_ns=40 * S).step is Step.THAW
    result = freezing(50 * S, run_until_ns=40 * S)
    assert (result.step, result.cause, result.kill_at_ns) == (Step.STOP, "run_timeout", 60 * S)


def test_the_run_timeout_of_a_tree_that_would_be_frozen_as_well_ends_it() -> None:
    result = freezing(LIMIT, run_until_ns=LIMIT)
    assert (result.step, result.cause) == (Step.KILL, "run_timeout")
    assert freezing(LIMIT - 1, run_until_ns=LIMIT - 1).step is Step.STOP


@pytest.mark.parametrize("frozen", [False, True])
def test_a_record_that_nobody_can_renew_is_no_reason_to_wait(frozen: bool) -> None:
    result = freezing(5 * S, deadline_ns=EXPIRED, frozen=frozen)
    assert (result.step, result.cause) == (Step.KILL, "lease_lost")


@pytest.mark.parametrize("now_ns", [0, LIMIT - GRACE, LIMIT, DEADLINE + 1000 * S])
def test_what_is_to_continue_does(now_ns: int) -> None:
    def judged(**asked: int | None) -> Verdict:
        given: dict[str, int | None] = {"run_until_ns": None, "kill_at_ns": None, **asked}
        return judge(now_ns=now_ns, deadline_ns=DEADLINE, grace_ns=GRACE, on_lost="continue", **given)  # type: ignore[arg-type]

    assert judged().step is Step.WAIT
    result = judged(run_until_ns=now_ns)
    assert (result.step, result.cause, result.kill_at_ns) == (Step.STOP, "run_timeout", now_ns + GRACE)
    assert judged(kill_at_ns=now_ns + 1).step is Step.WAIT
    assert judged(kill_at_ns=now_ns).step is Step.KILL


@pytest.mark.parametrize("word", ["", "something newer"])
def test_a_word_that_is_none_of_the_three_stops(word: str) -> None:
    result = judge(
        now_ns=LIMIT - GRACE, deadline_ns=DEADLINE, grace_ns=GRACE, run_until_ns=None, kill_at_ns=None, on_lost=word
    )
    assert (result.step, result.cause) == (Step.STOP, "lease_lost")
