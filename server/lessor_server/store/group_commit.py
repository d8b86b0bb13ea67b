"""Group commit: concurrent writes of one kind ride one statement.

Callers hand over items and get futures; a fixed worker takes whatever has come
in while the last batch was being committed, so that an idle system adds no
delay and a busy one fills its batches. A caller that goes away cancels nothing:
the commit is the worker's.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import asyncpg

from lessor_server.domain.errors import LessorServerError, Stopping

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

Flush = Callable[[Sequence[Item]], Awaitable[Sequence[Result]]]
"""Commits a batch and returns one result per item, in order. All or nothing."""


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
        workers: int = 1,
        linger_s: float = 0.0,
        weight: Callable[[Item], int] | None = None,
        max_weight: int = 0,
    ) -> None:
        """
        Args:
            name: For logs.
            flush: Commits one batch.
            max_items: Most items of a batch.
            workers: Batches under way at once; 1 keeps the items in order.
            linger_s: Wait this long after the first item of a batch, in seconds.
            weight: Size of an item, for ``max_weight``.
            max_weight: Most weight of a batch; a heavier item goes alone.
        """
        self._name = name
        self._flush = flush
        self._max_items = max_items
        self._worker_count = workers
        self._linger_s = linger_s
        self._weight = weight
        self._max_weight = max_weight
        self._queue: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._work = asyncio.Event()
        self._workers: list[asyncio.Task[None]] = []
        self._closing = False

    def start(self) -> None:
        """Starts the workers, on the running loop."""
        self._workers = [
            asyncio.create_task(self._run(), name=f"group-commit-{self._name}-{n}") for n in range(self._worker_count)
        ]

    async def close(self) -> None:
        """Commits what was handed over, then ends the workers. New items are refused."""
        self._closing = True
        self._work.set()
        await asyncio.gather(*self._workers)

    def submit(self, item: Item) -> asyncio.Future[Result]:
        """Hands over an item; the future tells its result, or the error of its commit.

        Raises (through the future):
            Stopping: The server is going away.
            DatabaseUnavailable: Whether it was committed is not known.
        """
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        if self._closing:
            future.set_exception(Stopping())
        else:
            self._queue.append((item, future))
            self._work.set()
        return future

    async def commit(self, item: Item) -> Result:
        """Hands over an item and waits for it; a cancelled waiter does not cancel the commit."""
        return await asyncio.shield(self.submit(item))

    async def _run(self) -> None:
        while True:
            await self._work.wait()
            if not self._queue:
                if self._closing:
                    return
                self._work.clear()
                continue
            if self._linger_s and not self._closing:
                await asyncio.sleep(self._linger_s)
            if batch := self._take():
                await self._commit(batch)

    def _take(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        weight = 0
        while self._queue and len(batch) < self._max_items:
            if self._weight is not None:
                weight += self._weight(self._queue[0][0])
                if batch and weight > self._max_weight:
                    break
            batch.append(self._queue.popleft())
        return batch

    async def _commit(self, batch: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        try:
            results = await self._flush([item for item, _ in batch])
        except (asyncpg.DataError, asyncpg.ProgramLimitExceededError) as error:
            if len(batch) > 1:
                middle = len(batch) // 2
                await self._commit(batch[:middle])
                await self._commit(batch[middle:])
                return
            logger.warning(
                "an item was refused", extra={"event": "commit_refused", "kind": self._name, "error": str(error)}
            )
            self._fail(batch, error)
        except LessorServerError as error:
            self._fail(batch, error)
        except Exception as error:
            logger.exception(
                "a batch failed", extra={"event": "commit_failed", "kind": self._name, "items": len(batch)}
            )
            self._fail(batch, error)
        else:
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)

    @staticmethod
    def _fail(batch: list[tuple[Item, asyncio.Future[Result]]], error: Exception) -> None:
        for _, future in batch:
            if not future.done():
                future.set_exception(error)
                # Whoever asked may be gone; an error nobody awaits is not news.
                future.exception()
