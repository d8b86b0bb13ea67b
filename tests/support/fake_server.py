"""An AgentService in the test's own process: the test is the server and says every word."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc import aio
from grpc_status import rpc_status

from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import agent_service_pb2_grpc as pb_grpc
from tests.support.agent_core import a_grant, keep, log_position

WAIT_S = 60.0


class Connection:
    """One stream of one agent, seen from the server."""

    def __init__(self, epoch: int) -> None:
        """Made by :class:`FakeAgentServer`."""
        self.epoch = epoch
        self.received: list[pb.ConnectRequest] = []
        """Everything the agent has said, in order."""
        self.ended = False
        """The agent's side is over."""
        self.acks_heartbeats = True
        self.acks_events = True
        self.acks_logs = True
        self._outgoing: asyncio.Queue[pb.ConnectResponse | None] = asyncio.Queue()
        self._news = asyncio.Event()
        self._logs: dict[int, tuple[bytearray, bytearray]] = {}

    # ── saying ───────────────────────────────────────────────────────────────

    def say(self, message: pb.ConnectResponse) -> None:
        """Sends a message to the agent."""
        self._outgoing.put_nowait(message)

    def drop(self) -> None:
        """Ends the stream, as a server does that stops."""
        self._outgoing.put_nowait(None)

    async def welcome(self, *answers: pb.LeaseAnswer, keep_all: bool = True, window: int = 0) -> pb.Hello:
        """Waits for Hello and answers it; leases without an answer are kept unless ``keep_all`` is off."""
        hello = (await self.expect("hello")).hello
        given = {answer.lease_id for answer in answers}
        others = [self._as_stored(lease.lease_id) for lease in hello.leases if lease.lease_id not in given]
        self.say(
            pb.ConnectResponse(
                welcome=pb.Welcome(
                    session_id=hello.session_id or 1,
                    epoch=self.epoch,
                    protocol_version=1,
                    leases=[*answers, *(others if keep_all else [])],
                    max_unacked_log_bytes=window,
                )
            )
        )
        return hello

    def grant(self, *grants: pb.Grant) -> None:
        """Grants leases."""
        self.say(pb.ConnectResponse(grants=pb.Grants(epoch=self.epoch, grants=grants)))

    def grant_ids(self, *lease_ids: int) -> None:
        """Grants leases of small jobs."""
        self.grant(*(a_grant(lease_id) for lease_id in lease_ids))

    def revoke(self, lease_id: int, reason: pb.RevokeReason.ValueType) -> None:
        """Asks a lease back."""
        revoke = pb.Revoke(job_id=f"job-{lease_id}", lease_id=lease_id, reason=reason)
        self.say(pb.ConnectResponse(revokes=pb.Revokes(epoch=self.epoch, revokes=[revoke])))

    def ack_events(self, seqs: Iterable[int]) -> None:
        """Acks durable events."""
        self.say(pb.ConnectResponse(ack=pb.Ack(event_seqs=seqs)))

    # ── hearing ──────────────────────────────────────────────────────────────

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until ``condition`` holds; it is asked again after every message.

        Raises:
            TimeoutError: It did not hold in time.
        """
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def expect(self, field: str) -> pb.ConnectRequest:
        """Returns the first message that carries ``field``, once it has come."""
        await self.until(lambda: any(message.WhichOneof("message") == field for message in self.received))
        return next(message for message in self.received if message.WhichOneof("message") == field)

    async def event(self, lease_id: int, kind: str) -> pb.LeaseEvent:
        """Returns the first event of ``kind`` of a lease, once it has come."""
        await self.until(lambda: kind in self.events(lease_id))
        return next(event for event in self.all_events(lease_id) if event.WhichOneof("event") == kind)

    def all_events(self, lease_id: int) -> list[pb.LeaseEvent]:
        """Returns the events of a lease so far."""
        return [
            event for message in self.received for event in message.lease_events.events if event.lease_id == lease_id
        ]

    def events(self, lease_id: int) -> list[str]:
        """Returns the kinds of the events of a lease so far."""
        return [event.WhichOneof("event") or "" for event in self.all_events(lease_id)]

    def heartbeats(self) -> list[pb.Heartbeat]:
        """Returns the heartbeats so far."""
        return [message.heartbeat for message in self.received if message.HasField("heartbeat")]

    def log(self, lease_id: int, stream: int) -> bytes:
        """Returns what is stored of an output stream (1: stdout, 2: stderr)."""
        return bytes(self._logs.get(lease_id, (b"", b""))[stream - 1])

    def restore_logs(self, other: Connection) -> None:
        """Takes over what another connection stored: the same server, a new stream."""
        self._logs = other._logs

    # ── inside ───────────────────────────────────────────────────────────────

    def take(self, message: pb.ConnectRequest) -> None:
        """Takes a message of the agent, and acks it as a server does."""
        self.received.append(message)
        if message.HasField("heartbeat") and self.acks_heartbeats:
            self.say(pb.ConnectResponse(ack=pb.Ack(heartbeat_seq=message.heartbeat.seq)))
        elif message.HasField("lease_events") and self.acks_events:
            self.ack_events(event.seq for event in message.lease_events.events)
        elif message.HasField("log_chunks") and self.acks_logs:
            for chunk in message.log_chunks.chunks:
                self._store(chunk)
        self._news.set()

    def finish(self) -> None:
        """The agent's side is over."""
        self.ended = True
        self._news.set()

    async def outgoing(self) -> AsyncIterator[pb.ConnectResponse]:
        """Yields what the test says."""
        while (message := await self._outgoing.get()) is not None:
            yield message

    def _store(self, chunk: pb.LogChunk) -> None:
        stdout, stderr = self._logs.setdefault(chunk.lease_id, (bytearray(), bytearray()))
        if chunk.offset == len(stdout) + len(stderr):
            (stdout if chunk.stream == 1 else stderr).extend(chunk.data)
        position = log_position(chunk.lease_id, len(stdout), len(stderr))
        self.say(pb.ConnectResponse(ack=pb.Ack(logs=[position])))

    def _as_stored(self, lease_id: int) -> pb.LeaseAnswer:
        stdout, stderr = self._logs.get(lease_id, (b"", b""))
        return keep(lease_id, len(stdout), len(stderr))


class FakeAgentServer(pb_grpc.AgentServiceServicer):
    """Listens on a free port of the loopback; each stream becomes a :class:`Connection`."""

    def __init__(self) -> None:
        """Makes a server; use it as an asynchronous context manager."""
        self.port = 0
        self.connections: list[Connection] = []
        self.refusal: str | None = None
        """If set, every stream is refused with this reason."""
        self._fresh: asyncio.Queue[Connection] = asyncio.Queue()
        self._server: aio.Server | None = None

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    async def __aenter__(self) -> FakeAgentServer:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listens, on the same port as before if it did before."""
        self._server = aio.server()
        pb_grpc.add_AgentServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        """Ends every stream and stops listening."""
        for connection in self.connections:
            connection.drop()
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    async def connection(self) -> Connection:
        """Returns the next stream that an agent opens."""
        async with asyncio.timeout(WAIT_S):
            return await self._fresh.get()

    async def welcomed(self, after: Connection | None = None) -> Connection:
        """Returns the next stream, its Hello answered; everything held is kept."""
        connection = await self.connection()
        if after is not None:
            connection.restore_logs(after)
        await connection.welcome()
        return connection

    async def Connect(
        self, request_iterator: AsyncIterator[pb.ConnectRequest], context: Any
    ) -> AsyncIterator[pb.ConnectResponse]:
        """Serves one stream."""
        if self.refusal is not None:
            await context.abort_with_status(_refused(self.refusal))
        connection = Connection(len(self.connections) + 1)
        self.connections.append(connection)
        self._fresh.put_nowait(connection)
        reader = asyncio.create_task(self._read(connection, request_iterator))
        try:
            async for message in connection.outgoing():
                yield message
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            connection.finish()

    async def _read(self, connection: Connection, requests: AsyncIterator[pb.ConnectRequest]) -> None:
        try:
            async for message in requests:
                connection.take(message)
        finally:
            connection.finish()
            connection.drop()


def _refused(reason: str) -> grpc.Status:
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="lessor"))
    status = status_pb2.Status(code=code_pb2.FAILED_PRECONDITION, message=f"refused: {reason}", details=[detail])
    return rpc_status.to_status(status)
