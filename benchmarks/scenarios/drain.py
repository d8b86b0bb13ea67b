"""Drain: no-op jobs through server and simulated agents, beside the bare store."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks import raw_store
from benchmarks.report import Cell, Result
from benchmarks.system import Bench, Fleet, Postgres, Server
from lessor.v1 import fleet_service_pb2 as fleet_pb
from lessor.v1 import job_pb2, job_service_pb2

TITLE = "no-op jobs through the server and remote simulated agents"
QUICK = True

QUEUE = "drain"
BATCH = 1000
_STALL_S = 60.0


@dataclass(frozen=True)
class Drained:
    """One drain."""

    jobs: int
    seconds: float
    server_cpu_s: float
    postgres_cpu_s: float
    fleet_cpu_s: float

    @property
    def per_s(self) -> float:
        """Jobs per second."""
        return self.jobs / self.seconds

    def row(self, what: str, agents: int) -> dict[str, Cell]:
        """Returns its row of a table."""
        return {
            "what": what,
            "agents": agents,
            "jobs": self.jobs,
            "jobs/s": self.per_s,
            "server µs/job": 1e6 * self.server_cpu_s / self.jobs,
            "postgres µs/job": 1e6 * self.postgres_cpu_s / self.jobs,
            "agents µs/job": 1e6 * self.fleet_cpu_s / self.jobs,
        }


def spec(queue: str = QUEUE) -> job_pb2.JobSpec:
    """Returns the no-op job."""
    return job_pb2.JobSpec(queue=queue, command=job_pb2.Command(argv=["/bin/true"]))


def submit(server: Server, jobs: int, queue: str = QUEUE) -> None:
    """Submits no-op jobs in batches, from one caller."""
    with server.channel() as channel:
        stub = server.jobs(channel)
        for size in _batches(jobs):
            stub.SubmitJobs(job_service_pb2.SubmitJobsRequest(specs=[spec(queue)] * size))


def make_queue(server: Server, queue: str = QUEUE) -> None:
    """Makes the queue."""
    with server.channel() as channel:
        server.fleet(channel).CreateQueue(fleet_pb.CreateQueueRequest(queue=fleet_pb.Queue(name=queue)))


def pause(server: Server, paused: bool, queue: str = QUEUE) -> None:
    """Pauses or resumes the queue."""
    with server.channel() as channel:
        server.fleet(channel).UpdateQueue(fleet_pb.UpdateQueueRequest(name=queue, paused=paused))


def drain_stored(postgres: Postgres, server: Server, fleet: Fleet, jobs: int) -> Drained:
    """Drains jobs that were all submitted before: from the queue's release to the last end acked."""
    pause(server, True)
    submit(server, jobs)
    return _timed(postgres, server, fleet, jobs, lambda: pause(server, False))


def drain_flowing(postgres: Postgres, server: Server, fleet: Fleet, jobs: int) -> Drained:
    """Drains jobs that are submitted meanwhile: from the first submit to the last end acked."""
    submitter = threading.Thread(target=submit, args=(server, jobs))
    try:
        return _timed(postgres, server, fleet, jobs, submitter.start)
    finally:
        submitter.join()


def _timed(postgres: Postgres, server: Server, fleet: Fleet, jobs: int, release: object) -> Drained:
    fleet.ask("reset")
    before = (server.cpu_s(), postgres.cpu_s(), fleet.cpu_s())
    began_ns = time.monotonic_ns()
    assert callable(release)
    release()
    ended, moved_s = 0, time.monotonic()
    while True:
        answers = fleet.ask("stats")
        now = sum(answer["ended"] for answer in answers)
        if now >= jobs:
            break
        if now != ended:
            ended, moved_s = now, time.monotonic()
        elif time.monotonic() - moved_s > _STALL_S:
            raise RuntimeError(f"the drain stands still at {now} of {jobs} jobs")
        time.sleep(0.05)
    seconds = (max(answer["last_ended_ns"] for answer in answers) - began_ns) / 1e9
    after = (server.cpu_s(), postgres.cpu_s(), fleet.cpu_s())
    return Drained(jobs, seconds, *(b - a for a, b in zip(before, after, strict=True)))


def _batches(jobs: int) -> Iterator[int]:
    while jobs > 0:
        yield min(jobs, BATCH)
        jobs -= BATCH


def run(bench: Bench) -> Result:
    """Runs the scenario."""
    result = Result("drain", TITLE)
    jobs = bench.scale(50_000, 8_000)
    fleets: Sequence[int] = (64,) if bench.quick else (8, 64, 500)
    with bench.postgres() as postgres:
        bench.say("the bare store")
        raw = raw_store.measure(postgres, jobs)
    result.rows.append({"what": "bare store: submit + claim + end", "jobs": jobs, "jobs/s": raw.lifecycle_per_s})
    result.rows.append({"what": "bare store: claim + end", "jobs": jobs, "jobs/s": raw.claim_end_per_s})
    result.figures["raw_store_per_s"] = raw.lifecycle_per_s
    result.figures["raw_store_claim_end_per_s"] = raw.claim_end_per_s
    for agents in fleets:
        bench.say(f"{agents} agents")
        with bench.system(agents) as (postgres, server, fleet):
            make_queue(server)
            drain_flowing(postgres, server, fleet, jobs // 10)
            alone = drain_stored(postgres, server, fleet, jobs)
            flowing = drain_flowing(postgres, server, fleet, jobs)
        result.rows.append(alone.row("drain alone", agents))
        result.rows.append(flowing.row("submitted meanwhile", agents))
        result.figures[f"drain_{agents}_agents_per_s"] = alone.per_s
        if agents == 64:
            result.bound("flowing_to_raw_store", flowing.per_s / raw.lifecycle_per_s, ">= 0.5", ratio=True)
    bench.say("64 agents, one progress event and one log line per job")
    with bench.system(64, chatty=True) as (postgres, server, fleet):
        make_queue(server)
        drain_flowing(postgres, server, fleet, jobs // 10)
        chatty = drain_flowing(postgres, server, fleet, jobs)
    result.rows.append(chatty.row("with progress and a log line", 64))
    result.bound("chatty_to_raw_store", chatty.per_s / raw.lifecycle_per_s, ">= 0.3", ratio=True)
    return result
