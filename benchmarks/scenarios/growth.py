"""Growth: does it get slower with jobs that wait, jobs that are over, shapes, queues, or a transaction left open?"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import asyncpg
import grpc

from benchmarks import history, idle_transaction, planner_cost
from benchmarks.report import Cell, Result, median
from benchmarks.scenarios import drain
from benchmarks.scenarios.drain import Drained
from benchmarks.system import Bench, Fleet, Postgres, Server
from lessor.v1 import fleet_service_pb2 as fleet_pb
from lessor.v1 import job_pb2
from lessor.v1 import job_service_pb2 as pb
from lessor_server.planner.model import DEFAULT_MAX_GRANTS

TITLE = "drain with ever more jobs waiting, jobs finished, shapes and queues; an idle transaction left open"
QUICK = False

AGENTS = 64
ROUNDS = 3
"""Drains of each case; the median counts."""
FIRST = 100
"""Priority of the jobs that are drained: those that wait have less."""

_POLL_S = 0.02
_STALL_S = 60.0


@dataclass(frozen=True)
class Case:
    """What is grown."""

    what: str
    waiting: int
    """Jobs that wait meanwhile, in the same queue and of the same shape, with less priority."""
    finished: int = 0
    shapes: int = 1
    """Of the jobs that are drained: they differ in the memory they ask for, and fit on every agent."""
    queues: int = 1
    """Over which the jobs that are drained are spread."""

    @property
    def queue_names(self) -> list[str]:
        """The queues; those that wait are in the first."""
        return [f"{drain.QUEUE}-{number:04d}" for number in range(self.queues)]


@dataclass(frozen=True)
class Measured:
    """What the drains of a case did."""

    case: Case
    drains: Sequence[Drained]

    @property
    def per_s(self) -> float:
        """Jobs per second, the median of the drains."""
        return median([drained.per_s for drained in self.drains])

    def row(self) -> dict[str, Cell]:
        """Returns its row of the table."""
        jobs = sum(drained.jobs for drained in self.drains)
        return {
            "what": self.case.what,
            "jobs": jobs,
            "jobs/s": self.per_s,
            "slowest": min(drained.per_s for drained in self.drains),
            "fastest": max(drained.per_s for drained in self.drains),
            "server µs/job": 1e6 * sum(drained.server_cpu_s for drained in self.drains) / jobs,
            "postgres µs/job": 1e6 * sum(drained.postgres_cpu_s for drained in self.drains) / jobs,
        }


# ---------------------------------------------------------------- one case


def measure(bench: Bench, case: Case, jobs: int) -> Measured:
    """Drains ``jobs`` jobs, :data:`ROUNDS` times, on a system of its own that has grown as the case says."""
    bench.say(case.what)
    with bench.postgres() as postgres:
        if case.finished:
            with history.filling(postgres) as url:
                asyncio.run(history.add_finished(url, case.finished, say=bench.say))
        _top_up(postgres, case)
        _pause_all(postgres)
        with bench.server(postgres) as server, bench.fleet(server, AGENTS) as fleet:
            _make_queues(server, case.queue_names)
            _drain(postgres, server, fleet, case, jobs // 10)
            drains = []
            for _ in range(ROUNDS):
                _top_up(postgres, case)
                drains.append(_drain(postgres, server, fleet, case, jobs))
    return Measured(case, drains)


def _drain(postgres: Postgres, server: Server, fleet: Fleet, case: Case, jobs: int) -> Drained:
    """Submits jobs while all queues are paused, then takes the time from their release.

    Those that wait follow as soon as all of these are granted, so that the last poll may count some of them: the rate
    is of all that ended.
    """
    _submit(server, case, jobs)
    fleet.ask("reset")
    before = (server.cpu_s(), postgres.cpu_s(), fleet.cpu_s())
    began_ns = time.monotonic_ns()
    _set_paused(postgres, server, case, paused=False)
    ended, moved_s = 0, time.monotonic()
    while ended < jobs:
        time.sleep(_POLL_S)
        answers = fleet.ask("stats")
        now = sum(answer["ended"] for answer in answers)
        if now != ended:
            ended, moved_s = now, time.monotonic()
        elif time.monotonic() - moved_s > _STALL_S:
            raise RuntimeError(f"{case.what}: the drain stands still at {now} of {jobs} jobs")
    seconds = (max(answer["last_ended_ns"] for answer in answers) - began_ns) / 1e9
    after = (server.cpu_s(), postgres.cpu_s(), fleet.cpu_s())
    _set_paused(postgres, server, case, paused=True)
    _await_no_leases(postgres)
    return Drained(ended, seconds, *(b - a for a, b in zip(before, after, strict=True)))


def _submit(server: Server, case: Case, jobs: int) -> None:
    kinds = itertools.cycle(
        [
            job_pb2.JobSpec(
                queue=queue,
                priority=FIRST,
                command=job_pb2.Command(argv=["/bin/true"]),
                # The first is the shape of those that wait.
                resources=job_pb2.Resources(cpu_millis=1000, memory_bytes=(1 + shape) << 10),
            )
            for shape, queue in _meetings(case)
        ]
    )
    with server.channel() as channel:
        stub = server.jobs(channel)
        for begin in range(0, jobs, drain.BATCH):
            specs = list(itertools.islice(kinds, min(drain.BATCH, jobs - begin)))
            stub.SubmitJobs(pb.SubmitJobsRequest(specs=specs))


def _meetings(case: Case) -> Iterable[tuple[int, str]]:
    """Returns (shape, queue) of the jobs in turn: each shape and each queue has its share."""
    names = case.queue_names
    return [(number % case.shapes, names[number % case.queues]) for number in range(max(case.shapes, case.queues))]


def _top_up(postgres: Postgres, case: Case) -> None:
    """Has as many jobs wait as the case says."""
    missing = case.waiting - _query(postgres, "SELECT count(*) FROM ready")
    if missing > 0:
        asyncio.run(history.add_waiting(postgres.url, missing, queues=case.queue_names[:1], shapes=1))


def _make_queues(server: Server, names: Sequence[str]) -> None:
    """Makes those that are missing, paused."""
    with server.channel() as channel:
        stub = server.fleet(channel)
        for name in names:
            try:
                stub.CreateQueue(fleet_pb.CreateQueueRequest(queue=fleet_pb.Queue(name=name, paused=True)))
            except grpc.RpcError as error:
                # That in which jobs wait.
                if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                    raise


def _pause_all(postgres: Postgres) -> None:
    _query(postgres, "UPDATE queue SET paused = true")


def _set_paused(postgres: Postgres, server: Server, case: Case, *, paused: bool) -> None:
    """Pauses or releases all queues at once: in one statement, and by the server for the last, so that it hears of it.

    One call each would release a thousand queues over seconds.
    """
    last = case.queue_names[-1]
    if case.queues > 1:
        _query(postgres, f"UPDATE queue SET paused = {paused} WHERE name <> '{last}'")
    drain.pause(server, paused, last)


def _await_no_leases(postgres: Postgres) -> None:
    give_up = time.monotonic() + _STALL_S
    while left := _query(postgres, "SELECT count(*) FROM lease"):
        if time.monotonic() > give_up:
            raise RuntimeError(f"{left} leases do not end")
        time.sleep(_POLL_S)


def _query(postgres: Postgres, sql: str) -> int:
    """Runs a statement; returns the first value of its first row, 0 where it has none."""

    async def query() -> int:
        connection = await asyncpg.connect(postgres.url)
        try:
            return int(await connection.fetchval(sql) or 0)
        finally:
            await connection.close()

    return asyncio.run(query())


# ---------------------------------------------------------------- all


def run(bench: Bench) -> Result:
    """Runs the scenario."""
    result = Result("growth", TITLE)
    _grow(bench, result)
    _hold(bench, result)
    bench.say("the planner by itself")
    shapes = (1, bench.scale(100, 10), bench.scale(10_000, 1_000))
    for row in planner_cost.rows(shapes, (1_000, bench.scale(100_000, 10_000))):
        result.rows.append({"what": "planning cycle", **row})
    result.notes.append(
        "planning cycle: a full fleet shows the cost of looking at every shape once, which the number of jobs does not "
        f"change; a free one grants at most {DEFAULT_MAX_GRANTS:,} a cycle"
    )
    return result


def _grow(bench: Bench, result: Result) -> None:
    jobs = bench.scale(20_000, 2_000)
    least = 1_000
    more_waiting = (bench.scale(100_000, 5_000), bench.scale(1_000_000, 20_000))
    finished = bench.scale(10_000_000, 50_000)
    more_shapes = (100, bench.scale(10_000, 1_000))
    more_queues = (100, bench.scale(1_000, 200))
    base = Case(f"{least:,} waiting, none finished, 1 shape, 1 queue", least)
    before = measure(bench, base, jobs)
    grown = {
        **{f"depth_{_short(waiting)}_ratio": Case(f"{waiting:,} waiting", waiting) for waiting in more_waiting},
        f"finished_{_short(finished)}_ratio": Case(f"{finished:,} finished", least, finished=finished),
        **{f"shapes_{shapes}_ratio": Case(f"{shapes:,} shapes", least, shapes=shapes) for shapes in more_shapes},
        **{f"queues_{queues}_ratio": Case(f"{queues:,} queues", least, queues=queues) for queues in more_queues},
    }
    measured = {name: measure(bench, case, jobs) for name, case in grown.items()}
    # A host changes its pace within minutes: what all is compared with is taken before and after.
    after = measure(bench, base, jobs)
    base_per_s = (before.per_s + after.per_s) / 2
    result.rows.extend([before.row(), *(found.row() for found in measured.values()), after.row()])
    result.figures["base_per_s"] = base_per_s
    wanted = {
        f"depth_{_short(more_waiting[-1])}_ratio": ">= 0.8",
        f"finished_{_short(finished)}_ratio": ">= 0.8",
        f"shapes_{more_shapes[-1]}_ratio": ">= 0.5",
    }
    for name, found in measured.items():
        ratio = found.per_s / base_per_s
        if name in wanted:
            result.bound(name, ratio, wanted[name], ratio=True)
        else:
            result.ratios[name] = ratio
    result.notes.append(
        "ratios: to the mean of the first and the last row; jobs that wait are in the queue that is drained, of the "
        "same shape, with less priority"
    )


def _hold(bench: Bench, result: Result) -> None:
    agents = bench.scale(5_000, 500)
    per_s = bench.scale(3_000, 1_000)
    seconds = bench.scale(300, 20)
    with (
        bench.postgres(**idle_transaction.SETTINGS) as postgres,
        bench.server(postgres) as server,
        bench.fleet(server, agents) as fleet,
    ):
        drain.make_queue(server, idle_transaction.QUEUE)
        held = {}
        for what, pinned, share in (("steady load", False, 5), ("with an idle transaction", True, 1)):
            bench.say(f"{what}: {per_s} jobs/s, {agents} agents")
            held[pinned] = idle_transaction.hold(
                bench, postgres, server, fleet, per_s=per_s, seconds=seconds / share, pinned=pinned
            )
            result.rows.extend(held[pinned].rows(what))
    result.figures["steady_claim_p50_ms"] = held[False].claim_ms(0.5)
    result.bound("idle_transaction_claim_p50_ms", held[True].claim_ms(0.5, since=0.8), "<= 5")
    result.figures["idle_transaction_claim_p99_ms"] = held[True].claim_ms(0.99, since=0.8)
    result.bound("idle_transaction_backlog_s", held[True].backlog_s(), "<= 0.5")
    result.bound(
        "idle_transaction_offered_ratio", held[True].submitted / (per_s * held[True].seconds), ">= 0.95", ratio=True
    )
    result.notes.append(
        "idle transaction: repeatable read, with a snapshot and a number of its own; claim times are PostgreSQL's, of "
        "one statement in ten, over the last fifth of the time; the backlog is in seconds of the offered load"
    )


def _short(number: int) -> str:
    for unit, suffix in ((1_000_000, "m"), (1_000, "k")):
        if number >= unit and not number % unit:
            return f"{number // unit}{suffix}"
    return str(number)
