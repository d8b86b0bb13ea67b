"""Reads: one job, pages of jobs by every filter and depth, attempts, explanations, and a thousand watchers.

All of it beside a fleet that drains a steady trickle of submits, with a past of millions of finished jobs.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from benchmarks import history, history_specs
from benchmarks.load import Load
from benchmarks.report import Result, percentile
from benchmarks.system import Bench, Postgres, Server
from benchmarks.watching import Cpu, Watching
from lessor.v1 import fleet_service_pb2 as fleet_pb
from lessor.v1 import job_pb2
from lessor.v1 import job_service_pb2 as pb

TITLE = "reads and watchers under load, with a past of finished jobs"
QUICK = False

LOAD_QUEUE = "reads"
AGENTS = 16
WATCHERS = 1000

_PAGE = 100
_DEEPEST = 1000
_DEPTHS = (1, 10, _DEEPEST)
_MOST_WALKED = 150
"""Calls on the way to a page that is timed, at most."""
_SEED = 6


@dataclass
class Known:
    """Jobs to ask for, and moments between them."""

    finished: list[str]
    failed: list[str]
    waiting: list[str]
    running: list[str]
    monday: datetime = field(default_factory=lambda: datetime.now(UTC) - timedelta(days=3))


# ---------------------------------------------------------------- unary reads


def filters(known: Known) -> dict[str, dict[str, Any]]:
    """Returns what lists are asked for: a name for the table → fields of the request."""
    states = job_pb2.JobState.Value
    day, next_day = Timestamp(), Timestamp()
    day.FromDatetime(known.monday)
    next_day.FromDatetime(known.monday + timedelta(days=1))
    key, rare = history_specs.RARE_LABEL
    return {
        "all": {},
        "queue": {"queue": history_specs.QUEUES[3]},
        "name": {"name": history_specs.NAMES[7]},
        "name, none has it": {"name": "no-job-has-this-name"},
        "label of 1 in 5": {"labels": {"team": "vision"}},
        "label of 1 in 200": {"labels": {"team": "vision", "experiment": "e100"}},
        "label of 1 in 100,000": {"labels": {key: rare}},
        "label, none has it": {"labels": {"no": "such"}},
        "queued": {"states": [states("JOB_STATE_QUEUED")]},
        "leased": {"states": [states("JOB_STATE_LEASED")]},
        "running": {"states": [states("JOB_STATE_RUNNING")]},
        "succeeded": {"states": [states("JOB_STATE_SUCCEEDED")]},
        "failed": {"states": [states("JOB_STATE_FAILED")]},
        "cancelled": {"states": [states("JOB_STATE_CANCELLED")]},
        "not succeeded": {"states": [state for state in job_pb2.JobState.values() if state not in (0, 4)]},
        "queue, succeeded": {"states": [states("JOB_STATE_SUCCEEDED")], "queue": history_specs.QUEUES[3]},
        "queue, failed": {"states": [states("JOB_STATE_FAILED")], "queue": history_specs.QUEUES[3]},
        "queue, queued": {"states": [states("JOB_STATE_QUEUED")], "queue": history_specs.QUEUES[3]},
        "name, failed": {"states": [states("JOB_STATE_FAILED")], "name": history_specs.NAMES[7]},
        "one day": {"submitted_after": day, "submitted_before": next_day},
        "one day, queue, label": {
            "submitted_after": day, "submitted_before": next_day, "queue": history_specs.QUEUES[3],
            "labels": {"team": "vision"},
        },
        "before a day": {"submitted_before": day},
    }  # fmt: skip


class Reads:
    """Times calls, one after the other, and keeps a row for each kind of them."""

    def __init__(self, stub: Any, result: Result, calls: int) -> None:
        self._stub = stub
        self._result = result
        self._calls = calls
        self.worst_p99_ms = 0.0

    def timed(self, what: str, call: Callable[[], Any], calls: int | None = None) -> None:
        """Makes the call many times."""
        took_ms = []
        for _ in range(calls or self._calls):
            began = time.perf_counter()
            call()
            took_ms.append(1e3 * (time.perf_counter() - began))
        p99_ms = percentile(took_ms, 0.99)
        self.worst_p99_ms = max(self.worst_p99_ms, p99_ms)
        self._result.rows.append(
            {"what": what, "calls": len(took_ms), "p50 ms": percentile(took_ms, 0.5), "p99 ms": p99_ms}
        )

    def single_jobs(self, known: Known) -> None:
        """GetJob, ListAttempts, ExplainJob of jobs chosen at random."""
        chance = random.Random(_SEED)
        for what, job_ids in (
            ("finished", known.finished), ("failed", known.failed), ("waiting", known.waiting),
            ("running", known.running),
        ):  # fmt: skip
            self.timed(f"GetJob, {what}", lambda ids=job_ids: self._stub.GetJob(  # type: ignore[misc]
                pb.GetJobRequest(job_id=chance.choice(ids))))  # fmt: skip
        for what, job_ids in (("finished", known.finished), ("running", known.running)):
            self.timed(f"ListAttempts, {what}", lambda ids=job_ids: self._stub.ListAttempts(  # type: ignore[misc]
                pb.ListAttemptsRequest(job_id=chance.choice(ids))))  # fmt: skip
        for what, job_ids in (("waiting", known.waiting), ("finished", known.finished)):
            self.timed(f"ExplainJob, {what}", lambda ids=job_ids: self._stub.ExplainJob(  # type: ignore[misc]
                pb.ExplainJobRequest(job_id=chance.choice(ids))))  # fmt: skip

    def pages(self, what: str, fields: dict[str, Any]) -> None:
        """ListJobs with one filter, at each depth there is."""
        calls = max(20, self._calls // 2)
        for depth, token in self._tokens(fields):
            request = pb.ListJobsRequest(page_size=_PAGE, page_token=token, **fields)
            label = "first page" if depth == 1 else f"page {depth:,}"
            self.timed(f"ListJobs {what}: {label}", lambda r=request: self._stub.ListJobs(r), calls)  # type: ignore[misc]

    def _tokens(self, fields: dict[str, Any]) -> Iterator[tuple[int, str]]:
        """Walks the list; yields depth and token of the pages that are timed.

        It walks in larger pages, as far as they are full: a token says after which job to go on. Where they
        are short, because a call looks at a bounded number of jobs, it ends long before the deepest page.
        """
        passed, token = 0, ""
        for depth in _DEPTHS:
            calls = 0
            while passed < depth - 1:
                step = min(10, depth - 1 - passed)
                page = self._stub.ListJobs(pb.ListJobsRequest(page_size=step * _PAGE, page_token=token, **fields))
                token = page.next_page_token
                calls += 1
                if not token or calls > _MOST_WALKED:
                    return
                passed += step if len(page.jobs) == step * _PAGE else 1
            yield depth, token


# ---------------------------------------------------------------- the scenario


@contextmanager
def stored(bench: Bench, result: Result) -> Iterator[tuple[Postgres, Server]]:
    """A server on a database with a past."""
    finished = bench.scale(10_000_000, 50_000)
    with bench.postgres() as postgres:
        with history.filling(postgres) as url:
            filled = asyncio.run(history.add_finished(url, finished, say=bench.say))
            # No simulated agent has a GPU: they go on waiting.
            asyncio.run(history.add_waiting(url, finished // 500, gpus=1))
            asyncio.run(history.add_leased(url, finished // 2000))
        result.notes.append(
            f"{finished:,} finished jobs over {history.DAYS} days ({filled.stored_bytes / 1e9:.1f} GB) were stored in "
            f"{filled.seconds:.0f} s, {filled.per_s:,.0f} jobs/s; {finished // 500:,} wait, {finished // 2000:,} run"
        )
        with bench.server(postgres) as server:
            yield postgres, server


def _known(server: Server, stub: Any) -> Known:
    """Asks the server for jobs of each kind, from all over the past."""

    def some(**fields: Any) -> list[str]:
        return [job.id for job in stub.ListJobs(pb.ListJobsRequest(page_size=1000, **fields)).jobs]

    states = job_pb2.JobState.Value
    finished, failed = [], []
    for days in range(1, history.DAYS, 3):
        before = Timestamp()
        before.FromDatetime(datetime.now(UTC) - timedelta(days=days, hours=1))
        finished += some(states=[states("JOB_STATE_SUCCEEDED")], submitted_before=before)[::10]
        failed += some(states=[states("JOB_STATE_FAILED")], submitted_before=before)[::10]
    return Known(
        finished,
        failed,
        waiting=some(states=[states("JOB_STATE_QUEUED")]),
        running=some(states=[states("JOB_STATE_RUNNING")]),
    )


def run(bench: Bench) -> Result:
    """Runs the scenario."""
    result = Result("reads", TITLE)
    with stored(bench, result) as (postgres, server), server.channel() as channel:
        stub = server.jobs(channel)
        server.fleet(channel).CreateQueue(fleet_pb.CreateQueueRequest(queue=fleet_pb.Queue(name=LOAD_QUEUE)))
        known = _known(server, stub)
        with bench.fleet(server, AGENTS) as fleet:
            with Load(server, [LOAD_QUEUE], per_s=bench.scale(200, 100)):
                bench.say("one job at a time")
                reads = Reads(stub, result, bench.scale(400, 40))
                reads.single_jobs(known)
                for what, fields in filters(known).items():
                    bench.say(f"ListJobs {what}")
                    reads.pages(what, fields)
                cpu = Cpu(server, postgres)
                threading.Event().wait(bench.scale(5, 1))
                result.figures["server_cores_unwatched"] = cpu.shares()[0]
                watching = Watching(bench, postgres, server, stub, result)
                watchers = bench.scale(WATCHERS, 100)
                bench.say("watchers of a job each")
                jobs = known.waiting[:watchers]
                watching.run(
                    f"{len(jobs):,} watchers of a job each, cancelled", "job_watchers",
                    [{"job_ids": [job_id]} for job_id in jobs], watching.cancel(jobs), job_pb2.JOB_STATE_CANCELLED, 1,
                )  # fmt: skip
                bench.say("watchers of queues")
                queues = history_specs.QUEUES
                watching.run(
                    f"{watchers:,} watchers of {len(queues)} queues, submitted", "queue_watchers",
                    [{"queue": queues[number % len(queues)]} for number in range(watchers)], watching.submit(queues),
                    job_pb2.JOB_STATE_QUEUED, watchers // len(queues),
                )  # fmt: skip
            # Beside the load each of them would be told of a thousand changes a second.
            bench.say("watchers of all jobs")
            watching.run(
                f"{watchers:,} watchers of all jobs, submitted, else idle", "all_watchers",
                [{} for _ in range(watchers)], watching.submit(queues), job_pb2.JOB_STATE_QUEUED, watchers,
            )  # fmt: skip
            result.figures["load_ended"] = float(fleet.ended())
    result.bound("read_p99_ms", reads.worst_p99_ms, "<= 50")
    return result
