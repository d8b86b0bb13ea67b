"""Scale-out: the same drain by 1, 2 and 4 server processes on one address."""

from __future__ import annotations

import os

import psutil

from benchmarks.report import Result
from benchmarks.scenarios import drain
from benchmarks.system import Bench, Server

TITLE = "no-op jobs through 1, 2 and 4 workers of one server, 64 agents"
QUICK = False

AGENTS = 64
WORKERS = (1, 2, 4)
_CPUS_PER_FLEET_PROCESS = 4
"""Simulated agents are one process on a small host, more where they would be what saturates."""


def streams(server: Server) -> list[int]:
    """Returns how many connections each process that serves holds, the most first."""
    port = int(server.address.rpartition(":")[2])
    counts = [
        sum(
            connection.status == psutil.CONN_ESTABLISHED and connection.laddr.port == port
            for connection in process.net_connections("tcp")
        )
        for process in server.processes()
    ]
    # The parent of workers serves nobody.
    return sorted(counts, reverse=True)[: max(1, len(counts) - 1)]


def run(bench: Bench) -> Result:
    """Runs the scenario."""
    result = Result("scale_out", TITLE)
    jobs = bench.scale(20_000, 5_000)
    cpus = os.cpu_count() or 1
    for workers in WORKERS:
        bench.say(f"{workers} worker(s)")
        with (
            bench.postgres() as postgres,
            bench.server(postgres, "--workers", str(workers)) as server,
            bench.fleet(server, AGENTS, processes=max(1, cpus // _CPUS_PER_FLEET_PROCESS)) as fleet,
        ):
            drain.make_queue(server)
            drain.drain_flowing(postgres, server, fleet, jobs // 10)
            shares = streams(server)
            drained = drain.drain_stored(postgres, server, fleet, jobs)
        thousands = jobs / 1000
        result.rows.append(
            {
                "workers": workers,
                "agents on each": " + ".join(str(share) for share in shares),
                "jobs": jobs,
                "jobs/s": drained.per_s,
                "server CPU s / 1,000 jobs": drained.server_cpu_s / thousands,
                "postgres CPU s / 1,000 jobs": drained.postgres_cpu_s / thousands,
                "agents CPU s / 1,000 jobs": drained.fleet_cpu_s / thousands,
            }
        )
        result.figures[f"workers_{workers}_per_s"] = drained.per_s
        if workers > 1:
            result.ratios[f"workers_{workers}_to_1"] = drained.per_s / result.figures["workers_1_per_s"]
    busy = "server, PostgreSQL and agents share them, so that more workers are not expected to gain anything"
    free = "PostgreSQL and the agents have cores of their own only where there are more than these use together"
    result.notes.append(f"{cpus} CPUs: {busy if cpus <= 4 else free}")
    return result
