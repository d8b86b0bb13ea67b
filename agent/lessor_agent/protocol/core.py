"""The agent's protocol core: one object that is told what happened and says what to do.

It reads no clock, holds no socket and starts no task: every method takes the
time (CLOCK_BOOTTIME nanoseconds) and returns actions in order. The supervisor
drives it on a host, the simulator in virtual time; same inputs, same actions.

What an input costs depends on what it changes, never on how many leases are
held: what is due waits in sets and queues of its own. Only what concerns every
lease looks at every lease: a heartbeat, its ack, a Hello and its answer.

**Bursts.** Many inputs that come together are dearer one by one than as one:
each would be journalled and answered alone. Between :meth:`AgentCore.hold` and
:meth:`AgentCore.release` inputs return only what is urgent (heartbeats, Hellos);
the rest waits for the release, journalled in one transaction and sent in few
messages. Nothing else changes: the journal still comes before the start and
before the word to the server. Who can carry out actions at once takes them
with :meth:`AgentCore.work` in between and reports what came of them in the
same burst.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from google.protobuf.duration_pb2 import Duration

from lessor import timing
from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import job_pb2
from lessor_agent.protocol.actions import Action, CloseStream, GiveUp, OpenStream, Send, SendLog
from lessor_agent.protocol.desk import Desk
from lessor_agent.protocol.events import EventLog
from lessor_agent.protocol.lease import RestoredLease, nanoseconds
from lessor_agent.protocol.leases import LeaseTable
from lessor_agent.protocol.logflow import DEFAULT_WINDOW_BYTES
from lessor_agent.protocol.outcomes import Ending
from lessor_agent.protocol.session import WELCOME_TIMEOUT_NS, Link, Session
from lessor_agent.runtimes.base import Handle

log = logging.getLogger(__name__)

PROTOCOL_UNSUPPORTED = "PROTOCOL_UNSUPPORTED"
AGENT_IDENTITY_IN_USE = "AGENT_IDENTITY_IN_USE"
"""Reasons of refusals that a quick retry cannot heal."""


ASK_AGAIN_NS = 60_000_000_000
"""A server that gave no usable answer for a held lease is asked again after so long: its work may stand still."""

_Hear = Callable[[pb.ConnectResponse, int], None]


@dataclass(frozen=True, slots=True)
class Profile:
    """Who the agent is and what its host has; the same for the life of its process."""

    agent_id: str
    agent_name: str
    version: str
    host: pb.HostIdentity
    inventory: pb.Inventory
    runtimes: tuple[pb.RuntimeInfo, ...]
    heartbeat_interval: timedelta


@dataclass(frozen=True, slots=True)
class Restored:
    """What the journal and the host told a restarted agent."""

    leases: tuple[RestoredLease, ...] = ()
    events: tuple[pb.LeaseEvent, ...] = ()
    """Unacked events; ``seq`` is set."""
    tombstones: tuple[int, ...] = ()
    """lease_ids, oldest first."""
    last_seq: int = 0
    """Highest event number ever used."""
    undecided: tuple[int, ...] = ()
    """lease_ids that are not held and of which something may still run; see :meth:`AgentCore.decided`."""


@dataclass(frozen=True, slots=True)
class Loss:
    """How a stream was lost."""

    message: str
    reason: str = ""
    """Reason of the server's ErrorInfo, if it refused; else empty."""


class AgentCore:
    """The agent's side of ``AgentService.Connect``.

    Guarantees, whatever comes in:
        * a lease_id is begun at most once, and never after it was given back;
        * a renewal counts from the send time of a message that the server has
          committed, on the current stream, after the last Hello;
        * nothing of an older epoch is obeyed;
        * a durable event is sent only after the journal has settled it, and
          again after every Welcome until it is acked.
    """

    def __init__(self, profile: Profile, restored: Restored, random: Callable[[], float]) -> None:
        """Begins where ``restored`` ends.

        Args:
            profile: Who the agent is.
            restored: What a restarted agent found; ``Restored()`` for a new one.
            random: Uniform in [0, 1), for the spread of retries.
        """
        self._profile = profile
        self._desk = Desk(EventLog(restored.last_seq, restored.events))
        self._session = Session(nanoseconds(profile.heartbeat_interval), random)
        names = [runtime.name for runtime in profile.runtimes]
        self._leases = LeaseTable(
            self._desk, self._session, names, restored.leases, restored.tombstones, restored.undecided
        )
        self._holds = False
        self._gpus: tuple[pb.GpuReading, ...] = ()
        self._refused = ""
        self._hearers: dict[str, tuple[_Hear, bool]] = {
            "welcome": (self._welcomed, True),
            # Not before Welcome: of two Hellos under way nobody could tell which one it answers.
            "hello_requested": (self._asked_for_hello, False),
            "reconnect": (self._asked_to_reconnect, True),
            "grants": (self._granted, False),
            "revokes": (self._revoked, False),
            "ack": (self._acked, False),
        }
        """Kind of message → who hears it, and whether it counts before Welcome."""

    @property
    def link(self) -> Link:
        """Where the connection stands."""
        return self._session.link

    @property
    def leases(self) -> LeaseTable:
        """The leases held, to look at."""
        return self._leases

    @property
    def unacked_events(self) -> int:
        """Durable events that the server has not acked."""
        return len(self._desk.events)

    def restore(self, now_ns: int) -> list[Action]:
        """Takes up what was restored, so that it can be told of before :meth:`start`: of ends, above all."""
        self._leases.settle_restored(now_ns)
        return self._finish(now_ns)

    def start(self, now_ns: int) -> list[Action]:
        """Takes up what was restored, unless :meth:`restore` has, and opens the first stream."""
        self._leases.settle_restored(now_ns)
        self._session.retry_at_ns = now_ns
        return self.tick(now_ns)

    def tick(self, now_ns: int) -> list[Action]:
        """Does what is due. Call it at :meth:`next_wakeup_ns`, and as often as you like."""
        session = self._session
        if session.link is Link.DOWN and now_ns >= session.retry_at_ns:
            self._desk.put(OpenStream(session.open()))
            session.hello_sent_ns = now_ns
        elif session.link in (Link.CONNECTING, Link.GREETING):
            if now_ns >= session.hello_sent_ns + WELCOME_TIMEOUT_NS:
                self._drop_stream("the server did not answer Hello in time", now_ns)
        elif session.link is Link.UP:
            if now_ns >= session.silent_at_ns:
                self._drop_stream("the server acked no heartbeat in time", now_ns)
            elif now_ns >= session.heartbeat_due_ns:
                self._beat(now_ns)
        return self._finish(now_ns)

    def next_wakeup_ns(self) -> int | None:
        """Returns when :meth:`tick` may have something to do; None: nothing until something happens.

        It may be early, by what has become of the matter meanwhile, and is never late. What a
        burst holds back is not counted.
        """
        session = self._session
        if session.link is Link.DOWN:
            return session.retry_at_ns
        if session.link in (Link.CONNECTING, Link.GREETING):
            return session.hello_sent_ns + WELCOME_TIMEOUT_NS
        if session.link is Link.CLOSED:
            return None
        wakeup_ns = min(session.heartbeat_due_ns, session.silent_at_ns)
        for due_ns in (self._desk.events.resend_ns, self._leases.progress.next_ns, self._leases.logs.next_ns):
            if due_ns is not None and due_ns < wakeup_ns:
                wakeup_ns = due_ns
        return wakeup_ns

    # ── bursts ───────────────────────────────────────────────────────────────

    def hold(self) -> None:
        """Begins a burst: until :meth:`release` inputs return urgent messages only."""
        self._holds = True

    def work(self, now_ns: int) -> list[Action]:
        """Returns what the burst asks for so far, but for what is to be sent: that waits for :meth:`release`.

        Args:
            now_ns: Unused by the core as it is; given as with every input.
        """
        self._leases.settle_begun()
        return self._desk.take()

    def release(self, now_ns: int) -> list[Action]:
        """Ends a burst; returns all that its inputs led to and that was not returned yet."""
        self._holds = False
        return self._finish(now_ns)

    # ── the stream ───────────────────────────────────────────────────────────

    def stream_opened(self, stream_id: int, now_ns: int) -> list[Action]:
        """The stream can be written to."""
        if stream_id == self._session.stream_id and self._session.link is Link.CONNECTING:
            self._greet(now_ns)
        return self._finish(now_ns)

    def stream_lost(self, stream_id: int, loss: Loss, now_ns: int) -> list[Action]:
        """The stream ended without having been closed by :class:`CloseStream`."""
        session = self._session
        if stream_id != session.stream_id or session.link in (Link.DOWN, Link.CLOSED):
            return self._finish(now_ns)
        self._leases.pause_logs()
        fields = {"event": "stream_lost", "error": loss.message, "reason": loss.reason}
        if loss.reason in (PROTOCOL_UNSUPPORTED, AGENT_IDENTITY_IN_USE):
            delay_ns = session.retry_slowly(now_ns)
            if loss.reason == PROTOCOL_UNSUPPORTED and len(self._leases) == 0:
                session.link = Link.CLOSED
                self._desk.put(GiveUp(loss.message))
            elif self._refused != loss.reason:
                log.error("the server refuses this agent; trying again slowly", extra=fields)
            self._refused = loss.reason
        else:
            delay_ns = session.back_off(now_ns)
            log.log(
                # The first failures and then every tenth: a long outage must not flood the log.
                logging.WARNING if session.attempts <= 3 or session.attempts % 10 == 0 else logging.DEBUG,
                "stream lost; leases stand",
                extra={**fields, "retry_in_ms": delay_ns // 1_000_000, "attempts": session.attempts},
            )
        return self._finish(now_ns)

    def message(self, stream_id: int, message: pb.ConnectResponse, now_ns: int) -> list[Action]:
        """The server said something on a stream."""
        session = self._session
        if stream_id == session.stream_id and session.link in (Link.GREETING, Link.UP):
            kind = message.WhichOneof("message") or ""
            hear, before_welcome = self._hearers.get(kind, (None, True))
            if hear is not None and (before_welcome or session.link is Link.UP):
                hear(message, now_ns)
            else:
                # Sent before the server saw the Hello, so of an older epoch; or by a newer server.
                log.debug("message ignored", extra={"event": "ignored", "kind": kind})
        return self._finish(now_ns)

    def shutdown(self, reason: str, now_ns: int) -> list[Action]:
        """The agent leaves on purpose: says Goodbye. Its leases stand. Ends a burst."""
        session = self._session
        self._holds = False
        self._leases.settle_begun()
        if session.link is Link.UP:
            self._send_due(now_ns)
            self._send(pb.ConnectRequest(goodbye=pb.Goodbye(reason=reason)))
        if session.link in (Link.CONNECTING, Link.GREETING, Link.UP):
            self._desk.put(CloseStream(session.stream_id, reason))
        session.link = Link.CLOSED
        self._desk.sweep()
        return self._finish(now_ns)

    # ── the journal and the host ─────────────────────────────────────────────

    def journal_committed(self, ticket: int, now_ns: int) -> list[Action]:
        """The entries of a :class:`Journal` action are durable."""
        self._desk.settle(ticket, None)
        return self._finish(now_ns)

    def journal_failed(self, ticket: int, error: str, now_ns: int) -> list[Action]:
        """The entries of a :class:`Journal` action cannot be made durable."""
        self._desk.settle(ticket, error)
        return self._finish(now_ns)

    def prepared(self, lease_id: int, handle: Handle, now_ns: int) -> list[Action]:
        """A :class:`Prepare` succeeded."""
        self._leases.prepared(lease_id, handle)
        return self._finish(now_ns)

    def prepare_refused(self, lease_id: int, error: job_pb2.JobError, now_ns: int) -> list[Action]:
        """A :class:`Prepare` failed and nothing is left of it."""
        self._leases.prepare_refused(lease_id, error)
        return self._finish(now_ns)

    def running(self, lease_id: int, start_time: datetime, now_ns: int) -> list[Action]:
        """A :class:`Begin` was done at ``start_time`` (aware)."""
        self._leases.running(lease_id, start_time)
        return self._finish(now_ns)

    def ended(self, lease_id: int, ending: Ending, now_ns: int) -> list[Action]:
        """An execution is over, its whole tree gone."""
        self._leases.ended(lease_id, ending, now_ns)
        return self._finish(now_ns)

    def decided(self, lease_id: int, now_ns: int) -> list[Action]:
        """Nothing runs any more of a lease that was undecided; it can be released."""
        self._leases.decided(lease_id)
        return self._finish(now_ns)

    def checkpoint(self, lease_id: int, cursor: str, now_ns: int) -> list[Action]:
        """The workload saved a checkpoint."""
        self._leases.checkpoint(lease_id, cursor)
        return self._finish(now_ns)

    def progress(self, lease_id: int, progress: job_pb2.Progress, now_ns: int) -> list[Action]:
        """The workload's latest progress, whole."""
        self._leases.progressed(lease_id, progress, now_ns)
        return self._finish(now_ns)

    def log_available(self, lease_id: int, stdout_bytes: int, stderr_bytes: int, now_ns: int) -> list[Action]:
        """The output files of an execution hold this much."""
        self._leases.log_available(lease_id, stdout_bytes, stderr_bytes)
        return self._finish(now_ns)

    def gpu_readings(self, readings: Iterable[pb.GpuReading]) -> None:
        """Takes the readings that the next heartbeats carry."""
        self._gpus = tuple(readings)

    # ── inside ───────────────────────────────────────────────────────────────

    def _finish(self, now_ns: int) -> list[Action]:
        """Sends what may be sent by now, and returns all actions; in a burst, only the urgent ones."""
        if self._holds:
            return self._desk.take_urgent() if self._desk.urgent else []
        self._leases.settle_begun()
        if self._session.link is Link.UP:
            self._send_due(now_ns)
        return self._desk.take()

    def _send_due(self, now_ns: int) -> None:
        """Sends progress, then log bytes, then events: the end of a job goes after what is said of it."""
        if updates := self._leases.progress.take(now_ns):
            self._send(pb.ConnectRequest(progress=pb.ProgressUpdates(updates=updates)))
        for lease_id, chunk in self._leases.logs.take(now_ns):
            lease = self._leases.get(lease_id)
            self._desk.put(
                SendLog(
                    self._session.stream_id,
                    lease.job_id if lease is not None else "",
                    lease_id,
                    chunk.offset,
                    chunk.stream,
                    chunk.file_offset,
                    chunk.length,
                )
            )
        for message in self._desk.events.take_due(now_ns):
            self._send(message)

    def _send(self, message: pb.ConnectRequest) -> None:
        self._desk.put(Send(self._session.stream_id, message))

    def _send_urgent(self, message: pb.ConnectRequest) -> None:
        self._desk.urgent.append(Send(self._session.stream_id, message, urgent=True))

    def _greet(self, now_ns: int) -> None:
        self._leases.pause_logs()
        self._session.greet(now_ns)
        for lease in self._leases:
            lease.listed = lease.phase
        profile = self._profile
        interval = Duration()
        interval.FromTimedelta(profile.heartbeat_interval)
        hello = pb.Hello(
            protocol_version=timing.PROTOCOL_VERSION,
            version=profile.version,
            agent_id=profile.agent_id,
            agent_name=profile.agent_name,
            session_id=self._session.session_id,
            host=profile.host,
            inventory=profile.inventory,
            runtimes=profile.runtimes,
            leases=[
                pb.HeldLease(
                    job_id=lease.job_id,
                    lease_id=lease.lease_id,
                    phase=job_pb2.LeasePhase.ValueType(lease.phase),
                )
                for lease in self._leases
            ],
            heartbeat_interval=interval,
        )
        self._send_urgent(pb.ConnectRequest(hello=hello))

    def _welcomed(self, message: pb.ConnectResponse, now_ns: int) -> None:
        if self._session.link is not Link.GREETING:
            return
        welcome = message.welcome
        self._session.welcome(welcome.session_id, welcome.epoch, now_ns)
        self._refused = ""
        self._leases.logs.window_bytes = welcome.max_unacked_log_bytes or DEFAULT_WINDOW_BYTES
        log.info(
            "connected",
            extra={
                "event": "welcomed",
                "session_id": welcome.session_id,
                "epoch": welcome.epoch,
                "server_version": welcome.version,
                "leases": len(self._leases),
            },
        )
        self._desk.events.unsend()
        self._leases.answered(welcome.leases, now_ns)
        self._leases.renew_all()
        stale = {answer.lease_id for answer in welcome.leases if answer.decision == pb.LEASE_DECISION_STALE}
        self._tell_of_ends(stale, now_ns)

    def _asked_for_hello(self, message: pb.ConnectResponse, now_ns: int) -> None:
        reason = message.hello_requested.reason
        log.info("the server asks for a new Hello", extra={"event": "hello_requested", "reason": reason})
        self._greet(now_ns)

    def _asked_to_reconnect(self, message: pb.ConnectResponse, now_ns: int) -> None:
        log.info("the server asks to connect again", extra={"event": "reconnect", "reason": message.reconnect.reason})
        self._leases.pause_logs()
        self._desk.put(CloseStream(self._session.stream_id, "asked to connect again"))
        self._session.retry_soon(now_ns)

    def _granted(self, message: pb.ConnectResponse, now_ns: int) -> None:
        grants = message.grants
        if self._is_current(grants.epoch, "grants"):
            for grant in grants.grants:
                self._leases.granted(grant, now_ns)

    def _revoked(self, message: pb.ConnectResponse, now_ns: int) -> None:
        revokes = message.revokes
        if self._is_current(revokes.epoch, "revokes"):
            for revoke in revokes.revokes:
                self._leases.revoked(revoke, now_ns)
            stale = {revoke.lease_id for revoke in revokes.revokes if revoke.reason == pb.REVOKE_REASON_STALE}
            self._tell_of_ends(stale, now_ns)

    def _tell_of_ends(self, stale: Iterable[int], now_ns: int) -> None:
        """Says Hello again if one of the leases said to be over has ended unbeknown to whoever said so."""
        held = [lease for lease_id in stale if (lease := self._leases.get(lease_id)) is not None]
        if any(lease.owes_an_end for lease in held):
            self._greet(now_ns)

    def _acked(self, message: pb.ConnectResponse, now_ns: int) -> None:
        ack = message.ack
        if ack.heartbeat_seq and self._session.heartbeat_acked(ack.heartbeat_seq, now_ns):
            self._leases.renew_all()
        if ack.event_seqs:
            self._leases.events_acked(ack.event_seqs)
        for position in ack.logs:
            self._leases.log_acked(position, now_ns)

    def _is_current(self, epoch: int, kind: str) -> bool:
        if epoch >= self._session.epoch:
            return True
        log.warning(
            "message of an older epoch ignored",
            extra={"event": "old_epoch", "kind": kind, "epoch": epoch, "current": self._session.epoch},
        )
        return False

    def _beat(self, now_ns: int) -> None:
        if now_ns - self._session.hello_sent_ns >= ASK_AGAIN_NS and any(lease.unanswered for lease in self._leases):
            self._greet(now_ns)
            return
        seq = self._session.beat(now_ns)
        heartbeat = pb.Heartbeat(seq=seq, lease_ids=self._leases.ids(), gpus=self._gpus)
        self._send_urgent(pb.ConnectRequest(heartbeat=heartbeat))
        self._desk.sweep()

    def _drop_stream(self, reason: str, now_ns: int) -> None:
        self._leases.pause_logs()
        self._desk.put(CloseStream(self._session.stream_id, reason))
        delay_ns = self._session.back_off(now_ns)
        log.warning(
            "stream given up; leases stand",
            extra={"event": "stream_dropped", "reason": reason, "retry_in_ms": delay_ns // 1_000_000},
        )
