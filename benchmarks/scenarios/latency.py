"""Latency: one job at a time on a system that has nothing else to do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import grpc
import uvloop

from benchmarks.report import Result, percentile
from benchmarks.scenarios.drain import make_queue, spec
from benchmarks.system import Bench, Fleet
from lessor.v1 import job_pb2, job_service_pb2, job_service_pb2_grpc

TITLE = "one job at a time on an idle system, 8 agents with a runtime that ends at once"
QUICK = True

AGENTS = 8
QUEUE = "latency"
WARM_UP = 50
"""Jobs before those that count: statements prepared, modules imported, pages read."""
_END_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Trip:
    """One job as its client saw it; CLOCK_MONOTONIC nanoseconds."""

    job_id: str
    submitted: int
    """SubmitJob was called."""
    answered: int
    """The call had its answer."""
    told_ended: int
    """A watcher was told that the job had ended."""


class _Watcher:
    """Follows WatchJobs and notes when it was told of each end."""

    def __init__(self, stub: job_service_pb2_grpc.JobServiceAsyncStub) -> None:
        self._call = stub.WatchJobs(job_service_pb2.WatchJobsRequest(queue=QUEUE))
        self._ends: dict[str, asyncio.Future[int]] = {}
        self.is_watching = asyncio.Event()
        """The server has answered: from now on nothing is missed."""

    async def run(self) -> None:
        async for response in self._call:
            now = time.monotonic_ns()
            self.is_watching.set()
            for change in response.changes:
                if change.state == job_pb2.JOB_STATE_SUCCEEDED:
                    self._end_of(change.job_id).set_result(now)

    async def end(self, job_id: str) -> int:
        """Returns when the watcher was told that the job had ended, as soon as it was."""
        told = await asyncio.wait_for(self._end_of(job_id), _END_TIMEOUT_S)
        del self._ends[job_id]
        return told

    def _end_of(self, job_id: str) -> asyncio.Future[int]:
        # It may be told before the submit is answered.
        return self._ends.setdefault(job_id, asyncio.get_running_loop().create_future())


async def trips(address: str, jobs: int) -> list[Trip]:
    """Submits jobs one after another, each once the last one's end was seen, and watches them."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: job_service_pb2_grpc.JobServiceAsyncStub = job_service_pb2_grpc.JobServiceStub(channel)
        watcher = _Watcher(stub)
        watching = asyncio.create_task(watcher.run())
        try:
            await asyncio.wait_for(watcher.is_watching.wait(), _END_TIMEOUT_S)
            return [await _trip(stub, watcher) for _ in range(jobs)]
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


async def _trip(stub: job_service_pb2_grpc.JobServiceAsyncStub, watcher: _Watcher) -> Trip:
    request = job_service_pb2.SubmitJobRequest(spec=spec(QUEUE))
    submitted = time.monotonic_ns()
    answer = await stub.SubmitJob(request)
    answered = time.monotonic_ns()
    return Trip(answer.job_id, submitted, answered, await watcher.end(answer.job_id))


def begun(fleet: Fleet) -> dict[str, int]:
    """Returns job id → CLOCK_MONOTONIC nanoseconds at which its workload began."""
    return {job_id: at for answer in fleet.ask("begun") for job_id, at in answer["at"].items()}


def legs(made: Sequence[Trip], began: Mapping[str, int]) -> Iterator[tuple[str, list[float]]]:
    """Yields each leg of the trips with its durations in milliseconds."""
    yield "submit → running", [(began[trip.job_id] - trip.submitted) / 1e6 for trip in made]
    yield "submit → end seen by a watcher", [(trip.told_ended - trip.submitted) / 1e6 for trip in made]
    yield "of it: submit → its answer", [(trip.answered - trip.submitted) / 1e6 for trip in made]
    yield "of it: answer → running", [(began[trip.job_id] - trip.answered) / 1e6 for trip in made]
    yield "of it: running → end seen", [(trip.told_ended - began[trip.job_id]) / 1e6 for trip in made]


def run(bench: Bench) -> Result:
    """Runs the scenario."""
    result = Result("latency", TITLE)
    jobs = bench.scale(1000, 200)
    with bench.system(AGENTS, trace=True) as (_, server, fleet):
        make_queue(server, QUEUE)
        bench.say(f"{jobs} jobs, one at a time")
        made = uvloop.run(trips(server.address, WARM_UP + jobs))[WARM_UP:]
        began = begun(fleet)
    for what, took_ms in legs(made, began):
        result.rows.append(
            {
                "what": what,
                "jobs": len(took_ms),
                "p50 ms": percentile(took_ms, 0.5),
                "p90 ms": percentile(took_ms, 0.9),
                "p99 ms": percentile(took_ms, 0.99),
                "max ms": max(took_ms),
            }
        )
    running, ended = result.rows[:2]
    result.bound("submit_to_running_p50_ms", _number(running["p50 ms"]), "<= 3")
    result.bound("submit_to_running_p99_ms", _number(running["p99 ms"]), "<= 10")
    result.figures["submit_to_end_seen_p50_ms"] = _number(ended["p50 ms"])
    result.figures["submit_to_end_seen_p99_ms"] = _number(ended["p99 ms"])
    result.notes.append(
        "the store is durable: on the way to running a submit and a grant are flushed to disk, one after the other; "
        "a negative leg means that the job ran before its client had the answer"
    )
    return result


def _number(cell: object) -> float:
    assert isinstance(cell, float)
    return cell
