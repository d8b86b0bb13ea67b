"""The synchronous client: :class:`AsyncClient` driven on one background event loop per process.

Its methods are made from those of :class:`AsyncClient`, signatures, types and
docstrings included, so that the two cannot drift apart. One event loop serves
all clients of a process, because gRPC's asyncio support wants only one.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import inspect
import os
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from dataclasses import dataclass
from functools import update_wrapper
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from lessor.errors import ClientClosed
from lessor.sdk.aio import AsyncClient
from lessor.sdk.specs import DurationLike

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class _Background:
    """The event loop and the thread that runs it."""

    pid: int
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs ``work`` on the loop and returns its result; an interrupt of the caller cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise ClientClosed("the client was closed meanwhile", remedy="make a new one") from None
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """Ends the thread, so that gRPC is quiet before the interpreter goes."""
        if os.getpid() == self.pid and self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(timeout=5)


_lock = threading.Lock()
_background: _Background | None = None


def _in_background() -> _Background:
    """Returns this process's background loop, started at first use; a forked child gets its own."""
    global _background
    with _lock:
        if _background is None or _background.pid != os.getpid():
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, name="lessor-client", daemon=True)
            thread.start()
            _background = _Background(os.getpid(), loop, thread)
            atexit.register(_background.stop)
        return _background


def _blocking(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Client, P], T]:
    """Returns ``method`` as a method of Client that waits for the result."""

    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.run(lambda client: method(client, *args, **kwargs))

    return _like(call, method)


def _iterating(
    method: Callable[Concatenate[AsyncClient, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate[Client, P], Generator[T, None, None]]:
    """Returns ``method`` as a method of Client that is a generator. Leaving it early ends the stream."""

    def iterate(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Generator[T, None, None]:
        async def begin(client: AsyncClient) -> AsyncGenerator[T, None]:
            return method(client, *args, **kwargs)

        async def following(_: AsyncClient) -> tuple[T] | None:
            # StopAsyncIteration cannot travel through a future.
            async for item in items:
                return (item,)
            return None

        async def end(_: AsyncClient) -> None:
            await items.aclose()

        items = self.run(begin)
        try:
            while (item := self.run(following)) is not None:
                yield item[0]
        finally:
            if not self.is_closed:
                self.run(end)

    return _like(iterate, method)


def _like(made: Callable[P, T], method: Callable[..., Any]) -> Callable[P, T]:
    update_wrapper(made, method)
    del made.__wrapped__  # type: ignore[attr-defined]
    made.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
    made.__qualname__ = f"Client.{method.__name__}"
    made.__module__ = __name__
    return made


class Client:
    """Talks to a Lessor server. Safe to use from several threads.

    Use it as a ``with`` block, or :meth:`close` it::

        with lessor.Client() as client:
            submission = client.submit(["python", "train.py"], gpus=1, memory="4GiB")
            [job] = client.wait(submission)
            print(job.state, job.result)

    It works inside a running event loop too (a notebook), as it has its own
    thread. It does not survive a fork: make one in the child.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        timeout: DurationLike = 30,
        connect_timeout: DurationLike | None = None,
    ) -> None:
        """Prepares a client; see :class:`lessor.AsyncClient`, whose arguments these are."""
        self._client = AsyncClient(address, timeout=timeout, connect_timeout=connect_timeout)
        self._pid = os.getpid()
        self._closed = False

    @property
    def address(self) -> str:
        """The server's address, ``host:port``."""
        return self._client.address

    @property
    def is_closed(self) -> bool:
        """True after :meth:`close`."""
        return self._closed

    def run(self, work: Callable[[AsyncClient], Coroutine[Any, Any, T]]) -> T:
        """Runs ``work`` with the asynchronous client on its event loop and returns the result.

        Raises:
            ClientClosed: It was closed, or made before the process forked.
        """
        if self._closed:
            raise ClientClosed("the client is closed", remedy="make a new one")
        if self._pid != os.getpid():
            raise ClientClosed("the client was made before the process forked", remedy="make a new one in the child")
        return _in_background().run(work(self._client))

    def close(self) -> None:
        """Closes the connection; open iterators end. May be called twice."""
        if not self._closed and self._pid == os.getpid():
            self.run(AsyncClient.close)
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    submit = _blocking(AsyncClient.submit)
    submit_many = _blocking(AsyncClient.submit_many)
    get = _blocking(AsyncClient.get)
    list = _iterating(AsyncClient.list)
    watch = _iterating(AsyncClient.watch)
    wait = _blocking(AsyncClient.wait)
    logs = _iterating(AsyncClient.logs)
    attempts = _blocking(AsyncClient.attempts)
    cancel = _blocking(AsyncClient.cancel)
    retry = _blocking(AsyncClient.retry)
    explain = _blocking(AsyncClient.explain)
    agents = _blocking(AsyncClient.agents)
    agent = _blocking(AsyncClient.agent)
    gpus = _blocking(AsyncClient.gpus)
    leases = _iterating(AsyncClient.leases)
    drain = _blocking(AsyncClient.drain)
    undrain = _blocking(AsyncClient.undrain)
    queues = _blocking(AsyncClient.queues)
    queue = _blocking(AsyncClient.queue)
    create_queue = _blocking(AsyncClient.create_queue)
    update_queue = _blocking(AsyncClient.update_queue)
