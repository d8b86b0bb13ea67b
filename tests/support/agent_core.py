"""Drives an AgentCore by hand: a test is its clock, its server, its journal and its host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration

from lessor.lifecycle import LeasePhase
from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import job_pb2
from lessor_agent.protocol import actions as act
from lessor_agent.protocol.core import AgentCore, Loss, Profile, Restored
from lessor_agent.protocol.outcomes import Ending
from lessor_agent.runtimes.base import Exit, Handle, StopCause

SECOND_NS = 1_000_000_000
MS_NS = 1_000_000
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)

A = TypeVar("A")


def proto_duration(value: timedelta) -> Duration:
    """Returns a timedelta as a proto duration."""
    message = Duration()
    message.FromTimedelta(value)
    return message


def a_grant(
    lease_id: int,
    *,
    ttl: timedelta = timedelta(seconds=60),
    margin: timedelta = timedelta(seconds=2),
    grace: timedelta = timedelta(seconds=10),
    runtime: str = "process",
    argv: Sequence[str] = ("true",),
) -> pb.Grant:
    """Returns a grant of a job of its own."""
    return pb.Grant(
        job_id=f"job-{lease_id}",
        lease_id=lease_id,
        attempt=1,
        spec=job_pb2.JobSpec(runtime=runtime, command=job_pb2.Command(argv=argv)),
        ttl=proto_duration(ttl),
        margin=proto_duration(margin),
        grace=proto_duration(grace),
    )


def a_profile(heartbeat: timedelta = timedelta(seconds=5), agent_id: str = "agent-0001") -> Profile:
    """Returns an agent with one runtime."""
    return Profile(
        agent_id=agent_id,
        agent_name="tester",
        version="0",
        host=pb.HostIdentity(boot_id="boot", hardware_id="hardware", hostname="host"),
        inventory=pb.Inventory(cpu_millis=4000, memory_bytes=1 << 30),
        runtimes=(pb.RuntimeInfo(name="process"),),
        heartbeat_interval=heartbeat,
    )


def an_exit(
    exit_code: int | None = 0,
    *,
    signal: int = 0,
    cause: StopCause | None = None,
    start_error: str | None = None,
) -> Exit:
    """Returns how an execution ended."""
    return Exit(exit_code, signal, cause, start_error, BEGIN, BEGIN + timedelta(seconds=1))


class CoreDriver:
    """A core, and all that its actions asked for."""

    def __init__(
        self,
        restored: Restored | None = None,
        *,
        heartbeat: timedelta = timedelta(seconds=5),
        random: Callable[[], float] = lambda: 0.5,
    ) -> None:
        """Makes a core that nothing has happened to."""
        self.core = AgentCore(a_profile(heartbeat), restored or Restored(), random)
        self.now_ns = 1000 * SECOND_NS
        self.actions: list[act.Action] = []
        """Everything since the last :meth:`clear`."""
        self.commits = True
        """Journal transactions commit at once."""
        self.open_tickets: list[act.Journal] = []
        """Transactions that wait for :meth:`commit` or :meth:`fail_journal`."""
        self.stream_id = 0
        self.epoch = 0
        self.seen_events: list[pb.LeaseEvent] = []
        """Every durable event ever sent, in order."""

    # ── what happens ─────────────────────────────────────────────────────────

    def do(self, actions: Iterable[act.Action]) -> None:
        """Takes actions; the journal settles its part."""
        for action in actions:
            self.actions.append(action)
            if isinstance(action, act.OpenStream):
                self.stream_id = action.stream_id
            elif isinstance(action, act.Send) and action.message.HasField("lease_events"):
                self.seen_events.extend(action.message.lease_events.events)
            elif isinstance(action, act.Journal):
                if self.commits:
                    self.do(self.core.journal_committed(action.ticket, self.now_ns))
                else:
                    self.open_tickets.append(action)

    def commit(self) -> None:
        """Commits everything that waits for the journal, what follows from it included."""
        while self.open_tickets:
            self.do(self.core.journal_committed(self.open_tickets.pop(0).ticket, self.now_ns))

    def fail_journal(self, error: str = "disk full") -> None:
        """Refuses every transaction that waits now."""
        tickets, self.open_tickets = self.open_tickets, []
        for journal in tickets:
            self.do(self.core.journal_failed(journal.ticket, error, self.now_ns))

    @contextmanager
    def burst(self) -> Iterator[None]:
        """Has all that is done inside reach the core as one burst."""
        self.core.hold()
        yield
        self.do(self.core.release(self.now_ns))

    def work(self) -> None:
        """Takes what a burst asks for so far, and what follows from it, until there is no more."""
        while actions := self.core.work(self.now_ns):
            self.do(actions)

    def advance(self, delta_ns: int) -> None:
        """Moves time and ticks once."""
        self.now_ns += delta_ns
        self.do(self.core.tick(self.now_ns))

    def say(self, message: pb.ConnectResponse, stream_id: int | None = None) -> None:
        """Has the server say something."""
        self.do(self.core.message(self.stream_id if stream_id is None else stream_id, message, self.now_ns))

    def connect(self, *answers: pb.LeaseAnswer, window: int = 0, start: bool = True) -> None:
        """Opens a stream, says Hello and is welcomed."""
        if start:
            self.do(self.core.start(self.now_ns))
        self.do(self.core.stream_opened(self.stream_id, self.now_ns))
        self.welcome(*answers, window=window)

    def reconnect(self, *answers: pb.LeaseAnswer) -> None:
        """Loses the stream and connects again."""
        self.lose()
        self.advance(10 * SECOND_NS)
        self.do(self.core.stream_opened(self.stream_id, self.now_ns))
        self.welcome(*answers)

    def lose(self, reason: str = "") -> None:
        """Loses the stream."""
        self.do(self.core.stream_lost(self.stream_id, Loss("gone", reason), self.now_ns))

    def welcome(self, *answers: pb.LeaseAnswer, window: int = 0) -> None:
        """Answers a Hello with the next epoch."""
        self.epoch += 1
        self.say(
            pb.ConnectResponse(
                welcome=pb.Welcome(
                    session_id=77, epoch=self.epoch, protocol_version=1, leases=answers, max_unacked_log_bytes=window
                )
            )
        )

    def grant(self, *lease_ids: int, epoch: int | None = None, **fields: timedelta) -> None:
        """Grants leases."""
        grants = [a_grant(lease_id, **fields) for lease_id in lease_ids]  # type: ignore[arg-type]
        self.say(pb.ConnectResponse(grants=pb.Grants(epoch=self.epoch if epoch is None else epoch, grants=grants)))

    def revoke(self, lease_id: int, reason: pb.RevokeReason.ValueType, *, epoch: int | None = None) -> None:
        """Asks a lease back."""
        revoke = pb.Revoke(job_id=f"job-{lease_id}", lease_id=lease_id, reason=reason)
        self.say(pb.ConnectResponse(revokes=pb.Revokes(epoch=self.epoch if epoch is None else epoch, revokes=[revoke])))

    def ack(self, *, heartbeat: int = 0, seqs: Iterable[int] = (), logs: Iterable[pb.LogPosition] = ()) -> None:
        """Acks."""
        self.say(pb.ConnectResponse(ack=pb.Ack(heartbeat_seq=heartbeat, event_seqs=seqs, logs=logs)))

    def ack_events(self) -> None:
        """Acks every event ever sent."""
        self.ack(seqs=[event.seq for event in self.seen_events])

    def prepared(self, lease_id: int) -> None:
        """The keeper of a lease stands."""
        self.do(self.core.prepared(lease_id, Handle("process", 1, {"lease_id": lease_id}), self.now_ns))

    def running(self, lease_id: int) -> None:
        """A lease's workload runs."""
        self.do(self.core.running(lease_id, BEGIN, self.now_ns))

    def ended(self, lease_id: int, exit: Exit | None = None, *, stdout: int = 0, stderr: int = 0) -> None:
        """A lease's tree is gone."""
        ending = Ending(exit or an_exit(), stdout_bytes=stdout, stderr_bytes=stderr)
        self.do(self.core.ended(lease_id, ending, self.now_ns))

    def bring(self, lease_id: int, phase: LeasePhase) -> None:
        """Grants a lease and brings it to ``phase``."""
        self.grant(lease_id)
        if phase >= LeasePhase.ACCEPTED:
            self.prepared(lease_id)
        if phase >= LeasePhase.RUNNING:
            self.running(lease_id)
        if phase >= LeasePhase.DRAINING:
            self.ended(lease_id)

    # ── what it led to ───────────────────────────────────────────────────────

    def clear(self) -> None:
        """Forgets the actions so far."""
        self.actions.clear()

    def of(self, kind: type[A]) -> list[A]:
        """Returns the actions of a kind, in order."""
        return [action for action in self.actions if isinstance(action, kind)]

    def sent(self, field: str) -> list[pb.ConnectRequest]:
        """Returns the messages sent that carry ``field``."""
        return [action.message for action in self.of(act.Send) if action.message.HasField(field)]  # type: ignore[arg-type]

    def events(self, lease_id: int | None = None) -> list[str]:
        """Returns the kinds of the durable events sent, in order."""
        return [
            event.WhichOneof("event") or ""
            for message in self.sent("lease_events")
            for event in message.lease_events.events
            if lease_id is None or event.lease_id == lease_id
        ]

    def last_event(self) -> pb.LeaseEvent:
        """Returns the last durable event sent."""
        return self.seen_events[-1]

    def held(self) -> list[int]:
        """Returns the leases held."""
        return self.core.leases.ids()


def keep(lease_id: int, stdout: int = 0, stderr: int = 0) -> pb.LeaseAnswer:
    """The lease stands, its log so far."""
    return _answer(lease_id, pb.LEASE_DECISION_KEEP, stdout, stderr)


def stale(lease_id: int) -> pb.LeaseAnswer:
    """The lease is over."""
    return _answer(lease_id, pb.LEASE_DECISION_STALE, 0, 0)


def its_end_is_known(lease_id: int, stdout: int = 0, stderr: int = 0) -> pb.LeaseAnswer:
    """The lease's end is committed."""
    return _answer(lease_id, pb.LEASE_DECISION_ENDED, stdout, stderr)


def log_position(lease_id: int, stdout: int = 0, stderr: int = 0) -> pb.LogPosition:
    """A committed log position."""
    return pb.LogPosition(lease_id=lease_id, end_offset=stdout + stderr, stdout_bytes=stdout, stderr_bytes=stderr)


def _answer(lease_id: int, decision: pb.LeaseDecision.ValueType, stdout: int, stderr: int) -> pb.LeaseAnswer:
    return pb.LeaseAnswer(lease_id=lease_id, decision=decision, log=log_position(lease_id, stdout, stderr))


def connected() -> CoreDriver:
    """Returns a driver whose core has been welcomed."""
    drive = CoreDriver()
    drive.connect()
    return drive
