"""The core's leases: start order, repeats, checkpoints, restarts."""

from __future__ import annotations

import pytest

from lessor.lifecycle import LeasePhase, Outcome
from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import job_pb2
from lessor_agent.protocol import actions as act
from lessor_agent.protocol.core import Restored
from lessor_agent.protocol.lease import Fate, RestoredLease
from lessor_agent.runtimes.base import StopCause
from tests.support.agent_core import (
    SECOND_NS,
    CoreDriver,
    a_grant,
    an_exit,
    connected,
    its_end_is_known,
    keep,
    log_position,
    stale,
)

pytestmark = pytest.mark.unit

LIVE = [LeasePhase.ACCEPTED, LeasePhase.RUNNING]


def kinds(drive: CoreDriver) -> list[str]:
    """Names of the actions that matter for the order of a start."""
    return [
        type(action).__name__
        for action in drive.actions
        if isinstance(action, act.Journal | act.Prepare | act.Begin | act.Forget)
    ] + drive.events()


# ── starting ─────────────────────────────────────────────────────────────────


def test_each_step_of_a_start_waits_for_the_one_before() -> None:
    drive = connected()
    drive.commits = False
    drive.clear()
    drive.grant(1)
    assert kinds(drive) == ["Journal"]
    assert isinstance(drive.of(act.Journal)[0].entries[0], act.PutLease)
    drive.clear()
    drive.commit()
    assert kinds(drive) == ["Prepare"]
    drive.clear()
    drive.prepared(1)
    assert kinds(drive) == ["Journal"]
    assert [type(entry).__name__ for entry in drive.of(act.Journal)[0].entries] == ["PutHandle", "PutPhase", "PutEvent"]
    drive.clear()
    drive.commit()
    assert kinds(drive) == ["Begin", "accepted"]
    drive.clear()
    drive.running(1)
    assert drive.events() == []
    drive.commit()
    assert drive.events() == ["running"]


def test_an_unknown_runtime_is_rejected_at_once() -> None:
    drive = connected()
    drive.say(pb.ConnectResponse(grants=pb.Grants(epoch=1, grants=[a_grant(1, runtime="slurm")])))
    assert drive.events() == ["rejected"]
    assert "slurm" in drive.last_event().rejected.error.message
    assert drive.held() == []
    assert drive.of(act.Prepare) == []


def test_work_of_an_unknown_kind_is_rejected() -> None:
    drive = connected()
    grant = a_grant(1)
    grant.spec.ClearField("command")
    drive.say(pb.ConnectResponse(grants=pb.Grants(epoch=1, grants=[grant])))
    assert drive.events() == ["rejected"]


def test_a_refused_start_is_rejected_with_the_reason() -> None:
    drive = connected()
    drive.grant(1)
    error = job_pb2.JobError(type="START_REFUSED", message="no user nobody2")
    drive.do(drive.core.prepare_refused(1, error, drive.now_ns))
    assert drive.events() == ["rejected"]
    assert drive.last_event().rejected.error.message == "no user nobody2"
    assert drive.held() == []


def test_without_a_journal_a_grant_is_rejected_and_nothing_is_prepared() -> None:
    drive = connected()
    drive.commits = False
    drive.grant(1)
    drive.fail_journal()
    drive.fail_journal()
    assert drive.events() == ["rejected"]
    assert drive.last_event().rejected.error.type == "JOURNAL_UNAVAILABLE"
    assert drive.of(act.Prepare) == []
    drive.clear()
    drive.commits = True
    drive.grant(1)
    assert drive.of(act.Prepare) == []


def test_without_its_handle_in_the_journal_a_lease_does_not_begin() -> None:
    drive = connected()
    drive.grant(1)
    drive.commits = False
    drive.prepared(1)
    drive.fail_journal()
    assert drive.of(act.Begin) == []
    assert drive.of(act.Stop) == [act.Stop(1, StopCause.STALE, None)]
    assert drive.events() == []
    drive.ended(1, an_exit(None))
    drive.fail_journal()
    assert drive.events() == ["rejected"]


def test_an_end_is_told_even_when_the_journal_cannot_take_it() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.RUNNING)
    drive.commits = False
    drive.ended(1)
    drive.fail_journal()
    assert drive.events()[-1] == "ended"


# ── the same again ───────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("phase", "answer"),
    [
        (LeasePhase.OFFERED, []),
        (LeasePhase.ACCEPTED, ["accepted"]),
        (LeasePhase.RUNNING, ["running"]),
        (LeasePhase.DRAINING, ["ended"]),
    ],
)
@pytest.mark.parametrize("acked", [False, True])
def test_a_grant_held_already_is_answered_again_and_started_once(
    phase: LeasePhase, answer: list[str], acked: bool
) -> None:
    drive = connected()
    drive.bring(1, phase)
    if phase is LeasePhase.DRAINING:
        drive.do(drive.core.log_available(1, 0, 0, drive.now_ns))
    elif acked:
        drive.ack_events()
    drive.clear()
    drive.grant(1)
    assert drive.events()[-1:] == answer
    assert drive.of(act.Prepare) == []
    assert drive.of(act.Begin) == []


def test_a_grant_that_was_released_is_released_again() -> None:
    drive = connected()
    drive.revoke(1, pb.REVOKE_REASON_NOT_LISTED)
    drive.ack_events()
    drive.clear()
    drive.grant(1)
    assert drive.events() == ["released"]
    assert drive.held() == []
    assert drive.of(act.Prepare) == []


def test_a_grant_of_a_lease_that_is_over_and_forgotten_never_starts_again() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.DRAINING)
    drive.ack_events()
    assert drive.held() == []
    drive.clear()
    drive.grant(1)
    assert drive.of(act.Prepare) == []
    assert drive.events() == ["released"]


def test_events_are_sent_again_in_order_after_each_welcome_until_they_are_acked() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.RUNNING)
    drive.ended(1)
    first = [event.seq for event in drive.seen_events]
    drive.clear()
    drive.reconnect(keep(1))
    assert drive.events() == ["accepted", "running", "ended"]
    drive.ack(seqs=first[:2])
    drive.clear()
    drive.reconnect(keep(1))
    assert drive.events() == ["ended"]
    drive.ack(seqs=first[2:])
    drive.clear()
    drive.reconnect()
    assert drive.events() == []


def test_events_wait_for_the_welcome() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.RUNNING)
    drive.lose()
    drive.clear()
    drive.ended(1)
    drive.advance(10 * SECOND_NS)
    drive.do(drive.core.stream_opened(drive.stream_id, drive.now_ns))
    assert drive.events() == []
    drive.welcome(keep(1))
    assert drive.events() == ["accepted", "running", "ended"]


@pytest.mark.parametrize(("offset_ns", "again"), [(-1, []), (0, ["accepted", "running"])])
def test_an_event_that_is_not_acked_is_sent_again_after_a_while(offset_ns: int, again: list[str]) -> None:
    drive = connected()
    drive.bring(1, LeasePhase.RUNNING)
    for seq in (1, 2, 3):
        drive.now_ns += 4 * SECOND_NS
        drive.do(drive.core.tick(drive.now_ns))
        drive.advance(SECOND_NS if seq < 3 else SECOND_NS - 1)
        drive.ack(heartbeat=seq)
    drive.clear()
    drive.advance(1 + offset_ns)
    assert drive.events() == again


# ── forgetting ───────────────────────────────────────────────────────────────


def test_an_ended_lease_is_forgotten_after_its_row_is_gone() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.DRAINING)
    drive.commits = False
    drive.clear()
    drive.ack_events()
    assert drive.of(act.Forget) == []
    assert act.DropLease(1) in drive.of(act.Journal)[0].entries
    drive.commit()
    assert drive.of(act.Forget) == [act.Forget(1)]


def test_acked_events_leave_the_journal_with_the_next_heartbeat() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.RUNNING)
    drive.clear()
    seqs = tuple(event.seq for event in drive.seen_events)
    drive.ack_events()
    assert drive.of(act.Journal) == []
    drive.advance(5 * SECOND_NS)
    assert [journal.entries for journal in drive.of(act.Journal)] == [(act.DropEvents(seqs),)]


# ── checkpoints and progress ─────────────────────────────────────────────────


def test_checkpoints_coalesce_while_one_is_on_its_way_to_the_journal() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.RUNNING)
    drive.commits = False
    drive.clear()
    for step in range(10):
        drive.do(drive.core.checkpoint(1, f"step-{step}", drive.now_ns))
    drive.commit()
    cursors = [event.checkpoint_saved.cursor for event in drive.seen_events if event.HasField("checkpoint_saved")]
    assert cursors == ["step-0", "step-9"]


def test_only_the_newest_unsent_checkpoint_survives_an_outage() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.RUNNING)
    drive.ack_events()
    drive.lose()
    for step in range(5):
        drive.do(drive.core.checkpoint(1, f"step-{step}", drive.now_ns))
    drive.clear()
    drive.advance(10 * SECOND_NS)
    drive.do(drive.core.stream_opened(drive.stream_id, drive.now_ns))
    drive.welcome(keep(1))
    assert drive.events() == ["checkpoint_saved"]
    assert drive.last_event().checkpoint_saved.cursor == "step-4"


def test_the_last_checkpoint_goes_before_the_end() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.RUNNING)
    drive.commits = False
    drive.clear()
    drive.do(drive.core.checkpoint(1, "one", drive.now_ns))
    drive.do(drive.core.checkpoint(1, "two", drive.now_ns))
    drive.ended(1)
    drive.commit()
    assert drive.events() == ["checkpoint_saved", "checkpoint_saved", "ended"]
    assert drive.seen_events[-2].checkpoint_saved.cursor == "two"


def test_progress_is_sent_at_once_and_then_at_most_every_hundred_milliseconds() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.RUNNING)
    drive.clear()

    def progress(fraction: float) -> None:
        drive.do(drive.core.progress(1, job_pb2.Progress(fraction=fraction), drive.now_ns))

    def fractions() -> list[float]:
        return [message.progress.updates[0].progress.fraction for message in drive.sent("progress")]

    progress(0.1)
    assert fractions() == [0.1]
    progress(0.2)
    progress(0.3)
    assert drive.core.next_wakeup_ns() == drive.now_ns + 100_000_000
    drive.advance(99_999_999)
    assert fractions() == [0.1]
    drive.advance(1)
    assert fractions() == [0.1, 0.3]


def test_the_last_progress_goes_before_the_end() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.RUNNING)
    drive.do(drive.core.progress(1, job_pb2.Progress(fraction=0.5), drive.now_ns))
    drive.do(drive.core.progress(1, job_pb2.Progress(fraction=1.0), drive.now_ns))
    drive.clear()
    drive.ended(1)
    fields = [send.message.WhichOneof("message") for send in drive.of(act.Send)]
    assert fields == ["progress", "lease_events"]


# ── restarts ─────────────────────────────────────────────────────────────────


def restored(phase: LeasePhase, fate: Fate, *events: pb.LeaseEvent, last_seq: int = 10) -> CoreDriver:
    lease = RestoredLease(a_grant(1), phase, fate)
    return CoreDriver(Restored(leases=(lease,), events=events, tombstones=(3,), last_seq=last_seq))


def test_a_running_job_that_was_found_is_listed_and_goes_on() -> None:
    drive = restored(LeasePhase.RUNNING, Fate.FOUND)
    drive.do(drive.core.start(drive.now_ns))
    drive.do(drive.core.stream_opened(drive.stream_id, drive.now_ns))
    assert drive.of(act.Renew) == []
    hello = drive.sent("hello")[0].hello
    assert (hello.session_id, [(lease.lease_id, lease.phase) for lease in hello.leases]) == (0, [(1, 3)])
    hello_ns = drive.now_ns
    drive.welcome(keep(1))
    assert drive.of(act.Renew) == [act.Renew(1, hello_ns + 58 * SECOND_NS)]
    assert drive.of(act.Begin) == []


def test_an_accepted_lease_begins_only_once_the_server_has_confirmed_it() -> None:
    drive = restored(LeasePhase.ACCEPTED, Fate.FOUND)
    drive.do(drive.core.start(drive.now_ns))
    drive.do(drive.core.stream_opened(drive.stream_id, drive.now_ns))
    assert drive.of(act.Begin) == []
    drive.welcome(keep(1))
    assert drive.of(act.Begin) == [act.Begin(1)]
    drive.reconnect(keep(1))
    assert drive.of(act.Begin) == [act.Begin(1)]


def test_an_accepted_lease_that_is_over_is_ended_without_having_begun() -> None:
    drive = restored(LeasePhase.ACCEPTED, Fate.FOUND)
    drive.connect(stale(1))
    assert drive.of(act.Begin) == []
    assert drive.of(act.Stop) == [act.Stop(1, StopCause.STALE, None)]


@pytest.mark.parametrize(("fate", "type_"), [(Fate.VANISHED, "KEEPER_DIED"), (Fate.REBOOTED, "HOST_REBOOTED")])
@pytest.mark.parametrize("phase", LIVE)
def test_a_job_of_which_nothing_is_left_is_lost(fate: Fate, type_: str, phase: LeasePhase) -> None:
    drive = restored(phase, fate)
    drive.connect(keep(1))
    ended = drive.last_event().ended
    assert (Outcome(ended.outcome), ended.error.type) == (Outcome.LOST, type_)


def test_an_intent_without_a_handle_is_released_and_never_started() -> None:
    drive = restored(LeasePhase.OFFERED, Fate.NEVER_PREPARED)
    drive.connect()
    assert drive.events() == ["released"]
    assert list(drive.sent("hello")[0].hello.leases) == []
    drive.clear()
    drive.grant(1)
    assert drive.of(act.Prepare) == []


def test_a_tombstone_outlives_a_restart() -> None:
    drive = restored(LeasePhase.RUNNING, Fate.FOUND)
    drive.connect(keep(1))
    drive.grant(3)
    assert drive.of(act.Prepare) == []
    assert drive.events()[-1] == "released"


def test_an_end_that_is_owed_is_repeated_as_it_was_journalled() -> None:
    owed = pb.LeaseEvent(seq=7, job_id="job-1", lease_id=1, ended=pb.Ended(outcome=job_pb2.OUTCOME_FAILED))
    drive = restored(LeasePhase.DRAINING, Fate.FOUND, owed)
    drive.connect(keep(1))
    drive.ended(1, an_exit(0))
    assert drive.events() == ["ended"]
    assert drive.last_event() == owed


@pytest.mark.parametrize("found_first", [True, False])
def test_an_acked_end_has_only_its_log_finished_after_a_restart(found_first: bool) -> None:
    drive = restored(LeasePhase.DRAINING, Fate.FOUND)
    drive.do(drive.core.start(drive.now_ns))
    if found_first:
        drive.ended(1, stdout=100)
    drive.connect(its_end_is_known(1, stdout=40), start=False)
    if not found_first:
        drive.ended(1, stdout=100)
    assert [log.file_offset for log in drive.of(act.SendLog)] == [40]
    assert drive.of(act.Stop) == []
    drive.ack(logs=[log_position(1, stdout=100)])
    assert drive.held() == []
    assert drive.events() == []


@pytest.mark.parametrize("found_first", [True, False])
def test_an_acked_end_that_the_server_has_lost_is_told_again(found_first: bool) -> None:
    drive = restored(LeasePhase.DRAINING, Fate.FOUND)
    drive.do(drive.core.start(drive.now_ns))
    if found_first:
        drive.ended(1, stdout=10)
    drive.connect(keep(1), start=False)
    if not found_first:
        drive.ended(1, stdout=10)
    assert drive.events() == ["ended"]
    drive.ack_events()
    drive.ack(logs=[log_position(1, stdout=10)])
    assert drive.held() == []


def test_an_acked_end_whose_files_are_gone_is_forgotten() -> None:
    drive = restored(LeasePhase.DRAINING, Fate.VANISHED)
    drive.connect()
    assert list(drive.sent("hello")[0].hello.leases) == []


def test_new_events_are_numbered_after_the_journals() -> None:
    drive = restored(LeasePhase.RUNNING, Fate.FOUND, last_seq=41)
    drive.connect(keep(1))
    drive.ended(1)
    assert drive.last_event().seq == 42


def test_an_end_whose_files_are_gone_is_told_and_then_forgotten() -> None:
    owed = pb.LeaseEvent(
        seq=7, job_id="job-1", lease_id=1, ended=pb.Ended(outcome=job_pb2.OUTCOME_FAILED, final_log_offset=100)
    )
    drive = restored(LeasePhase.DRAINING, Fate.VANISHED, owed)
    drive.connect(keep(1, stdout=10))
    assert drive.held() == [1]
    drive.ack(seqs=[7])
    assert drive.held() == []
