"""The core's answer to every revoke, in every phase: stops, expired offers, leases asked for, ghosts."""

from __future__ import annotations

from datetime import timedelta

import pytest

from lessor.lifecycle import LeasePhase, Outcome
from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import job_pb2
from lessor_agent.protocol import actions as act
from lessor_agent.protocol.core import Restored
from lessor_agent.protocol.lease import Fate, RestoredLease
from lessor_agent.runtimes.base import StopCause
from tests.support.agent_core import SECOND_NS, CoreDriver, a_grant, an_exit, connected, its_end_is_known, keep, stale

pytestmark = pytest.mark.unit

LIVE = [LeasePhase.ACCEPTED, LeasePhase.RUNNING]
STOPS = [
    (pb.REVOKE_REASON_CANCELLED, StopCause.CANCELLED, Outcome.CANCELLED),
    (pb.REVOKE_REASON_START_TIMEOUT, StopCause.START_TIMEOUT, Outcome.TIMED_OUT),
]


@pytest.mark.parametrize(("reason", "cause", "outcome"), STOPS)
@pytest.mark.parametrize("phase", LIVE)
def test_a_stop_is_answered_by_ended(
    reason: pb.RevokeReason.ValueType, cause: StopCause, outcome: Outcome, phase: LeasePhase
) -> None:
    drive = connected()
    drive.bring(1, phase)
    drive.clear()
    drive.revoke(1, reason)
    assert drive.of(act.Stop) == [act.Stop(1, cause, None)]
    drive.ended(1, an_exit(None, signal=15, cause=cause))
    assert drive.events() == ["ended"]
    assert Outcome(drive.last_event().ended.outcome) is outcome


@pytest.mark.parametrize(("reason", "cause", "outcome"), STOPS)
def test_a_stop_while_preparing_waits_for_the_keeper(
    reason: pb.RevokeReason.ValueType, cause: StopCause, outcome: Outcome
) -> None:
    drive = connected()
    drive.bring(1, LeasePhase.OFFERED)
    drive.clear()
    drive.revoke(1, reason)
    assert drive.of(act.Stop) == []
    drive.prepared(1)
    assert drive.of(act.Stop) == [act.Stop(1, cause, None)]
    assert drive.of(act.Begin) == []
    drive.ended(1, an_exit(None, cause=cause))
    assert drive.events() == ["ended"]
    assert Outcome(drive.last_event().ended.outcome) is outcome


@pytest.mark.parametrize(("reason", "cause", "outcome"), STOPS)
def test_a_stop_before_the_intent_is_journalled_prepares_nothing(
    reason: pb.RevokeReason.ValueType, cause: StopCause, outcome: Outcome
) -> None:
    drive = connected()
    drive.commits = False
    drive.grant(1)
    drive.revoke(1, reason)
    drive.commit()
    assert drive.of(act.Prepare) == []
    assert drive.events() == ["ended"]
    assert Outcome(drive.last_event().ended.outcome) is outcome


def test_a_stop_while_the_handle_is_journalled_is_accepted_and_never_begun() -> None:
    drive = connected()
    drive.grant(1)
    drive.commits = False
    drive.prepared(1)
    drive.revoke(1, pb.REVOKE_REASON_CANCELLED)
    drive.commit()
    assert drive.of(act.Begin) == []
    drive.ended(1, an_exit(None, cause=StopCause.CANCELLED))
    drive.commit()
    assert drive.events() == ["accepted", "ended"]


def test_a_stop_after_the_end_repeats_the_end() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.DRAINING)
    drive.clear()
    drive.revoke(1, pb.REVOKE_REASON_CANCELLED)
    assert drive.of(act.Stop) == []
    assert "ended" in drive.events()


def test_a_revoke_carries_its_own_grace() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.RUNNING)
    revoke = pb.Revoke(job_id="job-1", lease_id=1, reason=pb.REVOKE_REASON_CANCELLED)
    revoke.grace.FromTimedelta(timedelta(seconds=3))
    drive.say(pb.ConnectResponse(revokes=pb.Revokes(epoch=1, revokes=[revoke])))
    assert drive.of(act.Stop) == [act.Stop(1, StopCause.CANCELLED, timedelta(seconds=3))]


def test_a_job_that_exits_zero_within_the_grace_has_succeeded() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.RUNNING)
    drive.revoke(1, pb.REVOKE_REASON_CANCELLED)
    drive.ended(1, an_exit(0, cause=StopCause.CANCELLED))
    assert Outcome(drive.last_event().ended.outcome) is Outcome.SUCCEEDED


def test_an_expired_offer_in_preparation_is_ended_and_released() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.OFFERED)
    drive.clear()
    drive.revoke(1, pb.REVOKE_REASON_OFFER_EXPIRED)
    drive.prepared(1)
    assert drive.of(act.Stop) == [act.Stop(1, StopCause.STALE, None)]
    assert drive.events() == []
    drive.ended(1, an_exit(None, cause=StopCause.STALE))
    assert drive.events() == ["released"]
    assert drive.of(act.Forget) == [act.Forget(1)]
    drive.clear()
    drive.grant(1)
    assert drive.of(act.Prepare) == []


def test_an_expired_offer_that_cannot_be_prepared_is_released() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.OFFERED)
    drive.revoke(1, pb.REVOKE_REASON_OFFER_EXPIRED)
    drive.do(drive.core.prepare_refused(1, job_pb2.JobError(type="X"), drive.now_ns))
    assert drive.events() == ["released"]


def test_an_expired_offer_before_its_intent_is_journalled_is_released() -> None:
    drive = connected()
    drive.commits = False
    drive.grant(1)
    drive.revoke(1, pb.REVOKE_REASON_OFFER_EXPIRED)
    drive.commit()
    assert drive.of(act.Prepare) == []
    assert drive.events() == ["released"]


@pytest.mark.parametrize("reason", [pb.REVOKE_REASON_OFFER_EXPIRED, pb.REVOKE_REASON_NOT_LISTED])
@pytest.mark.parametrize(
    ("phase", "state"),
    [(LeasePhase.ACCEPTED, "accepted"), (LeasePhase.RUNNING, "running"), (LeasePhase.DRAINING, "ended")],
)
@pytest.mark.parametrize("acked", [False, True])
def test_what_goes_on_is_said_again(
    reason: pb.RevokeReason.ValueType, phase: LeasePhase, state: str, acked: bool
) -> None:
    drive = connected()
    drive.bring(1, phase)
    if acked and phase is not LeasePhase.DRAINING:
        drive.ack_events()
    drive.clear()
    drive.revoke(1, reason)
    assert drive.events()[-1] == state
    assert drive.of(act.Stop) == []
    assert drive.held() == [1]


def test_a_lease_asked_for_while_its_handle_is_journalled_is_accepted() -> None:
    drive = connected()
    drive.grant(1)
    drive.commits = False
    drive.prepared(1)
    drive.revoke(1, pb.REVOKE_REASON_OFFER_EXPIRED)
    drive.commit()
    assert drive.events() == ["accepted"]
    assert drive.of(act.Begin) == [act.Begin(1)]


@pytest.mark.parametrize(
    "reason",
    [
        pb.REVOKE_REASON_NOT_LISTED,
        pb.REVOKE_REASON_OFFER_EXPIRED,
        pb.REVOKE_REASON_CANCELLED,
        pb.REVOKE_REASON_START_TIMEOUT,
    ],
)
def test_what_is_not_held_is_released_once_its_tombstone_is_journalled(reason: pb.RevokeReason.ValueType) -> None:
    drive = connected()
    drive.commits = False
    drive.clear()
    drive.revoke(9, reason)
    assert drive.events() == []
    assert act.DropLease(9) in drive.of(act.Journal)[0].entries
    drive.commit()
    assert drive.events() == ["released"]
    drive.revoke(9, reason)
    drive.commit()
    assert drive.events() == ["released", "released"]
    assert drive.core.unacked_events == 1


def test_a_rejected_lease_that_is_asked_for_is_rejected_again_not_released() -> None:
    drive = connected()
    drive.say(pb.ConnectResponse(grants=pb.Grants(epoch=1, grants=[a_grant(1, runtime="slurm")])))
    drive.clear()
    drive.revoke(1, pb.REVOKE_REASON_NOT_LISTED)
    assert drive.events() == ["rejected"]


@pytest.mark.parametrize("phase", [LeasePhase.ACCEPTED, LeasePhase.RUNNING])
@pytest.mark.parametrize("by_answer", [False, True])
def test_a_stale_lease_is_stopped_and_forgotten_and_nothing_is_told(phase: LeasePhase, by_answer: bool) -> None:
    drive = connected()
    drive.bring(1, phase)
    drive.clear()
    if by_answer:
        drive.reconnect(stale(1))
    else:
        drive.revoke(1, pb.REVOKE_REASON_STALE)
    assert drive.of(act.Stop) == [act.Stop(1, StopCause.STALE, None)]
    assert drive.held() == [1]
    drive.ended(1, an_exit(None, signal=9, cause=StopCause.STALE))
    assert drive.events() == []
    assert drive.held() == []
    assert drive.of(act.Forget) == [act.Forget(1)]
    assert drive.core.unacked_events == 0


def test_a_stale_lease_is_not_renewed_while_it_is_being_stopped() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.RUNNING)
    drive.revoke(1, pb.REVOKE_REASON_STALE)
    drive.advance(5 * SECOND_NS)
    drive.clear()
    drive.ack(heartbeat=1)
    assert drive.of(act.Renew) == []


def test_a_stale_lease_in_preparation_is_ended_once_it_stands() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.OFFERED)
    drive.revoke(1, pb.REVOKE_REASON_STALE)
    drive.prepared(1)
    assert drive.of(act.Stop) == [act.Stop(1, StopCause.STALE, None)]
    assert drive.of(act.Begin) == []
    drive.ended(1, an_exit(None, cause=StopCause.STALE))
    assert drive.held() == []
    assert drive.events() == []


def test_a_stale_lease_whose_intent_is_not_journalled_is_forgotten() -> None:
    drive = connected()
    drive.commits = False
    drive.grant(1)
    drive.revoke(1, pb.REVOKE_REASON_STALE)
    drive.commit()
    assert drive.of(act.Prepare) == []
    assert drive.held() == []


def test_a_stale_lease_that_has_ended_is_spoken_of_once_more_and_then_forgotten() -> None:
    """Whoever said so may not have known: its job may wait, and would be run again."""
    drive = connected()
    drive.bring(1, LeasePhase.DRAINING)
    drive.clear()
    drive.revoke(1, pb.REVOKE_REASON_STALE)
    (hello,) = drive.sent("hello")
    assert [(lease.lease_id, LeasePhase(lease.phase)) for lease in hello.hello.leases] == [(1, LeasePhase.DRAINING)]
    drive.clear()
    drive.welcome(stale(1))
    assert drive.sent("hello") == []
    assert drive.held() == []
    assert drive.of(act.Stop) == []
    assert drive.core.unacked_events == 0


def test_an_end_that_hello_told_of_is_over_when_the_server_says_so() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.DRAINING)
    drive.reconnect(keep(1))
    drive.clear()
    drive.revoke(1, pb.REVOKE_REASON_STALE)
    assert (drive.sent("hello"), drive.held()) == ([], [])


@pytest.mark.parametrize("waits", [True, False], ids=["job_waits", "job_is_taken"])
def test_a_job_that_ends_while_hello_is_under_way_is_told_of_with_the_next(waits: bool) -> None:
    drive = connected()
    drive.bring(1, LeasePhase.RUNNING)
    drive.bring(2, LeasePhase.RUNNING)
    drive.lose()
    drive.advance(10 * SECOND_NS)
    drive.do(drive.core.stream_opened(drive.stream_id, drive.now_ns))
    drive.ended(1, an_exit(0))
    drive.clear()
    drive.welcome(stale(1), keep(2))
    (hello,) = drive.sent("hello")
    phases = [LeasePhase(lease.phase) for lease in hello.hello.leases]
    assert phases == [LeasePhase.DRAINING, LeasePhase.RUNNING]
    assert drive.events() == [], "nothing is said before that Hello is answered"
    drive.clear()
    drive.welcome(keep(1) if waits else stale(1), keep(2))
    assert drive.sent("hello") == []
    assert drive.events(1) == (["accepted", "running", "ended"] if waits else [])
    assert drive.held() == ([1, 2] if waits else [2])


def test_a_stale_word_about_a_lease_not_held_drops_what_is_owed() -> None:
    drive = connected()
    drive.revoke(5, pb.REVOKE_REASON_NOT_LISTED)
    drive.revoke(5, pb.REVOKE_REASON_STALE)
    assert drive.core.unacked_events == 0
    drive.clear()
    drive.grant(5)
    assert drive.of(act.Prepare) == []


def test_an_end_known_to_the_server_while_the_work_runs_here_makes_it_stale() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.RUNNING)
    drive.reconnect(its_end_is_known(1))
    assert drive.of(act.Stop) == [act.Stop(1, StopCause.STALE, None)]


def test_of_an_undecided_lease_nothing_is_said_before_nothing_of_it_runs() -> None:
    drive = CoreDriver(Restored(undecided=(1,)))
    drive.connect()
    drive.clear()
    drive.revoke(1, pb.REVOKE_REASON_NOT_LISTED)
    drive.grant(1)
    assert drive.events() == []
    assert drive.of(act.Prepare) == []
    drive.do(drive.core.decided(1, drive.now_ns))
    assert drive.events() == ["released"]


@pytest.mark.parametrize("reason", [None, pb.REVOKE_REASON_STALE])
def test_an_undecided_lease_nobody_asks_for_is_not_answered(reason: pb.RevokeReason.ValueType | None) -> None:
    drive = CoreDriver(Restored(undecided=(1,)))
    drive.connect()
    drive.clear()
    if reason is not None:
        drive.revoke(1, reason)
    drive.do(drive.core.decided(1, drive.now_ns))
    assert drive.events() == []


def test_an_intended_lease_of_which_something_runs_is_given_back_when_it_has_ended() -> None:
    drive = CoreDriver(Restored((RestoredLease(a_grant(1), LeasePhase.OFFERED, Fate.NEVER_PREPARED),), undecided=(1,)))
    drive.connect()
    assert drive.events() == []
    drive.do(drive.core.decided(1, drive.now_ns))
    assert drive.events() == ["released"]
