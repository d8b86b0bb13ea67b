"""The core's connection: Hello, heartbeats, deadlines, epochs, retries."""

from __future__ import annotations

from datetime import timedelta

import pytest

from lessor.lifecycle import LeasePhase
from lessor.v1 import agent_service_pb2 as pb
from lessor_agent.protocol import actions as act
from lessor_agent.protocol.core import ASK_AGAIN_NS
from lessor_agent.protocol.session import WELCOME_TIMEOUT_NS, Link
from tests.support.agent_core import MS_NS, SECOND_NS, CoreDriver, an_exit, connected, its_end_is_known, keep, stale

pytestmark = pytest.mark.unit


def test_the_first_hello_begins_a_new_session() -> None:
    drive = CoreDriver()
    drive.connect()
    hello = drive.sent("hello")[0].hello
    assert (hello.session_id, hello.agent_id, list(hello.leases)) == (0, "agent-0001", [])
    assert hello.heartbeat_interval.seconds == 5
    assert drive.core.link is Link.UP


def test_a_later_hello_resumes_the_session_and_lists_everything_held() -> None:
    drive = CoreDriver()
    drive.connect()
    drive.bring(1, LeasePhase.OFFERED)
    drive.bring(2, LeasePhase.ACCEPTED)
    drive.bring(3, LeasePhase.RUNNING)
    drive.bring(4, LeasePhase.DRAINING)
    drive.clear()
    drive.reconnect(keep(1), keep(2), keep(3), keep(4))
    hello = drive.sent("hello")[0].hello
    assert hello.session_id == 77
    assert [(lease.lease_id, lease.phase) for lease in hello.leases] == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_nothing_of_the_old_stream_is_heard_once_it_is_lost() -> None:
    drive = CoreDriver()
    drive.connect()
    old = drive.stream_id
    drive.lose()
    drive.advance(10 * SECOND_NS)
    drive.do(drive.core.stream_opened(drive.stream_id, drive.now_ns))
    drive.say(pb.ConnectResponse(grants=pb.Grants(epoch=9, grants=[pb.Grant(lease_id=5)])), stream_id=old)
    drive.say(pb.ConnectResponse(welcome=pb.Welcome(session_id=1, epoch=9)), stream_id=old)
    drive.do(drive.core.stream_opened(old, drive.now_ns))
    assert drive.core.link is Link.GREETING
    assert drive.held() == []


def test_a_loss_of_an_older_stream_changes_nothing() -> None:
    drive = CoreDriver()
    drive.connect()
    old = drive.stream_id
    drive.reconnect()
    drive.stream_id, new = old, drive.stream_id
    drive.lose()
    assert drive.core.link is Link.UP
    assert new != old


HELLO_REQUESTED = pb.ConnectResponse(hello_requested=pb.HelloRequested(reason="epoch moved"))


def asked_for_hello() -> tuple[CoreDriver, int]:
    """A job runs, and a Hello that was asked for has been under way for 8 s; returns when it was sent, too."""
    drive = connected()
    drive.bring(1, LeasePhase.RUNNING)
    drive.advance(10 * SECOND_NS)
    drive.clear()
    sent_ns = drive.now_ns
    drive.say(HELLO_REQUESTED)
    drive.now_ns += 8 * SECOND_NS
    return drive, sent_ns


def test_no_second_hello_is_sent_before_the_first_is_answered() -> None:
    """Its Welcome would be taken for the answer to the second, and counted from when that was sent."""
    drive, sent_ns = asked_for_hello()
    drive.ended(1, an_exit(0))
    drive.say(HELLO_REQUESTED)
    assert len(drive.sent("hello")) == 1
    assert drive.core.next_wakeup_ns() == sent_ns + WELCOME_TIMEOUT_NS
    drive.clear()
    drive.welcome(stale(1))
    (hello,) = drive.sent("hello")
    assert LeasePhase(hello.hello.leases[0].phase) is LeasePhase.DRAINING, "the end is not dropped"


def test_a_renewal_counts_from_the_hello_that_was_answered() -> None:
    drive, sent_ns = asked_for_hello()
    drive.say(HELLO_REQUESTED)
    drive.welcome(keep(1))
    lease = drive.core.leases.get(1)
    assert lease is not None
    assert [action.deadline_ns for action in drive.of(act.Renew)] == [lease.deadline_ns(sent_ns)]


def test_a_lease_the_server_left_unanswered_is_asked_for_again() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.RUNNING)
    drive.reconnect()
    drive.clear()
    asked_ns = drive.now_ns
    while not drive.sent("hello"):
        drive.advance(SECOND_NS)
        beats = drive.sent("heartbeat")
        drive.ack(heartbeat=beats[-1].heartbeat.seq if beats else 0)
        assert drive.now_ns - asked_ns <= 2 * ASK_AGAIN_NS
    drive.clear()
    drive.welcome(keep(1))
    assert [action.lease_id for action in drive.of(act.Renew)] == [1]


def test_hello_requested_is_answered_on_the_same_stream_and_old_messages_are_ignored() -> None:
    drive = CoreDriver()
    drive.connect()
    drive.bring(1, LeasePhase.RUNNING)
    drive.advance(5 * SECOND_NS)
    stream = drive.stream_id
    drive.clear()
    drive.say(HELLO_REQUESTED)
    assert len(drive.sent("hello")) == 1
    drive.ack(heartbeat=1)
    drive.grant(2)
    drive.advance(6 * SECOND_NS)
    assert drive.stream_id == stream
    assert drive.of(act.Renew) == []
    assert drive.sent("heartbeat") == []
    assert drive.held() == [1]
    drive.welcome(keep(1))
    assert [renew.lease_id for renew in drive.of(act.Renew)] == [1]
    # An ack of a heartbeat sent before that Hello counts for nothing, even now.
    drive.clear()
    drive.ack(heartbeat=1)
    assert drive.of(act.Renew) == []


@pytest.mark.parametrize(("offset_ns", "beats"), [(-1, 0), (0, 1)])
def test_a_heartbeat_goes_out_at_its_interval_and_not_before(offset_ns: int, beats: int) -> None:
    drive = CoreDriver()
    drive.connect()
    drive.advance(5 * SECOND_NS + offset_ns)
    assert len(drive.sent("heartbeat")) == beats


def test_heartbeats_overtake_everything_and_list_the_held_leases_and_the_gpus() -> None:
    drive = CoreDriver()
    drive.connect()
    drive.bring(7, LeasePhase.RUNNING)
    drive.core.gpu_readings([pb.GpuReading(uuid="GPU-1", utilization_percent=50)])
    drive.advance(5 * SECOND_NS)
    [send] = [each for each in drive.of(act.Send) if each.message.HasField("heartbeat")]
    assert send.urgent
    assert send.message.heartbeat.seq == 1
    assert list(send.message.heartbeat.lease_ids) == [7]
    assert send.message.heartbeat.gpus[0].uuid == "GPU-1"


def test_a_heartbeat_waits_for_no_journal() -> None:
    drive = CoreDriver()
    drive.connect()
    drive.commits = False
    drive.grant(1)
    drive.advance(5 * SECOND_NS)
    assert len(drive.sent("heartbeat")) == 1


def test_an_ack_moves_the_deadline_to_the_send_time_plus_ttl_minus_margin() -> None:
    drive = CoreDriver()
    drive.connect()
    drive.bring(1, LeasePhase.RUNNING)
    drive.advance(5 * SECOND_NS)
    sent_ns = drive.now_ns
    drive.clear()
    drive.now_ns += 3 * SECOND_NS
    drive.ack(heartbeat=1)
    assert drive.of(act.Renew) == [act.Renew(1, sent_ns + 58 * SECOND_NS)]


def test_a_new_grant_counts_from_the_last_acked_send_time_not_from_its_arrival() -> None:
    drive = CoreDriver()
    drive.connect()
    hello_ns = drive.now_ns
    drive.now_ns += 4 * SECOND_NS
    drive.grant(1)
    assert drive.of(act.Prepare)[0].deadline_ns == hello_ns + 58 * SECOND_NS


def test_a_heartbeat_that_is_not_acked_renews_nothing() -> None:
    drive = CoreDriver()
    drive.connect()
    drive.bring(1, LeasePhase.RUNNING)
    drive.clear()
    drive.advance(5 * SECOND_NS)
    drive.ack(heartbeat=99)
    assert drive.of(act.Renew) == []


def test_acks_that_come_out_of_order_never_move_a_deadline_back() -> None:
    drive = CoreDriver()
    drive.connect()
    drive.bring(1, LeasePhase.RUNNING)
    drive.advance(5 * SECOND_NS)
    drive.advance(5 * SECOND_NS)
    drive.ack(heartbeat=2)
    drive.clear()
    drive.ack(heartbeat=1)
    assert drive.of(act.Renew) == []


def test_a_welcome_counts_hellos_send_time_for_kept_leases_only() -> None:
    drive = CoreDriver()
    drive.connect()
    for lease_id in (1, 2, 3):
        drive.bring(lease_id, LeasePhase.RUNNING)
    drive.lose()
    drive.advance(10 * SECOND_NS)
    drive.do(drive.core.stream_opened(drive.stream_id, drive.now_ns))
    hello_ns = drive.now_ns
    drive.now_ns += SECOND_NS
    drive.clear()
    # 1 stands, 2 is over, about 3 the server says nothing.
    drive.welcome(keep(1), stale(2))
    assert drive.of(act.Renew) == [act.Renew(1, hello_ns + 58 * SECOND_NS)]
    drive.advance(5 * SECOND_NS)
    drive.clear()
    drive.ack(heartbeat=1)
    assert [renew.lease_id for renew in drive.of(act.Renew)] == [1]


@pytest.mark.parametrize(("epoch", "held"), [(1, []), (2, [5]), (3, [5])])
def test_grants_of_an_older_epoch_are_refused(epoch: int, held: list[int]) -> None:
    drive = CoreDriver()
    drive.connect()
    drive.reconnect()
    drive.grant(5, epoch=epoch)
    assert drive.held() == held


def test_revokes_of_an_older_epoch_are_refused() -> None:
    drive = CoreDriver()
    drive.connect()
    drive.bring(1, LeasePhase.RUNNING)
    drive.reconnect(keep(1))
    drive.clear()
    drive.revoke(1, pb.REVOKE_REASON_STALE, epoch=1)
    assert drive.of(act.Stop) == []


@pytest.mark.parametrize(("offset_ns", "dropped"), [(-1, False), (0, True)])
def test_a_hello_that_is_not_answered_in_ten_seconds_is_given_up(offset_ns: int, dropped: bool) -> None:
    drive = CoreDriver()
    drive.do(drive.core.start(drive.now_ns))
    drive.do(drive.core.stream_opened(drive.stream_id, drive.now_ns))
    drive.advance(10 * SECOND_NS + offset_ns)
    assert bool(drive.of(act.CloseStream)) is dropped


@pytest.mark.parametrize(("offset_ns", "dropped"), [(-1, False), (0, True)])
def test_a_server_that_acks_no_heartbeat_is_left(offset_ns: int, dropped: bool) -> None:
    drive = CoreDriver()
    drive.connect()
    drive.advance(5 * SECOND_NS)
    drive.advance(5 * SECOND_NS)
    drive.advance(5 * SECOND_NS + offset_ns)
    assert bool(drive.of(act.CloseStream)) is dropped


def test_a_server_that_acks_heartbeats_is_kept() -> None:
    drive = CoreDriver()
    drive.connect()
    for seq in range(1, 20):
        drive.advance(5 * SECOND_NS)
        drive.ack(heartbeat=seq)
    assert drive.of(act.CloseStream) == []


def test_the_backoff_doubles_up_to_five_seconds_and_begins_again_after_a_welcome() -> None:
    drive = CoreDriver(random=lambda: 0.999999)
    drive.connect()
    delays = []
    for _ in range(9):
        drive.lose()
        wakeup_ns = drive.core.next_wakeup_ns()
        assert wakeup_ns is not None
        delays.append(round((wakeup_ns - drive.now_ns) / MS_NS))
        drive.advance(wakeup_ns - drive.now_ns)
    assert delays == [100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]
    drive.do(drive.core.stream_opened(drive.stream_id, drive.now_ns))
    drive.welcome()
    drive.lose()
    assert (drive.core.next_wakeup_ns() or 0) - drive.now_ns <= 100 * MS_NS


def test_no_stream_is_opened_before_the_backoff_is_over() -> None:
    drive = CoreDriver()
    drive.connect()
    drive.lose()
    drive.clear()
    drive.advance(50 * MS_NS - 1)
    assert drive.of(act.OpenStream) == []
    drive.advance(1)
    assert len(drive.of(act.OpenStream)) == 1


def test_reconnect_closes_the_stream_and_opens_another_soon_with_all_leases() -> None:
    drive = CoreDriver()
    drive.connect()
    drive.bring(1, LeasePhase.RUNNING)
    drive.clear()
    drive.say(pb.ConnectResponse(reconnect=pb.Reconnect(reason="stopping")))
    assert len(drive.of(act.CloseStream)) == 1
    drive.advance(200 * MS_NS)
    assert len(drive.of(act.OpenStream)) == 1
    drive.do(drive.core.stream_opened(drive.stream_id, drive.now_ns))
    assert [lease.lease_id for lease in drive.sent("hello")[-1].hello.leases] == [1]
    assert drive.of(act.Stop) == []


def test_an_unsupported_protocol_ends_an_agent_that_holds_nothing() -> None:
    drive = CoreDriver()
    drive.do(drive.core.start(drive.now_ns))
    drive.do(drive.core.stream_opened(drive.stream_id, drive.now_ns))
    drive.lose("PROTOCOL_UNSUPPORTED")
    assert len(drive.of(act.GiveUp)) == 1
    assert drive.core.next_wakeup_ns() is None


def test_an_unsupported_protocol_is_tried_again_slowly_while_leases_are_held() -> None:
    drive = CoreDriver()
    drive.connect()
    drive.bring(1, LeasePhase.RUNNING)
    drive.lose("PROTOCOL_UNSUPPORTED")
    assert drive.of(act.GiveUp) == []
    assert 15 * SECOND_NS <= (drive.core.next_wakeup_ns() or 0) - drive.now_ns <= 30 * SECOND_NS


def test_an_identity_in_use_is_tried_again_slowly() -> None:
    drive = CoreDriver()
    drive.do(drive.core.start(drive.now_ns))
    drive.lose("AGENT_IDENTITY_IN_USE")
    assert drive.of(act.GiveUp) == []
    assert (drive.core.next_wakeup_ns() or 0) - drive.now_ns >= 15 * SECOND_NS


def test_shutdown_says_goodbye_closes_and_stops_nothing() -> None:
    drive = CoreDriver()
    drive.connect()
    drive.bring(1, LeasePhase.RUNNING)
    drive.clear()
    drive.do(drive.core.shutdown("SIGTERM", drive.now_ns))
    assert drive.sent("goodbye")[0].goodbye.reason == "SIGTERM"
    assert len(drive.of(act.CloseStream)) == 1
    assert drive.of(act.Stop) == []
    drive.advance(100 * SECOND_NS)
    assert drive.of(act.OpenStream) == []


def test_a_suspended_host_leaves_the_stream_instead_of_trusting_it() -> None:
    drive = CoreDriver()
    drive.connect()
    drive.advance(3600 * SECOND_NS)
    assert len(drive.of(act.CloseStream)) == 1
    assert drive.sent("heartbeat") == []


def test_the_wakeup_is_the_next_thing_due() -> None:
    drive = CoreDriver(heartbeat=timedelta(milliseconds=500))
    drive.connect()
    assert drive.core.next_wakeup_ns() == drive.now_ns + 500 * MS_NS


def test_a_lease_whose_end_is_known_is_told_no_more() -> None:
    drive = CoreDriver()
    drive.connect()
    drive.bring(1, LeasePhase.DRAINING)
    drive.clear()
    drive.reconnect(its_end_is_known(1))
    assert drive.events(1) == []
    assert drive.held() == []
    assert drive.of(act.Forget) == [act.Forget(1)]
