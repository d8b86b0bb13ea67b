"""What an input costs the core does not grow with what is held: work is counted, not timed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from types import FrameType
from typing import Any

import pytest

from lessor.lifecycle import LeasePhase
from lessor.v1 import job_pb2
from lessor_agent.protocol.alarms import Alarms
from lessor_agent.protocol.lease import Lease
from tests.support.agent_core import SECOND_NS, CoreDriver, keep, log_position

pytestmark = pytest.mark.unit

FEW, MANY = 8, 800
LAST = 1


class Visited(dict[int, Lease]):
    """Counts how often somebody goes through all leases, even where Python code does not see the loop."""

    walks = 0

    def __iter__(self) -> Iterator[int]:
        self.walks += 1
        return super().__iter__()

    def values(self) -> Any:
        self.walks += 1
        return super().values()

    def items(self) -> Any:
        self.walks += 1
        return super().items()


def steps(work: Callable[[], None]) -> int:
    """Returns how many instructions of Python ``work`` takes."""
    count = 0

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def holding(leases: int) -> CoreDriver:
    """A core whose leases all run, have progress that waits, output under way, and an event that is not acked."""
    drive = CoreDriver(heartbeat=timedelta(seconds=60))
    drive.connect()
    drive.bring(LAST, LeasePhase.RUNNING)
    drive.ack_events()
    for lease_id in range(LAST + 1, LAST + leases):
        drive.bring(lease_id, LeasePhase.RUNNING)
        for fraction in (0.1, 0.2):
            drive.do(drive.core.progress(lease_id, job_pb2.Progress(fraction=fraction), drive.now_ns))
        drive.do(drive.core.log_available(lease_id, 100, 0, drive.now_ns))
    drive.clear()
    return drive


def progress(drive: CoreDriver) -> None:
    drive.do(drive.core.progress(LAST, job_pb2.Progress(fraction=0.5), drive.now_ns))


def output(drive: CoreDriver) -> None:
    drive.do(drive.core.log_available(LAST, 10, 0, drive.now_ns))
    drive.ack(logs=[log_position(LAST, stdout=10)])


def checkpoint(drive: CoreDriver) -> None:
    drive.do(drive.core.checkpoint(LAST, "step", drive.now_ns))


def whole_life(drive: CoreDriver) -> None:
    drive.bring(5000, LeasePhase.DRAINING)
    drive.ack(seqs=[event.seq for event in drive.seen_events[-3:]])
    assert drive.core.leases.get(5000) is None


def idle(drive: CoreDriver) -> None:
    drive.do(drive.core.tick(drive.now_ns))
    drive.core.next_wakeup_ns()


@pytest.mark.parametrize("work", [progress, output, checkpoint, whole_life, idle])
def test_an_input_costs_the_same_however_many_leases_are_held(work: Callable[[CoreDriver], None]) -> None:
    few, many = (steps(partial(work, holding(leases))) for leases in (FEW, MANY))
    # A heap of a hundred times as many alarms is a few levels deeper.
    assert many <= few + 300


@pytest.mark.parametrize("work", [progress, output, checkpoint, whole_life, idle])
def test_no_input_goes_through_all_leases(work: Callable[[CoreDriver], None]) -> None:
    drive = holding(FEW)
    table = drive.core.leases
    held = Visited(table._held)  # noqa: SLF001
    table._held = held  # noqa: SLF001
    held.walks = 0
    work(drive)
    assert held.walks == 0
    drive.reconnect(*[keep(lease_id) for lease_id in drive.held()])
    assert held.walks > 0


def test_a_forgotten_lease_leaves_nothing_that_rings() -> None:
    drive = CoreDriver(heartbeat=timedelta(seconds=60))
    drive.connect()
    for lease_id in range(1, 50):
        drive.bring(lease_id, LeasePhase.RUNNING)
        for fraction in (0.1, 0.2):
            drive.do(drive.core.progress(lease_id, job_pb2.Progress(fraction=fraction), drive.now_ns))
        drive.do(drive.core.log_available(lease_id, 100, 0, drive.now_ns))
        drive.ended(lease_id, stdout=100)
        drive.ack_events()
        drive.ack(logs=[log_position(lease_id, stdout=100)])
    assert drive.held() == []
    assert drive.core.next_wakeup_ns() == drive.now_ns + 60 * SECOND_NS


# ── alarms ───────────────────────────────────────────────────────────────────


def test_an_alarm_rings_once_and_the_earliest_first() -> None:
    alarms = Alarms()
    for lease_id, at_ns in ((1, 30), (2, 10), (3, 20), (4, 40)):
        alarms.set(lease_id, at_ns)
    assert alarms.next_ns == 10
    assert alarms.ring(30) == [2, 3, 1]
    assert alarms.ring(30) == []
    assert alarms.next_ns == 40


def test_an_alarm_may_be_set_earlier_but_not_later() -> None:
    alarms = Alarms()
    alarms.set(1, 20)
    alarms.set(1, 30)
    assert alarms.next_ns == 20
    alarms.set(1, 10)
    assert alarms.ring(10) == [1]
    assert alarms.ring(100) == []
    assert alarms.next_ns is None


def test_a_dropped_alarm_does_not_ring_and_takes_no_room_for_long() -> None:
    alarms = Alarms()
    for lease_id in range(1000):
        alarms.set(lease_id, 10**9 - lease_id)
        alarms.drop(lease_id)
    alarms.set(1, 5)
    assert alarms.ring(10**10) == [1]
    assert alarms.next_ns is None
