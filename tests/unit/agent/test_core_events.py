"""The core's durable events: which are superseded before they are sent, and how they are put into messages."""

from __future__ import annotations

from datetime import timedelta

import pytest

from lessor.lifecycle import LeasePhase, Outcome
from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import job_pb2
from lessor_agent.protocol import actions as act
from lessor_agent.protocol.core import Restored
from lessor_agent.protocol.events import MAX_MESSAGE_BYTES, MAX_MESSAGE_EVENTS, RESEND_AFTER_NS, EventLog
from lessor_agent.protocol.lease import Fate, RestoredLease
from lessor_agent.protocol.outcomes import Ending
from tests.support.agent_core import BEGIN, SECOND_NS, CoreDriver, a_grant, an_exit, connected, keep

pytestmark = pytest.mark.unit


def start(drive: CoreDriver, lease_id: int = 1) -> None:
    """Grants a lease and brings it to where its workload runs, in a burst."""
    drive.grant(lease_id)
    drive.work()
    drive.prepared(lease_id)
    drive.work()
    drive.running(lease_id)


# ── what an end supersedes ───────────────────────────────────────────────────


def test_an_end_supersedes_what_was_not_sent_before_it() -> None:
    drive = connected()
    with drive.burst():
        start(drive)
        drive.work()
        drive.ended(1)
        drive.work()
    assert drive.events() == ["ended"]
    assert drive.core.unacked_events == 1
    drive.ack_events()
    assert drive.held() == []
    assert drive.core.unacked_events == 0


def test_what_is_superseded_leaves_the_journal() -> None:
    drive = connected()
    with drive.burst():
        start(drive)
        drive.work()
        drive.ended(1)
        drive.work()
    drive.ack_events()
    drive.advance(5 * SECOND_NS)
    entries = [entry for journal in drive.of(act.Journal) for entry in journal.entries]
    put = {entry.seq for entry in entries if isinstance(entry, act.PutEvent)}
    dropped = {seq for entry in entries if isinstance(entry, act.DropEvents) for seq in entry.seqs}
    assert len(put) == 3
    assert dropped == put


def test_a_workload_that_ends_in_the_burst_it_began_in_is_journalled_as_ended_only() -> None:
    drive = connected()
    with drive.burst():
        start(drive)
        drive.ended(1)
        drive.work()
    journalled = [entry for journal in drive.of(act.Journal) for entry in journal.entries]
    assert [entry.phase for entry in journalled if isinstance(entry, act.PutPhase)] == [
        LeasePhase.ACCEPTED,
        LeasePhase.DRAINING,
    ]
    assert len([entry for entry in journalled if isinstance(entry, act.PutEvent)]) == 2
    assert drive.events() == ["ended"]


def test_running_supersedes_an_acceptance_that_was_not_sent() -> None:
    drive = connected()
    with drive.burst():
        start(drive)
        drive.work()
    assert drive.events() == ["running"]


def test_what_was_sent_stays_until_it_is_acked() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.ACCEPTED)
    with drive.burst():
        drive.running(1)
        drive.work()
        drive.ended(1)
        drive.work()
    assert drive.events() == ["accepted", "ended"]
    drive.clear()
    drive.reconnect(keep(1))
    assert drive.events() == ["accepted", "ended"]


def test_an_end_that_is_not_journalled_yet_supersedes_nothing() -> None:
    drive = connected()
    with drive.burst():
        start(drive)
        drive.work()
        drive.commits = False
        drive.ended(1)
    assert drive.events() == ["running"]
    drive.commit()
    assert drive.events() == ["running", "ended"]


def test_an_end_that_the_journal_cannot_take_supersedes_nothing() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.OFFERED)
    drive.lose()
    drive.prepared(1)
    drive.running(1)
    drive.commits = False
    drive.ended(1)
    drive.fail_journal()
    drive.commits = True
    drive.clear()
    drive.reconnect(keep(1))
    # Running had superseded the acceptance: that one the journal has.
    assert drive.events() == ["running", "ended"]


def test_of_a_job_that_ends_while_the_stream_is_down_only_the_end_is_told() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.OFFERED)
    drive.lose()
    drive.prepared(1)
    drive.running(1)
    drive.ended(1)
    drive.clear()
    drive.reconnect(keep(1))
    assert drive.events() == ["ended"]


def test_what_an_earlier_agent_may_have_sent_is_sent_again() -> None:
    lease = RestoredLease(a_grant(1), LeasePhase.ACCEPTED, Fate.FOUND)
    accepted = pb.LeaseEvent(seq=7, job_id="job-1", lease_id=1, accepted=pb.Accepted())
    drive = CoreDriver(Restored((lease,), (accepted,), last_seq=7))
    drive.do(drive.core.start(drive.now_ns))
    drive.ended(1, an_exit(0))
    drive.connect(keep(1), start=False)
    assert drive.events() == ["accepted", "ended"]
    assert drive.seen_events[0] == accepted


def test_a_checkpoint_is_never_superseded() -> None:
    drive = connected()
    with drive.burst():
        start(drive)
        drive.do(drive.core.checkpoint(1, "step-1", drive.now_ns))
        drive.work()
        drive.ended(1)
        drive.work()
    assert drive.events() == ["checkpoint_saved", "ended"]


def test_a_checkpoint_in_the_burst_of_the_begin_comes_after_it() -> None:
    drive = connected()
    with drive.burst():
        start(drive)
        drive.do(drive.core.checkpoint(1, "step-1", drive.now_ns))
        drive.work()
    assert drive.events() == ["running", "checkpoint_saved"]


@pytest.mark.parametrize("exit_known", [True, False])
def test_the_end_says_when_the_workload_began(exit_known: bool) -> None:
    drive = connected()
    with drive.burst():
        start(drive)
        ending = Ending(an_exit(0) if exit_known else None)
        drive.do(drive.core.ended(1, ending, drive.now_ns))
        drive.work()
    ended = drive.last_event().ended
    assert ended.start_time.ToDatetime(tzinfo=BEGIN.tzinfo) == BEGIN
    assert Outcome(ended.outcome) is (Outcome.SUCCEEDED if exit_known else Outcome.LOST)


def test_an_end_before_the_begin_says_no_time_of_one() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.ACCEPTED)
    drive.do(drive.core.ended(1, Ending(None), drive.now_ns))
    assert not drive.last_event().ended.HasField("start_time")


def test_a_repeated_grant_in_the_burst_of_the_begin_is_answered_once() -> None:
    drive = connected()
    with drive.burst():
        start(drive)
        drive.grant(1)
        drive.work()
    assert drive.events() == ["running"]


# ── the log of events ────────────────────────────────────────────────────────


def an_event(lease_id: int, **what: object) -> pb.LeaseEvent:
    return pb.LeaseEvent(job_id=f"job-{lease_id}", lease_id=lease_id, **what)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["ended", "rejected", "released"])
def test_every_final_event_supersedes(kind: str) -> None:
    events = EventLog(0)
    accepted = events.add(an_event(1, accepted=pb.Accepted()), "accepted")
    other = events.add(an_event(2, accepted=pb.Accepted()), "accepted")
    events.commit([accepted, other], supersede=True)
    message = {"ended": pb.Ended(), "rejected": pb.Rejected(), "released": pb.Released()}[kind]
    final = events.add(an_event(1, **{kind: message}), kind)
    assert events.commit([final], supersede=True) == [accepted.seq]
    assert [event.seq for message in events.take_due(0) for event in message.lease_events.events] == [2, 3]
    assert events.of_lease(1) == (final,)


def test_messages_are_what_was_put_in_and_in_order() -> None:
    events = EventLog(0)
    told = []
    for lease_id in range(1, MAX_MESSAGE_EVENTS + 500):
        ended = pb.Ended(outcome=job_pb2.OUTCOME_FAILED, exit_code=1, result_json=b"x" * (lease_id % 300))
        told.append(an_event(lease_id, ended=ended))
        events.commit([events.add(told[-1], "ended")], supersede=True)
    messages = list(events.take_due(0))
    assert [len(message.lease_events.events) for message in messages] == [MAX_MESSAGE_EVENTS, 499]
    assert [event for message in messages for event in message.lease_events.events] == told
    assert list(events.take_due(1)) == []


def test_a_message_stays_below_its_size() -> None:
    events = EventLog(0)
    for lease_id in range(1, 11):
        event = an_event(lease_id, ended=pb.Ended(result_json=b"x" * (MAX_MESSAGE_BYTES // 4)))
        events.commit([events.add(event, "ended")], supersede=True)
    sizes = [len(message.lease_events.events) for message in events.take_due(0)]
    assert sizes == [3, 3, 3, 1]


def test_only_what_is_not_acked_is_sent_again_and_in_order() -> None:
    events = EventLog(0)
    kept = [events.add(an_event(lease_id, ended=pb.Ended()), "ended") for lease_id in range(1, 6)]
    events.commit(kept[3:], supersede=True)
    assert [e.seq for m in events.take_due(0) for e in m.lease_events.events] == [4, 5]
    events.commit(kept[:3], supersede=True)
    assert [e.seq for m in events.take_due(SECOND_NS) for e in m.lease_events.events] == [1, 2, 3]
    events.remove(4)
    events.remove(2)
    assert events.resend_ns == RESEND_AFTER_NS
    assert list(events.take_due(RESEND_AFTER_NS - 1)) == []
    assert [e.seq for m in events.take_due(RESEND_AFTER_NS) for e in m.lease_events.events] == [5]
    assert events.resend_ns == SECOND_NS + RESEND_AFTER_NS
    again_ns = SECOND_NS + RESEND_AFTER_NS + int(timedelta(seconds=1).total_seconds())
    assert [e.seq for m in events.take_due(again_ns) for e in m.lease_events.events] == [1, 3]
    for seq in (1, 3, 5):
        events.remove(seq)
    assert events.resend_ns is None
    assert len(events) == 0
