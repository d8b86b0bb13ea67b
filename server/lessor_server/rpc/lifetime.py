"""How long calls live: to their end when the client goes away, not longer than the server when it stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from lessor_server.domain.errors import Stopping
from lessor_server.rpc.handlers import Around, Call, Context, Rpc, Stream
from lessor_server.store.reads import undisturbed

T = TypeVar("T")


class CallLifetime(Around):
    """Ends calls when they should end.

    A call with one answer runs on when its client is gone: a commit is not cut
    off, a connection not left in the middle of an answer. A stream of answers
    ends with :class:`Stopping` once the server stops: its reader goes on
    elsewhere. Agents' streams are ended by their servicer.
    """

    def __init__(self, stopping: asyncio.Event) -> None:
        self._stopping = stopping

    async def answer(self, call: Call, context: Context, rpc: Rpc) -> Any:
        """Runs a call to its end; one that writes a stream, until it ends or the server stops.

        Raises:
            Stopping: The server stops.
        """

        async def run() -> Any:
            return await call()

        if not rpc.response_streaming:
            return await undisturbed(run())
        if rpc.request_streaming:
            return await call()
        stop = asyncio.create_task(self._wait())
        try:
            return await _before(stop, run())
        finally:
            stop.cancel()

    async def stream(self, call: Stream, context: Context, rpc: Rpc) -> AsyncGenerator[Any, None]:
        """Runs a stream until it ends or the server stops.

        Raises:
            Stopping: The server stops.
        """
        stop = asyncio.create_task(self._wait())
        try:
            async with aclosing(call()) as answers:
                while (answer := await _before(stop, _next(answers))) is not _END:
                    yield answer
        finally:
            stop.cancel()

    async def _wait(self) -> None:
        await self._stopping.wait()


_END = object()


async def _next(answers: AsyncIterator[Any]) -> Any:
    return await anext(answers, _END)


async def _before(stop: asyncio.Task[None], work: Coroutine[Any, Any, T]) -> T:
    """Returns what ``work`` does, unless ``stop`` is done first.

    Raises:
        Stopping: It was.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({stop, task}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Stopping
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
