"""The gRPC stream to the server: one channel and one call per stream, heartbeats first."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from lessor.v1 import agent_service_pb2 as pb
from lessor_agent.protocol.core import Loss

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
WINDOW_BYTES = 4 * 1024 * 1024
"""What the server may send before it was read: the grants of one message."""
MAX_OUTBOX_BYTES = 32 * 1024 * 1024
MAX_OUTBOX_MESSAGES = 10_000
"""A stream that lets more pile up is stuck and given up; what was durable is sent again on the next."""

GOODBYE_WAIT_S = 3.0
"""How long a Goodbye may take to reach the server."""

CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # Without it a peer that no longer answers pings is noticed only after a minute.
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),
    # The window is given: to find it by probing takes a ping for nearly every ack.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
    # The core decides when to try again: a channel must not sit out a backoff
    # of its own, nor share one with the channel before it.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)

_STATUS_DETAILS = "grpc-status-details-bin"

_CONNECT = f"/{pb.DESCRIPTOR.services_by_name['AgentService'].full_name}/Connect"


class StreamListener(Protocol):
    """Who is told what happens to the streams. Called on the event loop."""

    def stream_opened(self, stream_id: int) -> None:
        """The stream takes messages."""

    def stream_message(self, stream_id: int, message: pb.ConnectResponse) -> None:
        """The server said something."""

    def stream_lost(self, stream_id: int, loss: Loss) -> None:
        """The stream is over, other than by :meth:`Streams.close`."""


class Streams(Protocol):
    """Opens, writes and closes streams; what the supervisor needs of a connection."""

    def open(self, stream_id: int, listener: StreamListener) -> None:
        """Opens a stream, after having closed any other."""

    def send(self, stream_id: int, message: pb.ConnectRequest, *, urgent: bool = False) -> None:
        """Queues a message; one for a stream that is not open is dropped. Never blocks."""

    def close(self, stream_id: int) -> None:
        """Closes a stream; a queued Goodbye still leaves, nothing of the stream is heard any more."""

    async def aclose(self) -> None:
        """Closes everything and waits until it is closed."""


class GrpcStreams:
    """Streams to one server address over gRPC."""

    def __init__(self, address: str) -> None:
        """Makes no connection yet.

        Args:
            address: ``host:port``.
        """
        self._address = address
        self._current: _Stream | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self, stream_id: int, listener: StreamListener) -> None:
        """See :class:`Streams`."""
        if self._current is not None:
            self._current.close()
        stream = _Stream(stream_id, self._address, listener)
        self._current = stream
        task = asyncio.create_task(stream.run(), name=f"stream-{stream_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def send(self, stream_id: int, message: pb.ConnectRequest, *, urgent: bool = False) -> None:
        """See :class:`Streams`."""
        if self._current is not None and self._current.stream_id == stream_id:
            self._current.outbox.put(message, urgent=urgent)

    def close(self, stream_id: int) -> None:
        """See :class:`Streams`."""
        if self._current is not None and self._current.stream_id == stream_id:
            self._current.close()
            self._current = None

    async def aclose(self) -> None:
        """See :class:`Streams`."""
        if self._current is not None:
            self._current.close()
            self._current = None
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)


class OutboxFull(Exception):
    """More messages wait than a working stream ever lets wait."""


class Outbox:
    """Messages that wait for the stream, encoded: heartbeats and hellos overtake the rest."""

    def __init__(self) -> None:
        """Begins empty."""
        self._urgent: deque[bytes] = deque()
        self._normal: deque[bytes] = deque()
        self._bytes = 0
        self._filled = asyncio.Event()
        self._over = False
        self.has_goodbye = False
        """A Goodbye was put, sent yet or not."""

    def put(self, message: pb.ConnectRequest, *, urgent: bool = False) -> None:
        """Adds a message."""
        # Encoded here, once: its size is counted, and gRPC sends it as it is.
        data = message.SerializeToString()
        (self._urgent if urgent else self._normal).append(data)
        self._bytes += len(data)
        self.has_goodbye = self.has_goodbye or message.HasField("goodbye")
        self._filled.set()

    def end(self) -> None:
        """Takes no more: :meth:`get` ends once everything was taken."""
        self._over = True
        self._filled.set()

    async def get(self) -> bytes | None:
        """Returns the next message, encoded; None: ended.

        Raises:
            OutboxFull: The stream is stuck.
        """
        while not self._urgent and not self._normal:
            if self._over:
                return None
            self._filled.clear()
            await self._filled.wait()
        if self._bytes > MAX_OUTBOX_BYTES or len(self._normal) > MAX_OUTBOX_MESSAGES:
            raise OutboxFull(f"{len(self._normal)} messages ({self._bytes} bytes) wait for the stream")
        data = (self._urgent or self._normal).popleft()
        self._bytes -= len(data)
        return data


_Call = aio.StreamStreamCall[bytes, pb.ConnectResponse]


class _Stream:
    """One stream, from its channel to its end."""

    def __init__(self, stream_id: int, address: str, listener: StreamListener) -> None:
        self.stream_id = stream_id
        self.outbox = Outbox()
        self._address = address
        self._listener: StreamListener | None = listener
        self._closing = asyncio.Event()

    def close(self) -> None:
        """Stops listening at once and has the stream closed."""
        self._listener = None
        self.outbox.end()
        self._closing.set()

    async def run(self) -> None:
        """Opens the stream and serves it until it is lost or closed."""
        channel = aio.insecure_channel(self._address, options=CHANNEL_OPTIONS)
        try:
            # The call waits for the connection; whatever is written first waits
            # with it, stamped before: a renewal can only count too little.
            connect = channel.stream_stream(
                _CONNECT, request_serializer=None, response_deserializer=pb.ConnectResponse.FromString
            )
            call: _Call = connect()  # type: ignore[call-arg]
            if self._listener is not None:
                self._listener.stream_opened(self.stream_id)
            loss = await self._serve(call)
        finally:
            await channel.close(None)
        if self._listener is not None and loss is not None:
            listener, self._listener = self._listener, None
            listener.stream_lost(self.stream_id, loss)

    async def _serve(self, call: _Call) -> Loss | None:
        reader = asyncio.create_task(self._read(call))
        writer = asyncio.create_task(self._write(call))
        closing = asyncio.create_task(self._closing.wait())
        tasks: tuple[asyncio.Task[Any], ...] = (reader, writer, closing)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if closing.done() and not reader.done() and self.outbox.has_goodbye:
                # The server ends its side once it has read the Goodbye.
                await asyncio.wait({reader}, timeout=GOODBYE_WAIT_S)
            if writer.done() and not reader.done() and not closing.done():
                # A write fails without saying why; the reader is about to hear it.
                await asyncio.wait({reader}, timeout=GOODBYE_WAIT_S)
            for task in (reader, writer):
                if task.done() and (loss := task.result()) is not None:
                    return loss
            return None if closing.done() else Loss("the server ended the stream")
        finally:
            # In this order: a channel closed under a reader that is being
            # cancelled leaks its socket.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            call.cancel()

    async def _read(self, call: _Call) -> Loss | None:
        try:
            while isinstance(message := await call.read(), pb.ConnectResponse):
                if self._listener is not None:
                    self._listener.stream_message(self.stream_id, message)
        except aio.AioRpcError as error:
            return loss_of(error)
        except asyncio.CancelledError:
            if call.cancelled():
                return Loss("the stream was cancelled")
            raise
        return Loss("the server ended the stream")

    async def _write(self, call: _Call) -> Loss | None:
        try:
            while (data := await self.outbox.get()) is not None:
                await call.write(data)
            await call.done_writing()
        except OutboxFull as error:
            return Loss(f"the stream is stuck: {error}")
        except (aio.AioRpcError, asyncio.InvalidStateError):
            return None
        return None


def loss_of(error: aio.AioRpcError) -> Loss:
    """Returns what a stream's status says: the server's words, and the reason of its ErrorInfo."""
    reason = ""
    metadata: Iterable[tuple[str, str | bytes]] = tuple(error.trailing_metadata() or ())  # type: ignore[arg-type]
    for key, value in metadata:
        if key == _STATUS_DETAILS and isinstance(value, bytes):
            with contextlib.suppress(ValueError):
                reason = _reason(value) or reason
    code = error.code()
    name = code.name if isinstance(code, grpc.StatusCode) else str(code)
    return Loss(f"{name}: {error.details() or 'no details'}", reason)


def _reason(data: bytes) -> str:
    for detail in status_pb2.Status.FromString(data).details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return str(info.reason)
    return ""
