"""The agent's protocol core: one object that is told what happened and says what to do.

It reads no clock, holds no socket and starts no task: every method takes the
time (CLOCK_BOOTTIME nanoseconds) and returns actions in order. The supervisor
drives it on a host, the simulator in virtual time; same inputs, same actions.
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
from lessor_agent.protocol.logflow import DEFAULT_WINDOW_BYTES, RESEND_AFTER_NS, allot
from lessor_agent.protocol.outcomes import Ending
from lessor_agent.protocol.session import WELCOME_TIMEOUT_NS, Link, Session
from lessor_agent.runtimes.base import Handle

log = logging.getLogger(__name__)

PROGRESS_INTERVAL_NS = 100_000_000
"""Progress of one lease is sent at most this often."""

PROTOCOL_UNSUPPORTED = "PROTOCOL_UNSUPPORTED"
AGENT_IDENTITY_IN_USE = "AGENT_IDENTITY_IN_USE"
"""Reasons of refusals that a quick retry cannot heal."""


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
        self._window_bytes = DEFAULT_WINDOW_BYTES
        self._gpus: tuple[pb.GpuReading, ...] = ()
        self._refused = ""

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

    def start(self, now_ns: int) -> list[Action]:
        """Settles what was restored and opens the first stream."""
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
        """Returns when :meth:`tick` has something to do; None: nothing until something happens."""
        session = self._session
        if session.link is Link.DOWN:
            return session.retry_at_ns
        if session.link in (Link.CONNECTING, Link.GREETING):
            return session.hello_sent_ns + WELCOME_TIMEOUT_NS
        if session.link is Link.CLOSED:
            return None
        times = [session.heartbeat_due_ns, session.silent_at_ns]
        if (resend_ns := self._desk.events.resend_ns) is not None:
            times.append(resend_ns)
        for lease in self._leases:
            if lease.progress is not None:
                times.append(lease.progress_due_ns)
            if lease.log.is_open and lease.log.in_flight:
                times.append(lease.log.moved_ns + RESEND_AFTER_NS)
        return min(times)

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
        self._pause()
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
        kind = message.WhichOneof("message")
        if stream_id != session.stream_id or session.link not in (Link.GREETING, Link.UP):
            return self._finish(now_ns)
        if kind == "welcome":
            if session.link is Link.GREETING:
                self._welcomed(message.welcome, now_ns)
        elif kind == "hello_requested":
            self._asked_for_hello(message.hello_requested, now_ns)
        elif kind == "reconnect":
            self._asked_to_reconnect(message.reconnect, now_ns)
        elif session.link is Link.GREETING:
            # Sent before the server saw the Hello: of an older epoch.
            log.debug("message before Welcome ignored", extra={"event": "ignored", "kind": kind})
        elif kind == "grants":
            if self._is_current(message.grants.epoch, "grants"):
                for grant in message.grants.grants:
                    self._leases.granted(grant, now_ns)
        elif kind == "revokes":
            if self._is_current(message.revokes.epoch, "revokes"):
                for revoke in message.revokes.revokes:
                    self._leases.revoked(revoke, now_ns)
        elif kind == "ack":
            self._acked(message.ack, now_ns)
        return self._finish(now_ns)

    def shutdown(self, reason: str, now_ns: int) -> list[Action]:
        """The agent leaves on purpose: says Goodbye. Its leases stand."""
        session = self._session
        if session.link is Link.UP:
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
        lease = self._leases.get(lease_id)
        if lease is not None and self._session.link is Link.UP:
            self._send_progress(lease_ids=(lease_id,), now_ns=now_ns, at_once=True)
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
        lease = self._leases.get(lease_id)
        if lease is not None and not lease.abandoned:
            lease.progress = progress
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
        """Sends what may be sent by now, and returns all actions."""
        if self._session.link is Link.UP:
            self._send_progress(self._leases.ids(), now_ns)
            for events in self._desk.events.take_unsent(now_ns):
                self._send(pb.ConnectRequest(lease_events=events))
            self._send_logs(now_ns)
        return self._desk.take()

    def _send(self, message: pb.ConnectRequest, *, urgent: bool = False) -> None:
        self._desk.put(Send(self._session.stream_id, message, urgent))

    def _greet(self, now_ns: int) -> None:
        self._pause()
        self._session.greet(now_ns)
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
        self._send(pb.ConnectRequest(hello=hello), urgent=True)

    def _welcomed(self, welcome: pb.Welcome, now_ns: int) -> None:
        self._session.welcome(welcome.session_id, welcome.epoch, now_ns)
        self._refused = ""
        self._window_bytes = welcome.max_unacked_log_bytes or DEFAULT_WINDOW_BYTES
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

    def _asked_for_hello(self, request: pb.HelloRequested, now_ns: int) -> None:
        log.info("the server asks for a new Hello", extra={"event": "hello_requested", "reason": request.reason})
        self._greet(now_ns)

    def _asked_to_reconnect(self, request: pb.Reconnect, now_ns: int) -> None:
        log.info("the server asks to connect again", extra={"event": "reconnect", "reason": request.reason})
        self._pause()
        self._desk.put(CloseStream(self._session.stream_id, "asked to connect again"))
        self._session.retry_soon(now_ns)

    def _acked(self, ack: pb.Ack, now_ns: int) -> None:
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
        seq = self._session.beat(now_ns)
        heartbeat = pb.Heartbeat(seq=seq, lease_ids=self._leases.ids(), gpus=self._gpus)
        self._send(pb.ConnectRequest(heartbeat=heartbeat), urgent=True)
        self._desk.sweep()

    def _drop_stream(self, reason: str, now_ns: int) -> None:
        self._pause()
        self._desk.put(CloseStream(self._session.stream_id, reason))
        delay_ns = self._session.back_off(now_ns)
        log.warning(
            "stream given up; leases stand",
            extra={"event": "stream_dropped", "reason": reason, "retry_in_ms": delay_ns // 1_000_000},
        )

    def _pause(self) -> None:
        """No log flows until the server says again where each one stands."""
        for lease in self._leases:
            lease.log.pause()

    def _send_progress(self, lease_ids: Iterable[int], now_ns: int, *, at_once: bool = False) -> None:
        updates = []
        for lease_id in lease_ids:
            lease = self._leases.get(lease_id)
            if lease is None or lease.progress is None or (now_ns < lease.progress_due_ns and not at_once):
                continue
            updates.append(pb.ProgressUpdate(job_id=lease.job_id, lease_id=lease_id, progress=lease.progress))
            lease.progress = None
            lease.progress_due_ns = now_ns + PROGRESS_INTERVAL_NS
        if updates:
            self._send(pb.ConnectRequest(progress=pb.ProgressUpdates(updates=updates)))

    def _send_logs(self, now_ns: int) -> None:
        for lease in self._leases:
            if lease.log.is_open:
                lease.log.check(now_ns)
        for lease_id, chunk in allot(
            ((lease.lease_id, lease.log) for lease in self._leases), self._window_bytes, now_ns
        ):
            lease_or_none = self._leases.get(lease_id)
            job_id = lease_or_none.job_id if lease_or_none is not None else ""
            self._desk.put(
                SendLog(
                    self._session.stream_id,
                    job_id,
                    lease_id,
                    chunk.offset,
                    chunk.stream,
                    chunk.file_offset,
                    chunk.length,
                )
            )
