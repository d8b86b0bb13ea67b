"""One channel to the server: options, deadlines, retries.

A call is tried again on UNAVAILABLE and on CANCELLED, after a backoff with jitter,
until the deadline; the request stays the same, so a ``request_id`` in it makes a
repeated mutation one mutation.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import grpc
from grpc import aio

from lessor.address import Address
from lessor.errors import ClientClosed, LessorError, RequestTimeout
from lessor.sdk.status import error_from, retry_delay, unreachable
from lessor.v1.fleet_service_pb2_grpc import FleetServiceStub
from lessor.v1.job_service_pb2_grpc import JobServiceStub

if TYPE_CHECKING:
    from lessor.v1.fleet_service_pb2_grpc import FleetServiceAsyncStub
    from lessor.v1.job_service_pb2_grpc import JobServiceAsyncStub

Request = TypeVar("Request")
Response = TypeVar("Response")

MAX_RECEIVE_BYTES = 64 * 1024 * 1024
KEEPALIVE_TIME = timedelta(seconds=20)
KEEPALIVE_TIMEOUT = timedelta(seconds=5)
CONNECT_TIMEOUT = timedelta(seconds=5)
"""For one try to connect."""
LONGEST_CONNECT = 2 * CONNECT_TIMEOUT
"""A stream that ends after this long had been connected."""

_GONE = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})
"""What a server that goes away leaves of its calls. CANCELLED is what gRPC makes of those that reach it while it stops,
however gracefully; a call that is cancelled here ends with :class:`asyncio.CancelledError` instead."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a client tries."""

    timeout: timedelta = timedelta(seconds=30)
    """For one call with all its retries; also how long a stream may stay cut."""
    connect_timeout: timedelta | None = None
    """Until the server has answered for the first time; None: ``timeout``."""
    backoff_initial: timedelta = timedelta(milliseconds=50)
    """Doubles with each try."""
    backoff_max: timedelta = timedelta(seconds=2)

    def backoff(self, tries: int) -> timedelta:
        """Returns the wait after ``tries`` (1, 2, …) failed tries, between half and all of its bound."""
        bound = min(self.backoff_initial * 2 ** min(tries - 1, 20), self.backoff_max)
        return timedelta(seconds=bound.total_seconds() * random.uniform(0.5, 1))


def channel_options(address: Address) -> list[tuple[str, int]]:
    """Returns the gRPC options of a client's channel to ``address``."""
    options = [
        ("grpc.keepalive_time_ms", _milliseconds(KEEPALIVE_TIME)),
        ("grpc.keepalive_timeout_ms", _milliseconds(KEEPALIVE_TIMEOUT)),
        # Without it a peer that is stopped but not dead goes unnoticed for a minute.
        ("grpc.http2.ping_timeout_ms", _milliseconds(KEEPALIVE_TIMEOUT)),
        ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
        ("grpc.max_send_message_length", -1),
        # The server restarts in a second or two: gRPC's own reconnect backoff would wait up to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", _milliseconds(CONNECT_TIMEOUT)),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
    if address.is_loopback:
        options.append(("grpc.enable_http_proxy", 0))
    return options


class Outage:
    """The time a call or a stream has gone without an answer, and the waits in between.

    A call's begins with the call. A stream's begins when the stream breaks, and
    is :meth:`over` at each message.
    """

    def __init__(self, connection: Connection, *, stream: bool = False) -> None:
        """Begins now."""
        self._connection = connection
        self._stream = stream
        self._tries = 0
        self._began = self._tried_at = connection.clock()

    @property
    def tries(self) -> int:
        """Tries failed so far."""
        return self._tries

    def over(self) -> None:
        """The server answered."""
        self._connection.answered = True
        self._tries = 0

    def remaining_s(self) -> float:
        """Returns the seconds left, at least 1 ms."""
        return max(0.001, self._began + self._connection.budget().total_seconds() - self._connection.clock())

    async def failed(self, error: aio.AioRpcError | None) -> None:
        """Waits before the next try after ``error`` (None: the stream ended by itself).

        Raises:
            LessorError: The error is final, or the next try would be too late.
        """
        connection = self._connection
        now = connection.clock()
        if self._stream and (self._tries == 0 or now - self._tried_at > LONGEST_CONNECT.total_seconds()):
            # A try that lasted longer than any connect was a quiet stream: it broke just now.
            self._tries, self._began = 0, now
        if error is not None and error.code() not in _GONE:
            translated = error_from(error, str(connection.address))
            if not isinstance(translated, RequestTimeout):
                connection.answered = True
            elif not connection.answered:
                translated = unreachable(str(connection.address), "the connection was not made in time")
            raise translated from None
        self._tries += 1
        delay = connection.patience.backoff(self._tries)
        if error is not None:
            delay = max(delay, retry_delay(error) or timedelta(0))
        if now + delay.total_seconds() >= self._began + connection.budget().total_seconds():
            if error is None:
                raise unreachable(str(connection.address), "it ends every stream")
            raise error_from(error, str(connection.address)) from None
        await connection.sleep(delay.total_seconds())
        self._tried_at = connection.clock()


class Connection:
    """The channel and the stubs of one client. Opened by first use, in the running event loop."""

    def __init__(
        self,
        address: Address,
        patience: Patience,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Takes the ``clock`` and ``sleep`` (seconds) that deadlines and backoffs go by."""
        self.address = address
        self.patience = patience
        self.clock = clock
        self.sleep = sleep
        self.answered = False
        """The server has answered once."""
        self._channel: aio.Channel | None = None
        self._jobs: JobServiceAsyncStub | None = None
        self._fleet: FleetServiceAsyncStub | None = None
        self._closed = False

    @property
    def jobs(self) -> JobServiceAsyncStub:
        """The JobService."""
        if self._jobs is None:
            self._jobs = JobServiceStub(self._open())
        return self._jobs

    @property
    def fleet(self) -> FleetServiceAsyncStub:
        """The FleetService."""
        if self._fleet is None:
            self._fleet = FleetServiceStub(self._open())
        return self._fleet

    def _open(self) -> aio.Channel:
        if self._closed:
            raise ClientClosed("the client is closed", remedy="make a new one")
        if self._channel is None:
            self._channel = aio.insecure_channel(str(self.address), options=channel_options(self.address))
        return self._channel

    async def close(self) -> None:
        """Closes the channel; open streams end. May be called twice."""
        self._closed = True
        channel, self._channel, self._jobs, self._fleet = self._channel, None, None, None
        if channel is not None:
            await channel.close(None)

    def budget(self) -> timedelta:
        """Returns how long a call may be tried now."""
        if self.answered or self.patience.connect_timeout is None:
            return self.patience.timeout
        return self.patience.connect_timeout

    async def call(
        self,
        method: aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        *,
        recover: Callable[[LessorError], Awaitable[Response | None]] | None = None,
    ) -> Response:
        """Makes one call, with retries.

        Args:
            method: Of a stub.
            request: Sent unchanged at each try.
            recover: Asked for the answer when a try after the first fails for
                good: the first may have done it. None: raise the error.

        Raises:
            LessorError: The call failed, or the deadline passed.
        """
        outage = Outage(self)
        while True:
            try:
                response = await method(request, timeout=outage.remaining_s())
            except aio.AioRpcError as error:
                tries = outage.tries
                try:
                    await outage.failed(error)
                except LessorError as final:
                    answer = await recover(final) if recover and tries else None
                    if answer is None:
                        raise
                    return answer
            except aio.UsageError as error:
                raise ClientClosed(f"the client is closed: {error}", remedy="make a new one") from None
            else:
                self.answered = True
                return response


def _milliseconds(duration: timedelta) -> int:
    return duration // timedelta(milliseconds=1)
