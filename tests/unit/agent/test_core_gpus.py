"""GPUs of a lease that is over, and the next lease that is to have them."""

from __future__ import annotations

import pytest

from lessor.lifecycle import LeasePhase, Outcome
from lessor.v1 import agent_service_pb2 as pb
from lessor_agent.protocol import actions as act
from lessor_agent.protocol.core import Restored
from lessor_agent.protocol.lease import Fate, RestoredLease
from lessor_agent.runtimes.base import StopCause
from tests.support.agent_core import SECOND_NS, CoreDriver, a_grant, an_exit, connected, keep, stale


def grant(drive: CoreDriver, lease_id: int, *gpus: str) -> None:
    made = a_grant(lease_id)
    made.gpu_uuids.extend(gpus)
    drive.say(pb.ConnectResponse(grants=pb.Grants(epoch=drive.epoch, grants=[made])))


def running_on(*gpus: str) -> CoreDriver:
    """Lease 1 runs on these GPUs; then its stream is lost, and at the next one the server says it is over."""
    drive = connected()
    grant(drive, 1, *gpus)
    drive.prepared(1)
    drive.running(1)
    drive.reconnect(stale(1))
    assert drive.of(act.Stop) == [act.Stop(1, StopCause.STALE, None)]
    drive.clear()
    return drive


def prepares(drive: CoreDriver) -> list[int]:
    return [action.lease_id for action in drive.of(act.Prepare)]


def test_a_lease_waits_until_a_stale_one_has_left_its_gpus() -> None:
    drive = running_on("g1", "g2")
    grant(drive, 2, "g2", "g3")
    grant(drive, 3, "g4")
    grant(drive, 4)
    assert prepares(drive) == [3, 4]
    drive.ended(1, an_exit(None, signal=9, cause=StopCause.STALE))
    assert prepares(drive) == [3, 4, 2]
    assert "ended" not in drive.events(1), "its end is nobody's any more"
    assert drive.held() == [2, 3, 4]
    drive.prepared(2)
    assert drive.events(2) == ["accepted"]


def test_it_waits_for_all_of_several() -> None:
    drive = connected()
    for lease_id, gpu in ((1, "g1"), (2, "g2")):
        grant(drive, lease_id, gpu)
        drive.prepared(lease_id)
        drive.running(lease_id)
    drive.reconnect(stale(1), stale(2))
    drive.clear()
    grant(drive, 3, "g1", "g2")
    drive.ended(2)
    assert prepares(drive) == []
    drive.ended(1)
    assert prepares(drive) == [3]


def test_an_offer_that_waits_for_too_long_is_given_back_at_once_and_never_started() -> None:
    drive = running_on("g1")
    grant(drive, 2, "g1")
    drive.revoke(2, pb.REVOKE_REASON_OFFER_EXPIRED)
    assert drive.events(2) == ["released"]
    drive.ended(1)
    assert prepares(drive) == []
    assert drive.held() == []


def test_a_cancel_ends_one_that_waits() -> None:
    drive = running_on("g1")
    grant(drive, 2, "g1")
    drive.revoke(2, pb.REVOKE_REASON_CANCELLED)
    assert drive.events(2) == ["ended"]
    assert Outcome(drive.last_event().ended.outcome) is Outcome.CANCELLED
    drive.ended(1)
    assert prepares(drive) == []


def test_one_that_waits_and_is_over_itself_is_forgotten() -> None:
    drive = running_on("g1")
    grant(drive, 2, "g1")
    drive.revoke(2, pb.REVOKE_REASON_STALE)
    drive.ended(1)
    assert (prepares(drive), drive.events(2), drive.held()) == ([], [], [])


def test_one_that_waits_and_is_granted_again_goes_on_waiting() -> None:
    drive = running_on("g1")
    grant(drive, 2, "g1")
    grant(drive, 2, "g1")
    drive.reconnect(stale(1), keep(2))
    assert (prepares(drive), drive.events(2)) == ([], [])
    drive.ended(1)
    assert prepares(drive) == [2]


def test_what_never_began_has_no_gpus_to_leave() -> None:
    drive = connected()
    drive.commits = False
    grant(drive, 1, "g1")
    drive.commit()
    drive.prepared(1)
    drive.revoke(1, pb.REVOKE_REASON_STALE)
    drive.clear()
    grant(drive, 2, "g1")
    drive.commit()
    assert prepares(drive) == [2]


@pytest.mark.parametrize("phase", [LeasePhase.ACCEPTED, LeasePhase.RUNNING])
def test_a_restarted_agent_waits_as_well(phase: LeasePhase) -> None:
    """An accepted one may run: that it does was perhaps not journalled any more."""
    held = a_grant(1)
    held.gpu_uuids.append("g1")
    drive = CoreDriver(Restored(leases=(RestoredLease(held, phase, Fate.FOUND),)))
    drive.connect(stale(1))
    grant(drive, 2, "g1")
    assert prepares(drive) == []
    drive.ended(1)
    assert prepares(drive) == [2]


def renewals(drive: CoreDriver) -> list[int]:
    return [action.deadline_ns for action in drive.of(act.Renew)]


def test_only_the_servers_word_moves_a_deadline_that_has_passed() -> None:
    """What stands still then goes on when its deadline is in the future again."""
    drive = connected()
    drive.bring(1, LeasePhase.RUNNING)
    drive.clear()
    drive.lose()
    drive.advance(600 * SECOND_NS)
    drive.do(drive.core.stream_opened(drive.stream_id, drive.now_ns))
    assert renewals(drive) == []
    greeted_ns = drive.now_ns
    drive.now_ns += SECOND_NS
    drive.welcome(keep(1))
    # Counted from the Hello, with a ttl of 60 s and a margin of 2.
    assert renewals(drive) == [greeted_ns + 58 * SECOND_NS]


def test_a_late_ack_counts_from_when_its_heartbeat_was_sent() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.RUNNING)
    drive.advance(5 * SECOND_NS)
    sent_ns = drive.now_ns
    seq = drive.sent("heartbeat")[-1].heartbeat.seq
    drive.clear()
    drive.now_ns += 59 * SECOND_NS
    drive.ack(heartbeat=seq)
    assert renewals(drive) == [sent_ns + 58 * SECOND_NS]
    assert sent_ns + 58 * SECOND_NS < drive.now_ns


def test_an_ack_from_before_a_hello_moves_no_deadline() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.RUNNING)
    drive.advance(5 * SECOND_NS)
    seq = drive.sent("heartbeat")[-1].heartbeat.seq
    drive.clear()
    drive.say(pb.ConnectResponse(hello_requested=pb.HelloRequested(reason="another epoch")))
    drive.ack(heartbeat=seq)
    assert renewals(drive) == []
    drive.welcome(stale(1))
    drive.ack(heartbeat=seq)
    assert renewals(drive) == []
    assert drive.of(act.Stop) == [act.Stop(1, StopCause.STALE, None)]


def test_a_lease_that_the_server_says_nothing_of_is_not_renewed() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.RUNNING)
    drive.clear()
    drive.reconnect()
    drive.advance(5 * SECOND_NS)
    drive.ack(heartbeat=1)
    assert renewals(drive) == []
