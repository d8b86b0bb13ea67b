"""Group commit: concurrent writes of one kind ride one statement.

Callers hand over items and get futures; a fixed worker takes whatever has come
in while the last batch was being committed, so that an idle system adds no
delay and a busy one fills its batches. Where the cost of a commit matters more
than a few milliseconds of it, a busy worker also waits for who is on the way.
A caller that goes away cancels nothing: the commit is the worker's.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar

import asyncpg

from lessor_server.domain.errors import LessorServerError, Stopping

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

Pause = Callable[[float], Awaitable[None]]

_MANY = 4
"""Callers in one batch from which on more are taken to be on their way."""
_GATHERING_STEPS = 4

Flush = Callable[[Sequence[Item]], Awaitable[Sequence[Result | Exception]]]
"""Commits a batch and returns per item, in order, its result or why it is refused. All or nothing."""


class _Handed(Generic[Item]):
    """Items handed over together, and the future that is to tell what became of each."""

    __slots__ = ("future", "items")

    def __init__(self, items: Sequence[Item], future: asyncio.Future[Any]) -> None:
        self.items = items
        self.future = future


class GroupCommit(Generic[Item, Result]):
    """Commits items in batches.

    A batch that Postgres refuses for its data is halved until the bad item is
    alone; only that one fails.
    """

    def __init__(
        self,
        name: str,
        flush: Flush[Item, Result],
        *,
        max_items: int,
        linger_s: float = 0.0,
        gather_s: float = 0.0,
        weight: Callable[[Item], int] | None = None,
        max_weight: int = 0,
        pause: Pause = asyncio.sleep,
    ) -> None:
        """
        Args:
            name: For logs.
            flush: Commits one batch.
            max_items: Most items of a batch.
            linger_s: Wait this long after the first item of a batch, in seconds.
            gather_s: After a batch of many callers, wait up to so long while more keep coming, in seconds.
            weight: Size of an item, for ``max_weight``.
            max_weight: Most weight of a batch; a heavier item goes alone.
            pause: Waits, in seconds.
        """
        self._name = name
        self._flush = flush
        self._max_items = max_items
        self._linger_s = linger_s
        self._gather_s = gather_s
        self._weight = weight
        self._max_weight = max_weight
        self._pause = pause
        self._callers = 0
        """Of the last batch."""
        self._queue: deque[_Handed[Item]] = deque()
        self._work = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._closing = False

    def start(self) -> None:
        """Starts the worker, on the running loop."""
        self._worker = asyncio.create_task(self._run(), name=f"group-commit-{self._name}")

    async def close(self) -> None:
        """Commits what was handed over, then ends the worker. New items are refused."""
        self._closing = True
        self._work.set()
        if self._worker is not None:
            await self._worker

    def submit(self, item: Item) -> asyncio.Future[Result]:
        """Hands over an item; the future tells its result, or the error of its commit.

        Raises (through the future):
            Stopping: The server is going away.
            DatabaseUnavailable: Whether it was committed is not known.
        """
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()

        def told(outcomes: asyncio.Future[list[Result | Exception]]) -> None:
            if result.done():
                return
            (outcome,) = outcomes.result()
            if isinstance(outcome, Exception):
                result.set_exception(outcome)
                # Whoever asked may be gone; an error nobody awaits is not news.
                result.exception()
            else:
                result.set_result(outcome)

        self.submit_all((item,)).add_done_callback(told)
        return result

    def submit_all(self, items: Sequence[Item]) -> asyncio.Future[list[Result | Exception]]:
        """Hands over items that came together, at a cost per call rather than per item.

        The future tells the result of each, or the error of its commit (as
        :meth:`submit` raises it), in order. They share a batch, however many.
        """
        future: asyncio.Future[list[Result | Exception]] = asyncio.get_running_loop().create_future()
        if self._closing:
            future.set_result([Stopping() for _ in items])
        elif not items:
            future.set_result([])
        else:
            self._queue.append(_Handed(items, future))
            self._work.set()
        return future

    async def commit(self, item: Item) -> Result:
        """Hands over an item and waits for it; a cancelled waiter does not cancel the commit."""
        (outcome,) = await asyncio.shield(self.submit_all((item,)))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def _run(self) -> None:
        while True:
            await self._work.wait()
            if not self._queue:
                if self._closing:
                    return
                self._work.clear()
                continue
            # At least one turn of the loop: what is ready to be handed over then rides along at no delay.
            await self._pause(0 if self._closing else self._linger_s)
            if self._gather_s and self._callers >= _MANY:
                await self._gather()
            if batch := self._take():
                self._callers = len(batch)
                await self._commit(batch)

    async def _gather(self) -> None:
        """Waits while callers keep coming. Each is answered a little later, and the same work commits more of them."""
        for _ in range(_GATHERING_STEPS):
            before = len(self._queue)
            if self._closing:
                return
            await self._pause(self._gather_s / _GATHERING_STEPS)
            if len(self._queue) == before:
                return

    def _take(self) -> list[_Handed[Item]]:
        batch: list[_Handed[Item]] = []
        count = weight = 0
        while self._queue:
            handed = self._queue[0]
            count += len(handed.items)
            if self._weight is not None:
                weight += sum(map(self._weight, handed.items))
            if batch and (count > self._max_items or (self._weight is not None and weight > self._max_weight)):
                break
            batch.append(self._queue.popleft())
        return batch

    async def _commit(self, batch: list[_Handed[Item]]) -> None:
        outcomes = await self._outcomes([item for handed in batch for item in handed.items])
        first = 0
        for handed in batch:
            last = first + len(handed.items)
            if not handed.future.done():
                handed.future.set_result(outcomes[first:last])
            first = last

    async def _outcomes(self, items: Sequence[Item]) -> list[Result | Exception]:
        """Commits items; returns the result of each, or why it was not committed."""
        try:
            return list(await self._flush(items))
        except (asyncpg.DataError, asyncpg.ProgramLimitExceededError) as error:
            if len(items) > 1:
                middle = len(items) // 2
                return await self._outcomes(items[:middle]) + await self._outcomes(items[middle:])
            logger.warning(
                "an item was refused", extra={"event": "commit_refused", "kind": self._name, "error": str(error)}
            )
            return [error]
        except LessorServerError as error:
            return [error] * len(items)
        except Exception as error:
            logger.exception(
                "a batch failed", extra={"event": "commit_failed", "kind": self._name, "items": len(items)}
            )
            return [error] * len(items)
