"""How long calls live: to their end when the client goes away, not longer than the server when it stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from lessor_server.domain.errors import Stopping
from lessor_server.rpc.handlers import Around, Call, Context, Rpc, Stream
from lessor_server.store.reads import undisturbed


class CallLifetime(Around):
    """Ends calls when they should end.

    A call with one answer runs on when its client is gone: a commit is not cut
    off, a connection not left in the middle of an answer. A stream of answers
    ends with :class:`Stopping` once the server stops: its reader goes on
    elsewhere. Agents' streams are ended by their servicer.
    """

    def __init__(self) -> None:
        self._stopping = False
        self._waiting: set[asyncio.Task[Any]] = set()
        """Tasks of streams that wait for their next answer. One that is sending an answer looks afterwards."""
        self._interrupted: set[asyncio.Task[Any]] = set()

    def stop(self) -> None:
        """Ends all streams of answers, and lets none begin."""
        self._stopping = True
        self._interrupted |= self._waiting
        for task in self._waiting:
            task.cancel()

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
        with self._until_stop():
            return await call()

    async def stream(self, call: Stream, context: Context, rpc: Rpc) -> AsyncGenerator[Any, None]:
        """Runs a stream until it ends or the server stops.

        Raises:
            Stopping: The server stops.
        """
        async with aclosing(call()) as answers:
            while True:
                with self._until_stop():
                    answer = await anext(answers, _END)
                if answer is _END:
                    return
                yield answer

    @contextmanager
    def _until_stop(self) -> Iterator[None]:
        """Interrupts what is waited for in the block when the server stops: without a task of its own per answer.

        Raises:
            Stopping: The server stops. Whoever else cancels the task is heard all the same.
        """
        if self._stopping:
            raise Stopping
        task = asyncio.current_task()
        assert task is not None
        before = task.cancelling()
        self._waiting.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if task in self._interrupted and task.cancelling() == before + 1:
                raise Stopping from None
            raise
        finally:
            self._waiting.discard(task)
            if task in self._interrupted:
                self._interrupted.discard(task)
                task.uncancel()


_END = object()
