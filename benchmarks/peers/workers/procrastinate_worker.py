"""procrastinate, measured in a process of its own: drains no-op jobs, then begins single ones. Prints one JSON object.

Runs with the Python of procrastinate's environment. Arguments: database URL, jobs to drain, jobs to begin one at a
time, jobs at once while it drains.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import procrastinate  # type: ignore[import-not-found,unused-ignore]
import uvloop

OPTIONS = {"delete_jobs": "always", "install_signal_handlers": False}
"""How its workers run: the row of an ended job is deleted, as other queues do."""

POLL_S = 0.1


class Worker:
    """An application with a no-op task that takes the time."""

    def __init__(self, url: str, concurrency: int) -> None:
        # A connection for each job at once, and for what listens, fetches, beats and submits.
        connector = procrastinate.PsycopgConnector(conninfo=url, min_size=1, max_size=concurrency + 4)
        self.app = procrastinate.App(connector=connector)
        self.task = self.app.task(name="noop")(self.noop)
        self._concurrency = concurrency
        self._wanted = 0
        self._begun_ns: list[int] = []
        self._reached = asyncio.Event()

    async def noop(self) -> None:
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

    async def drain(self, jobs: int) -> list[int]:
        """Submits jobs, then starts a worker that ends when there are none left; returns when each began."""
        self.expect(jobs)
        await self.task.batch_defer_async(*({} for _ in range(jobs)))
        await self.app.connector.execute_query_async("ANALYZE")
        await self.app.run_worker_async(wait=False, concurrency=self._concurrency, **OPTIONS)
        return await self.begun()


async def main(url: str, jobs: int, samples: int, concurrency: int) -> dict[str, object]:
    """Measures; returns what is printed."""
    worker = Worker(url, concurrency)
    async with worker.app.open_async():
        await worker.app.schema_manager.apply_schema_async()
        await worker.drain(max(1, jobs // 10))
        drained = await worker.drain(jobs)
        # A notification that arrives during a fetch is lost, and the job waits for the next poll: the default of 5 s
        # would be its p99.
        running = asyncio.create_task(
            worker.app.run_worker_async(concurrency=1, fetch_job_polling_interval=POLL_S, **OPTIONS)
        )
        worker.expect(1)
        # The worker is up once it has begun a job.
        await worker.task.defer_async()
        await worker.begun()
        latencies_ns = []
        for _ in range(samples):
            worker.expect(1)
            submitted = time.monotonic_ns()
            await worker.task.defer_async()
            latencies_ns.append((await worker.begun())[0] - submitted)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    return {"first_ns": min(drained), "last_ns": max(drained), "latencies_ns": latencies_ns}


if __name__ == "__main__":
    url, drained_jobs, single_jobs, concurrency = sys.argv[1:]
    print(json.dumps(uvloop.run(main(url, int(drained_jobs), int(single_jobs), int(concurrency)))))
