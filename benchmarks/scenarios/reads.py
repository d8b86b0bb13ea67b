"""Reads: one job, pages of jobs by every filter and depth, attempts, explanations, and a thousand watchers.

All of it beside a fleet that drains a steady trickle of submits, with a past of millions of finished jobs.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from benchmarks import history, history_specs
from benchmarks.report import Result, percentile
from benchmarks.system import Bench, Postgres, Server
from benchmarks.watchers import Watchers
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
_SEED = 6
_PROBE_EVERY_S = 0.1
_HEARD_TIMEOUT_S = 30.0


@dataclass
class Known:
    """Jobs to ask for, and moments between them."""

    finished: list[str]
    failed: list[str]
    waiting: list[str]
    running: list[str]
    monday: datetime = field(default_factory=lambda: datetime.now(UTC) - timedelta(days=3))


class Load:
    """Submits no-op jobs at a steady rate from a thread of its own while the block runs."""

    def __init__(self, server: Server, queues: Sequence[str], per_s: int, *, batch: int = 10) -> None:
        self._server = server
        self._queues = queues
        self._per_s = per_s
        self._batch = batch
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.submitted = 0

    def __enter__(self) -> Load:
        """Begins."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        queues = itertools.cycle(self._queues)
        period_s = self._batch / self._per_s
        due_s = time.monotonic()
        with self._server.channel() as channel:
            stub = self._server.jobs(channel)
            while not self._stop.wait(max(0.0, due_s - time.monotonic())):
                specs = [_no_op(next(queues)) for _ in range(self._batch)]
                stub.SubmitJobs(pb.SubmitJobsRequest(specs=specs))
                self.submitted += self._batch
                due_s += period_s


def _no_op(queue: str, *, gpus: int = 0) -> job_pb2.JobSpec:
    resources = job_pb2.Resources(gpu_count=gpus) if gpus else None
    return job_pb2.JobSpec(queue=queue, command=job_pb2.Command(argv=["/bin/true"]), resources=resources)


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

        It walks in larger pages, as far as they are as long as they may be: a token says after which job to go on.
        """
        passed, token = 0.0, ""
        for depth in _DEPTHS:
            while passed < depth - 1:
                step = int(min(10, depth - 1 - passed))
                page = self._stub.ListJobs(pb.ListJobsRequest(page_size=step * _PAGE, page_token=token, **fields))
                token = page.next_page_token
                if not token:
                    return
                # A short page is one page, of a call that looked at all it may.
                passed += step if len(page.jobs) == step * _PAGE else 1
            yield depth, token


# ---------------------------------------------------------------- watchers


@dataclass
class _Cpu:
    """CPU and time of one stretch of the measurement."""

    server: Server
    postgres: Postgres

    def __post_init__(self) -> None:
        self._before = (time.monotonic(), self.server.cpu_s(), self.postgres.cpu_s())

    def shares(self) -> tuple[float, float]:
        """Returns what the server and what PostgreSQL used of one core since it was made."""
        began, server_s, postgres_s = self._before
        seconds = time.monotonic() - began
        return (self.server.cpu_s() - server_s) / seconds, (self.postgres.cpu_s() - postgres_s) / seconds


class Watching:
    """Times how soon watchers hear of a change."""

    def __init__(self, bench: Bench, postgres: Postgres, server: Server, stub: Any, result: Result) -> None:
        self._bench = bench
        self._postgres = postgres
        self._server = server
        self._stub = stub
        self._result = result

    def run(
        self,
        what: str,
        figure: str,
        requests: Sequence[dict[str, Any]],
        probe: Callable[[int], str],
        state: job_pb2.JobState.ValueType,
        listeners: int,
    ) -> None:
        """Opens the watches, makes changes one after the other, and asks who heard of them when.

        Args:
            what: For the table.
            figure: Begins the names of the figures.
            requests: One per watcher.
            probe: Makes the change of that number; returns the job.
            state: What the job then is.
            listeners: So many watchers hear of each change.
        """
        probes = self._bench.scale(100, 20)
        with Watchers(self._server.address) as watchers:
            watchers.watch(requests)
            before = watchers.count()
            cpu = _Cpu(self._server, self._postgres)
            began: dict[str, int] = {}
            pause = threading.Event()
            for number in range(probes):
                began_ns = time.monotonic_ns()
                began[probe(number)] = began_ns
                # One after the other, and evenly.
                pause.wait(max(0.0, _PROBE_EVERY_S - (time.monotonic_ns() - began_ns) / 1e9))
            server_share, postgres_share = cpu.shares()
            after = watchers.count()
            heard = _heard(watchers, state, list(began), listeners)
        took_ms = [(at - began[job_id]) / 1e6 for job_id, times in heard.items() for at in times]
        seconds = probes * _PROBE_EVERY_S
        self._result.rows.append(
            {
                "what": what,
                "calls": len(took_ms),
                "p50 ms": percentile(took_ms, 0.5),
                "p99 ms": percentile(took_ms, 0.99),
                "changes/s": (after[0] - before[0]) / seconds,
                "messages/s": (after[1] - before[1]) / seconds,
                "server cores": server_share,
                "postgres cores": postgres_share,
            }
        )
        self._result.figures[f"{figure}_p50_ms"] = percentile(took_ms, 0.5)
        self._result.figures[f"{figure}_p99_ms"] = percentile(took_ms, 0.99)
        self._result.figures[f"{figure}_server_cores"] = server_share

    def cancel(self, job_ids: Sequence[str]) -> Callable[[int], str]:
        """Returns a probe that cancels one of these jobs."""

        def probe(number: int) -> str:
            self._stub.CancelJobs(pb.CancelJobsRequest(job_ids=[job_ids[number]]))
            return job_ids[number]

        return probe

    def submit(self, queues: Sequence[str]) -> Callable[[int], str]:
        """Returns a probe that submits a job nobody can run, to one of the queues."""

        def probe(number: int) -> str:
            spec = _no_op(queues[number % len(queues)], gpus=8)
            job_id: str = self._stub.SubmitJob(pb.SubmitJobRequest(spec=spec)).job_id
            return job_id

        return probe


def _heard(
    watchers: Watchers, state: job_pb2.JobState.ValueType, job_ids: Sequence[str], listeners: int
) -> dict[str, list[int]]:
    """Returns job → when each of the watchers heard of it, once all of them have.

    Raises:
        RuntimeError: They have not in time.
    """
    deadline_s = time.monotonic() + _HEARD_TIMEOUT_S
    while True:
        heard = watchers.seen(state, job_ids)
        missing = sum(listeners - len(times) for times in heard.values())
        if not missing:
            return heard
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"of {len(job_ids) * listeners} changes {missing} were not heard of")
        threading.Event().wait(0.1)


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
                cpu = _Cpu(server, postgres)
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
