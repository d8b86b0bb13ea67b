"""AgentService: one stream per agent.

The handler's task only reads; a second task writes. Database work is done by the
group commits' own tasks, so that a stream that breaks cancels no commit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import grpc

from lessor import __version__, timing
from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import agent_service_pb2_grpc
from lessor_server.bells import Bells
from lessor_server.domain.errors import LessorServerError, ProtocolUnsupported, ProtocolViolation, Stopping
from lessor_server.sessions import convert
from lessor_server.sessions.commits import AgentCommits, Renewal
from lessor_server.sessions.delivery import Delivery
from lessor_server.sessions.readings import GpuReadings
from lessor_server.sessions.stream import AgentStream, Streams
from lessor_server.store.database import Database
from lessor_server.store.hello import commit_session, hold_back, take_standing
from lessor_server.store.logs import Chunk, Position
from lessor_server.store.reports import Report, Verdict

logger = logging.getLogger(__name__)

MAX_UNACKED_LOG_BYTES = 4 << 20
MAX_UNANSWERED_LOG_BYTES = 2 * MAX_UNACKED_LOG_BYTES
"""An agent that sends more than it was told it may, or the same again and again, is not let into our memory."""
_HELLO_TIMEOUT_S = 10.0

T = TypeVar("T")
Context = grpc.aio.ServicerContext[pb.ConnectRequest, pb.ConnectResponse]


class AgentServicer(agent_service_pb2_grpc.AgentServiceServicer):
    """Serves agents' streams on this replica."""

    def __init__(
        self,
        database: Database,
        streams: Streams,
        commits: AgentCommits,
        delivery: Delivery,
        readings: GpuReadings,
        bells: Bells,
        replica: str,
    ) -> None:
        self._database = database
        self._streams = streams
        self._commits = commits
        self._delivery = delivery
        self._readings = readings
        self._bells = bells
        self._replica = replica
        self._open: set[AgentStream] = set()
        self._all_ended = asyncio.Event()
        self._all_ended.set()
        self._background: set[asyncio.Task[Any]] = set()
        self._stopping = False

    async def Connect(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.ConnectRequest], context: Context
    ) -> None:
        """Runs one stream to its end. Leases stand, however it ends."""
        if self._stopping:
            raise Stopping
        stream = AgentStream(context.peer())
        self._open.add(stream)
        self._all_ended.clear()
        writer = asyncio.create_task(self._write(stream, context), name=f"agent-writer-{stream.peer}")
        reader = asyncio.create_task(self._read(stream, request_iterator), name=f"agent-reader-{stream.peer}")
        try:
            ends: set[asyncio.Future[Any]] = {writer, reader, stream.given_up}
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for end in done - {stream.given_up}:
                end.result()
            if stream.given_up.done():
                fields = {"event": "given_up", "agent_id": stream.agent_id, "reason": stream.given_up.result()}
                logger.warning("an agent's stream is given up", extra=fields)
        finally:
            self._open.discard(stream)
            if not self._open:
                self._all_ended.set()
            self._streams.remove(stream)
            for task in (writer, reader):
                task.cancel()
            await asyncio.gather(writer, reader, return_exceptions=True)
            logger.info("an agent's stream ended", extra={"event": "stream_end", "agent_id": stream.agent_id})

    async def stop(self) -> None:
        """Asks all agents to connect elsewhere. Leases stand."""
        self._stopping = True
        message = pb.ConnectResponse(reconnect=pb.Reconnect(reason="this server is stopping"))
        for stream in list(self._open):
            stream.send(message)

    async def ended(self, timeout_s: float) -> None:
        """Waits until all streams have ended, at most ``timeout_s`` seconds."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._all_ended.wait(), timeout_s)

    async def _write(self, stream: AgentStream, context: Context) -> None:
        while True:
            for message in await stream.next_messages():
                await context.write(message)

    async def _read(self, stream: AgentStream, requests: AsyncIterator[pb.ConnectRequest]) -> None:
        try:
            first = await asyncio.wait_for(anext(aiter(requests), None), _HELLO_TIMEOUT_S)
        except TimeoutError:
            # The network may be cut one way: the agent, told by nothing but the end, connects again.
            logger.warning("a stream brought no hello", extra={"event": "no_hello", "peer": stream.peer})
            return
        if first is None:
            return
        if first.WhichOneof("message") != "hello":
            raise ProtocolViolation("", f"sent {first.WhichOneof('message')} before hello")
        await self._hello(stream, first.hello)
        async for request in requests:
            kind = request.WhichOneof("message")
            try:
                if kind == "heartbeat":
                    self._heartbeat(stream, request.heartbeat)
                elif kind == "lease_events":
                    self._events(stream, request.lease_events)
                elif kind == "log_chunks":
                    self._logs(stream, request.log_chunks)
                elif kind == "progress":
                    updates = [convert.progress(update, stream.agent_id) for update in request.progress.updates]
                    self._commits.progress.submit_all(updates)
                elif kind == "hello":
                    await self._hello(stream, request.hello)
                elif kind == "goodbye":
                    logger.info(
                        "an agent says goodbye",
                        extra={"event": "goodbye", "agent_id": stream.agent_id, "reason": request.goodbye.reason},
                    )
                    return
            except ValueError as error:
                raise ProtocolViolation(stream.agent_name, f"sent {kind} with a bad value: {error}") from None

    async def _hello(self, stream: AgentStream, hello: pb.Hello) -> None:
        """Commits a Hello and answers it. A committed Hello counts as a heartbeat."""
        if not timing.MIN_PROTOCOL_VERSION <= hello.protocol_version <= timing.PROTOCOL_VERSION:
            raise ProtocolUnsupported(hello.protocol_version, timing.MIN_PROTOCOL_VERSION, timing.PROTOCOL_VERSION)
        if stream.agent_id and hello.agent_id != stream.agent_id:
            raise ProtocolViolation(stream.agent_name, f"said hello as {hello.agent_id} on the stream of another")
        try:
            held = [convert.held(lease) for lease in hello.leases]
            facts = convert.agent_facts(hello)
        except ValueError as error:
            raise ProtocolViolation(hello.agent_name, f"said hello with a bad value: {error}") from None
        self._streams.remove(stream)
        await self._own_task(hold_back(self._database, hello.agent_id, held))
        session = await self._own_task(commit_session(self._database, facts, hello.session_id, self._replica))
        standing = await self._own_task(take_standing(self._database, hello.agent_id, session, held))
        stream.agent_id, stream.agent_name = hello.agent_id, hello.agent_name
        stream.held = frozenset(lease.lease_id for lease in held)
        stream.begin_session(session.session_id, session.epoch)
        replaced = self._streams.put(stream)
        if replaced is not None:
            replaced.give_up("the agent has connected again")
        answers = [
            pb.LeaseAnswer(lease_id=a.lease_id, decision=a.decision, log=convert.log_position(a.log))
            for a in standing.answers
        ]
        stream.send(
            pb.ConnectResponse(
                welcome=pb.Welcome(
                    session_id=session.session_id,
                    epoch=session.epoch,
                    protocol_version=min(hello.protocol_version, timing.PROTOCOL_VERSION),
                    version=__version__,
                    leases=answers,
                    max_unacked_log_bytes=MAX_UNACKED_LOG_BYTES,
                )
            )
        )
        self._delivery.revokes(
            session.session_id,
            standing.unlisted,
            pb.REVOKE_REASON_NOT_LISTED,
            asyncio.get_running_loop().time(),
        )
        self._bells.changed(fleet=True, leases=True)
        logger.info(
            "an agent said hello",
            extra={
                "event": "hello",
                "agent_id": stream.agent_id,
                "agent": stream.agent_name,
                "session_id": session.session_id,
                "epoch": session.epoch,
                "resumed": session.resumed,
                "leases": len(held),
            },
        )

    async def _own_task(self, work: Any) -> Any:
        """Runs database work in a task of its own: a stream that breaks does not cancel it."""
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return await asyncio.shield(task)

    def _heartbeat(self, stream: AgentStream, heartbeat: pb.Heartbeat) -> None:
        stream.held = frozenset(heartbeat.lease_ids)
        for lease_id in stream.heartbeats_since:
            stream.heartbeats_since[lease_id] += 1
        if heartbeat.gpus:
            self._readings.note(stream.agent_id, heartbeat.gpus)
        session_id, epoch, seq = stream.session_id, stream.epoch, heartbeat.seq

        def renewed(ok: bool) -> None:
            if (stream.session_id, stream.epoch) != (session_id, epoch):
                return
            if ok:
                stream.ack_heartbeat(seq)
            else:
                reason = f"session {session_id} has moved on from epoch {epoch}"
                stream.send(pb.ConnectResponse(hello_requested=pb.HelloRequested(reason=reason)))

        _then(self._commits.renewals.submit(Renewal(session_id, epoch)), renewed)

    def _events(self, stream: AgentStream, message: pb.LeaseEvents) -> None:
        reports = [convert.report(event, stream.agent_id, stream.session_id, stream.epoch) for event in message.events]
        seqs = [event.seq for event in message.events]
        self._commits.reports.submit_all(reports).add_done_callback(
            lambda outcomes: self._judged(stream, reports, seqs, outcomes.result())
        )

    def _judged(
        self,
        stream: AgentStream,
        reports: Sequence[Report],
        seqs: Sequence[int],
        outcomes: Sequence[Verdict | Exception],
    ) -> None:
        """Acks what is settled. After an error nothing is said: the agent says it again."""
        settled: list[int] = []
        stale: list[tuple[int, int]] = []
        for report, seq, outcome in zip(reports, seqs, outcomes, strict=True):
            if isinstance(outcome, Exception):
                _note_uncommitted(outcome)
            elif outcome is not Verdict.SUPERSEDED:
                settled.append(seq)
                stream.told.pop((report.lease_id, 0), None)
                if outcome is Verdict.STALE:
                    stale.append((report.job_number, report.lease_id))
        if settled:
            stream.ack_events(settled)
        if stale:
            now_s = asyncio.get_running_loop().time()
            self._delivery.revokes(stream.session_id, stale, pb.REVOKE_REASON_STALE, now_s)

    def _logs(self, stream: AgentStream, message: pb.LogChunks) -> None:
        chunks: list[Chunk] = []
        size = 0
        for chunk in message.chunks:
            if stream.unanswered_log_bytes + size > MAX_UNANSWERED_LOG_BYTES:
                # The rest is left out: the agent sends again from what is acked.
                break
            size += len(chunk.data)
            chunks.append(convert.chunk(chunk, stream.agent_id))
        stream.unanswered_log_bytes += size

        def stored(outcomes: asyncio.Future[list[Position | Exception]]) -> None:
            stream.unanswered_log_bytes -= size
            for outcome in outcomes.result():
                if isinstance(outcome, Exception):
                    _note_uncommitted(outcome)
                else:
                    stream.ack_log(convert.log_position(outcome))

        self._commits.logs.submit_all(chunks).add_done_callback(stored)


def _then(future: asyncio.Future[T], use: Callable[[T], None]) -> None:
    """Calls ``use`` with the future's result. After an error nothing is said: the agent says it again."""

    def done(finished: asyncio.Future[T]) -> None:
        if finished.cancelled():
            return
        error = finished.exception()
        if error is None:
            use(finished.result())
        else:
            _note_uncommitted(error)

    future.add_done_callback(done)


def _note_uncommitted(error: BaseException) -> None:
    if isinstance(error, LessorServerError):
        logger.warning("a commit waits for the agent to repeat", extra={"event": "uncommitted", "error": error.message})
