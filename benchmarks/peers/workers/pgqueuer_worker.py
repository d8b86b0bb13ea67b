"""PgQueuer, measured in a process of its own: drains no-op jobs, then begins single ones. Prints one JSON object.

Runs with the Python of PgQueuer's environment. Arguments: database URL, jobs to drain, jobs to begin one at a time.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import asyncpg
import uvloop
from pgqueuer import PgQueuer, Queries  # type: ignore[import-not-found,unused-ignore]
from pgqueuer.db import AsyncpgDriver  # type: ignore[import-not-found,unused-ignore]

BATCH = 100
ENQUEUE_BATCH = 5000


class Worker:
    """A PgQueuer with a no-op entrypoint that takes the time."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._wanted = 0
        self._begun_ns: list[int] = []
        self._reached = asyncio.Event()

    async def noop(self, job: object) -> None:
        """The job."""
        self._begun_ns.append(time.monotonic_ns())
        if len(self._begun_ns) == self._wanted:
            self._reached.set()

    def expect(self, jobs: int) -> None:
        """Forgets the jobs begun so far and awaits that many more."""
        self._begun_ns, self._wanted, self._reached = [], jobs, asyncio.Event()

    async def begun(self) -> list[int]:
        """Returns when each of the expected jobs began, in ns of CLOCK_MONOTONIC, once all have."""
        await self._reached.wait()
        return self._begun_ns

    async def started(self) -> tuple[PgQueuer, asyncio.Task[None]]:
        """Starts a worker; returns it with the task that runs it."""
        queuer = PgQueuer(AsyncpgDriver(await asyncpg.connect(self._url)))
        queuer.entrypoint("noop")(self.noop)
        return queuer, asyncio.create_task(queuer.run(batch_size=BATCH))


async def main(url: str, jobs: int, samples: int) -> dict[str, object]:
    """Measures; returns what is printed."""
    queries = Queries(AsyncpgDriver(await asyncpg.connect(url)))
    await queries.install()
    worker = Worker(url)

    async def enqueue(count: int) -> None:
        for first in range(0, count, ENQUEUE_BATCH):
            size = min(ENQUEUE_BATCH, count - first)
            await queries.enqueue(["noop"] * size, [None] * size, [0] * size)

    async def drain(count: int) -> tuple[list[int], PgQueuer, asyncio.Task[None]]:
        worker.expect(count)
        await enqueue(count)
        queuer, running = await worker.started()
        begun = await worker.begun()
        return begun, queuer, running

    async def settled() -> None:
        """Waits until every job's row is gone: what has begun must also have been completed."""
        while True:
            if not await queries.queued_work(["noop"]):
                return
            await asyncio.sleep(0.01)

    _, queuer, running = await drain(max(1, jobs // 10))
    queuer.shutdown.set()
    await running
    drained, queuer, running = await drain(jobs)
    await settled()
    latencies_ns = []
    for _ in range(samples):
        worker.expect(1)
        submitted = time.monotonic_ns()
        await queries.enqueue("noop", None)
        latencies_ns.append((await worker.begun())[0] - submitted)
    queuer.shutdown.set()
    await running
    return {"first_ns": min(drained), "last_ns": max(drained), "latencies_ns": latencies_ns}


if __name__ == "__main__":
    print(json.dumps(uvloop.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))))
