"""Callers that submit jobs, in a process of their own: they share neither the server's loop nor the bench's.

One kind per process: ``batch`` (one caller, prebuilt requests), ``sdk`` (the same through the Python SDK) or
``single`` (many callers, one job per call). It warms up, says ``ready``, waits for a line on standard input,
submits, and prints one JSON object: jobs, seconds, CPU seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable

import uvloop
from grpc import aio

import lessor
from lessor.v1 import job_pb2, job_service_pb2, job_service_pb2_grpc

WARM_UP_JOBS = 3000


def spec(queue: str, number: int) -> job_pb2.JobSpec:
    """Returns the spec of one of many runs of one program: they differ in name and arguments."""
    return job_pb2.JobSpec(
        name=f"train-{number}",
        queue=queue,
        command=job_pb2.Command(argv=["/bin/true", f"--seed={number}", "--epochs=3"]),
    )


def sdk_spec(queue: str, number: int) -> lessor.JobSpec:
    """Returns the same spec as the SDK has it."""
    return lessor.JobSpec.of(["/bin/true", f"--seed={number}", "--epochs=3"], name=f"train-{number}", queue=queue)


class Callers:
    """Submits ``jobs`` jobs to one queue."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._queue: str = options.queue
        self._channel = aio.insecure_channel(options.address)
        self._stub: job_service_pb2_grpc.JobServiceAsyncStub = job_service_pb2_grpc.JobServiceStub(self._channel)

    async def prepared(self, jobs: int) -> Callable[[], Awaitable[None]]:
        """Returns what submits ``jobs`` jobs, the requests made beforehand."""
        match self._options.kind:
            case "single":
                return self._singles(jobs)
            case "batch":
                return self._batches(jobs)
            case _:
                return self._sdk(jobs)

    def _singles(self, jobs: int) -> Callable[[], Awaitable[None]]:
        requests = iter([job_service_pb2.SubmitJobRequest(spec=spec(self._queue, number)) for number in range(jobs)])

        async def caller() -> None:
            for request in requests:
                await self._stub.SubmitJob(request)

        async def submit() -> None:
            await asyncio.gather(*(caller() for _ in range(self._options.callers)))

        return submit

    def _batches(self, jobs: int) -> Callable[[], Awaitable[None]]:
        size = self._options.batch
        requests = [
            job_service_pb2.SubmitJobsRequest(specs=[spec(self._queue, first + number) for number in range(size)])
            for first in range(0, jobs, size)
        ]

        on_their_way = asyncio.Semaphore(self._options.ahead)

        async def send(request: job_service_pb2.SubmitJobsRequest) -> None:
            try:
                await self._stub.SubmitJobs(request)
            finally:
                on_their_way.release()

        async def submit() -> None:
            async with asyncio.TaskGroup() as group:
                for request in requests:
                    await on_their_way.acquire()
                    group.create_task(send(request))

        return submit

    def _sdk(self, jobs: int) -> Callable[[], Awaitable[None]]:
        size = self._options.batch

        async def submit() -> None:
            async with lessor.AsyncClient(self._options.address) as client:
                for first in range(0, jobs, size):
                    await client.submit_many([sdk_spec(self._queue, first + number) for number in range(size)])

        return submit

    async def close(self) -> None:
        await self._channel.close(None)


async def _run(options: argparse.Namespace) -> None:
    callers = Callers(options)
    await (await callers.prepared(options.warm_up))()
    submit = await callers.prepared(options.jobs)
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    cpu_s, began_s = time.process_time(), time.perf_counter()
    await submit()
    seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    print(json.dumps({"jobs": options.jobs, "seconds": seconds, "cpu_s": cpu_s}), flush=True)
    await callers.close()


def main() -> None:
    """Runs the callers that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.submitters", description=__doc__)
    parser.add_argument("kind", choices=["batch", "sdk", "single"])
    parser.add_argument("--address", required=True)
    parser.add_argument("--queue", required=True)
    parser.add_argument("--jobs", type=int, required=True)
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--ahead", type=int, default=1, help="batches that one caller has on their way at once")
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--warm-up", type=int, default=WARM_UP_JOBS)
    uvloop.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
