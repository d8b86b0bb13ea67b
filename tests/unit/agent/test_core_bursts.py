"""Bursts of the core: what is held back, what is not, and that nothing but the number of messages changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lessor.lifecycle import LeasePhase
from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import job_pb2
from lessor_agent.protocol import actions as act
from lessor_agent.protocol.session import Link
from tests.support.agent_core import SECOND_NS, CoreDriver, an_exit, connected, keep, log_position

pytestmark = pytest.mark.unit


# ── what is held back ────────────────────────────────────────────────────────


def test_a_burst_is_one_transaction_and_one_message() -> None:
    drive = connected()
    drive.clear()
    with drive.burst():
        drive.grant(*range(1, 101))
        assert drive.actions == []
        drive.work()
        for lease_id in range(1, 101):
            drive.prepared(lease_id)
        drive.work()
        for lease_id in range(1, 101):
            drive.running(lease_id)
            drive.ended(lease_id)
        drive.work()
        assert drive.of(act.Send) == []
    assert [len(message.lease_events.events) for message in drive.sent("lease_events")] == [100]
    assert len(drive.of(act.Journal)) == 3
    drive.clear()
    with drive.burst():
        drive.ack_events()
    assert len(drive.of(act.Journal)) == 1
    assert len(drive.of(act.Forget)) == 100


def test_one_message_of_grants_is_one_transaction_without_a_burst_too() -> None:
    drive = connected()
    drive.commits = False
    drive.clear()
    drive.grant(*range(1, 101))
    [journal] = drive.of(act.Journal)
    assert [type(entry) for entry in journal.entries] == [act.PutLease] * 100
    drive.commit()
    assert [prepare.lease_id for prepare in drive.of(act.Prepare)] == list(range(1, 101))


def test_a_heartbeat_goes_out_in_the_middle_of_a_burst() -> None:
    drive = connected()
    with drive.burst():
        drive.grant(*range(1, 1001))
        drive.work()
        drive.clear()
        drive.advance(5 * SECOND_NS)
        [send] = drive.actions
        assert isinstance(send, act.Send)
        assert send.urgent
        assert len(send.message.heartbeat.lease_ids) == 1000
        drive.clear()
        sent_ns = drive.now_ns
        drive.ack(heartbeat=1)
        for lease_id in range(1, 1001):
            drive.prepared(lease_id)
        drive.work()
    assert {renew.deadline_ns for renew in drive.of(act.Renew)} == {sent_ns + 58 * SECOND_NS}


def test_a_hello_goes_out_in_the_middle_of_a_burst() -> None:
    drive = CoreDriver()
    drive.do(drive.core.start(drive.now_ns))
    with drive.burst():
        drive.do(drive.core.stream_opened(drive.stream_id, drive.now_ns))
        assert len(drive.sent("hello")) == 1


def test_nothing_is_sent_on_a_stream_that_was_lost_in_the_burst() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.RUNNING)
    drive.clear()
    with drive.burst():
        drive.ended(1)
        drive.work()
        drive.lose()
    assert drive.of(act.Send) == []
    drive.reconnect(keep(1))
    assert drive.events() == ["accepted", "running", "ended"]


def test_the_events_of_a_burst_go_after_the_welcome_that_came_in_it() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.RUNNING)
    drive.ack_events()
    drive.lose()
    drive.advance(10 * SECOND_NS)
    drive.clear()
    with drive.burst():
        drive.do(drive.core.stream_opened(drive.stream_id, drive.now_ns))
        drive.ended(1)
        drive.work()
        drive.welcome(keep(1))
    assert [send.message.WhichOneof("message") for send in drive.of(act.Send)] == ["hello", "lease_events"]


def test_leaving_ends_a_burst_and_says_what_it_held_back() -> None:
    drive = connected()
    drive.bring(1, LeasePhase.RUNNING)
    drive.clear()
    drive.core.hold()
    drive.ended(1)
    drive.work()
    drive.do(drive.core.shutdown("SIGTERM", drive.now_ns))
    assert [send.message.WhichOneof("message") for send in drive.of(act.Send)] == ["lease_events", "goodbye"]
    assert isinstance(drive.actions[-1], act.CloseStream)


def test_progress_of_a_burst_is_one_message_and_goes_before_the_ends() -> None:
    drive = connected()
    with drive.burst():
        for lease_id in (1, 2, 3):
            drive.bring(lease_id, LeasePhase.OFFERED)
            drive.work()
            drive.prepared(lease_id)
            drive.work()
            drive.running(lease_id)
            for fraction in (0.25, 0.75):
                drive.do(drive.core.progress(lease_id, job_pb2.Progress(fraction=fraction), drive.now_ns))
            drive.do(drive.core.log_available(lease_id, 10, 0, drive.now_ns))
            drive.ended(lease_id, stdout=10)
        drive.work()
    sends = [action for action in drive.actions if isinstance(action, act.Send | act.SendLog)][-5:]
    assert [type(send).__name__ for send in sends] == ["Send", "SendLog", "SendLog", "SendLog", "Send"]
    [progress] = drive.sent("progress")
    assert [update.progress.fraction for update in progress.progress.updates] == [0.75] * 3
    assert drive.events() == ["ended"] * 3


# ── nothing else changes ─────────────────────────────────────────────────────

LEASES = (1, 2, 3)


@dataclass
class Server:
    """What the server has been told."""

    final: dict[int, bytes] = field(default_factory=dict)
    """lease_id → the end it was told, without its number."""
    checkpoints: dict[int, str] = field(default_factory=dict)
    progress: dict[int, float] = field(default_factory=dict)
    logs: dict[int, tuple[int, int]] = field(default_factory=dict)
    """lease_id → bytes of standard output and standard error."""
    steps: dict[int, int] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)


class World:
    """A core, a host on which jobs do what they are told, and a server; the same with bursts and without."""

    def __init__(self) -> None:
        self.drive = connected()
        self.server = Server()
        self.works: dict[int, list[Callable[[], None]]] = {}
        """lease_id → what its workload is told to do before it runs."""
        self.running: set[int] = set()
        self.over: set[int] = set()
        """Those whose workload has ended, or ends once it runs."""
        self.begun: Counter[int] = Counter()
        self.beats = 0
        """Number of the last heartbeat of this stream."""
        self.written: dict[int, tuple[int, int]] = {}

    def settle(self) -> None:
        """Does on the host what the core asks for, and tells the server what is sent."""
        drive = self.drive
        while drive.actions:
            actions = list(drive.actions)
            drive.clear()
            for action in actions:
                match action:
                    case act.Prepare():
                        drive.prepared(action.lease_id)
                    case act.Begin():
                        self.begun[action.lease_id] += 1
                        self.running.add(action.lease_id)
                        drive.running(action.lease_id)
                        for work in self.works.pop(action.lease_id, []):
                            work()
                    case act.Send():
                        self._hear(action.message)
                    case act.SendLog():
                        self._log(action)

    def when_running(self, lease_id: int, work: Callable[[], None]) -> None:
        """Has a workload do something, once it runs."""
        if lease_id in self.running:
            work()
        elif not self.begun[lease_id] and lease_id not in self.over:
            self.works.setdefault(lease_id, []).append(work)

    # ── inputs ───────────────────────────────────────────────────────────────

    def grant(self, lease_id: int) -> None:
        if self.drive.core.link is Link.UP:
            self.drive.grant(lease_id)

    def report(self, lease_id: int, number: int) -> None:
        progress = job_pb2.Progress(fraction=number / 100)
        self.when_running(
            lease_id, lambda: self.drive.do(self.drive.core.progress(lease_id, progress, self.drive.now_ns))
        )

    def save(self, lease_id: int, number: int) -> None:
        self.when_running(
            lease_id, lambda: self.drive.do(self.drive.core.checkpoint(lease_id, str(number), self.drive.now_ns))
        )

    def write(self, lease_id: int, number: int) -> None:
        def work() -> None:
            out, err = self.written.get(lease_id, (0, 0))
            self.written[lease_id] = (out + number, err + number % 7)
            self.drive.do(self.drive.core.log_available(lease_id, *self.written[lease_id], self.drive.now_ns))

        self.when_running(lease_id, work)

    def end(self, lease_id: int, number: int) -> None:
        def work() -> None:
            self.running.discard(lease_id)
            out, err = self.written.get(lease_id, (0, 0))
            self.drive.ended(lease_id, an_exit(number % 3), stdout=out, stderr=err)

        self.when_running(lease_id, work)
        self.over.add(lease_id)

    def ack(self, _lease_id: int, _number: int) -> None:
        logs = [log_position(lease_id, *written) for lease_id, written in self.server.logs.items()]
        if self.drive.core.link is Link.UP:
            self.drive.ack(heartbeat=self.beats, seqs=sorted(self.server.seen), logs=logs)

    def wait(self, _lease_id: int, number: int) -> None:
        self.drive.advance(number * SECOND_NS // 20)

    def reconnect(self, _lease_id: int, _number: int) -> None:
        drive = self.drive
        drive.do(drive.core.release(drive.now_ns))
        self.settle()
        self.beats = 0
        answers = [keep(lease_id, *self.server.logs.get(lease_id, (0, 0))) for lease_id in drive.held()]
        drive.reconnect(*answers)

    # ── the server ───────────────────────────────────────────────────────────

    def _hear(self, message: pb.ConnectRequest) -> None:
        server = self.server
        self.beats = message.heartbeat.seq or self.beats
        for update in message.progress.updates:
            assert update.lease_id not in server.final, "progress after the end"
            server.progress[update.lease_id] = update.progress.fraction
        for event in message.lease_events.events:
            if event.seq in server.seen:
                continue
            server.seen.add(event.seq)
            kind = event.WhichOneof("event")
            if kind == "checkpoint_saved":
                server.checkpoints[event.lease_id] = event.checkpoint_saved.cursor
                continue
            step = {"accepted": 1, "running": 2}.get(kind or "", 3)
            if kind == "released":
                # A grant of what is over is answered so, as often as it comes.
                assert event.lease_id in server.final
                continue
            assert step >= server.steps.get(event.lease_id, 0), "an earlier step after a later one"
            server.steps[event.lease_id] = step
            if step == 3:
                event.seq = 0
                assert server.final.setdefault(event.lease_id, event.SerializeToString()) == event.SerializeToString()

    def _log(self, action: act.SendLog) -> None:
        out, err = self.server.logs.get(action.lease_id, (0, 0))
        if action.offset != out + err:
            return
        if action.stream == job_pb2.LOG_STREAM_STDOUT:
            out += action.length
        else:
            err += action.length
        self.server.logs[action.lease_id] = (out, err)

    def facts(self) -> tuple[object, ...]:
        """All that can be seen of the whole, once everything has come to rest."""
        drive = self.drive
        if drive.core.link is not Link.UP:
            self.reconnect(0, 0)
        for lease_id in LEASES:
            self.grant(lease_id)
            self.settle()
            self.end(lease_id, 0)
            self.settle()
        drive.advance(SECOND_NS // 5)
        self.settle()
        for _ in range(3):
            self.ack(0, 0)
            self.settle()
        assert drive.held() == []
        assert drive.core.unacked_events == 0
        server = self.server
        return server.final, server.checkpoints, server.progress, server.logs, self.begun


OPERATIONS: dict[str, Callable[[World, int, int], None]] = {
    "grant": lambda world, lease_id, _number: world.grant(lease_id),
    "report": World.report,
    "save": World.save,
    "write": World.write,
    "end": World.end,
    "ack": World.ack,
    "wait": World.wait,
    "reconnect": World.reconnect,
}

Step = tuple[str, int, int]
steps = st.lists(
    st.tuples(st.sampled_from(sorted(OPERATIONS)), st.sampled_from(LEASES), st.integers(1, 50)),
    min_size=1,
    max_size=40,
)


def one_by_one(told: list[Step]) -> tuple[object, ...]:
    world = World()
    for name, lease_id, number in told:
        OPERATIONS[name](world, lease_id, number)
        world.settle()
    return world.facts()


def in_bursts(told: list[Step], sizes: list[int], works: list[bool]) -> tuple[object, ...]:
    world = World()
    drive, at = world.drive, 0
    while at < len(told):
        size, work = sizes[at % len(sizes)], works[at % len(works)]
        with drive.burst():
            for name, lease_id, number in told[at : at + size]:
                OPERATIONS[name](world, lease_id, number)
                drive.core.hold()
                if work:
                    while True:
                        drive.work()
                        if not drive.actions:
                            break
                        world.settle()
        world.settle()
        at += size
    return world.facts()


@settings(max_examples=150)
@given(steps, st.lists(st.integers(1, 12), min_size=1, max_size=5), st.lists(st.booleans(), min_size=1, max_size=5))
def test_bursts_change_no_fact(told: list[Step], sizes: list[int], works: list[bool]) -> None:
    assert in_bursts(told, sizes, works) == one_by_one(told)
