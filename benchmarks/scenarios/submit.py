"""Submit: one caller in batches, and many callers with one job each; no agent is connected."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

from benchmarks.report import Cell, Result
from benchmarks.scenarios.drain import make_queue
from benchmarks.system import Bench, Postgres, Server

TITLE = "jobs submitted, committed and answered; specs differ in name and arguments"
QUICK = True

QUEUE = "submit"
BATCH = 1000
AHEAD = 2
"""Batches that one caller has on their way: while the database stores one, the server prepares the next."""
CALLERS = 64


@dataclass(frozen=True)
class Submitted:
    """What one process of callers did."""

    jobs: int
    seconds: float
    server_cpu_s: float
    postgres_cpu_s: float
    client_cpu_s: float

    @property
    def per_s(self) -> float:
        """Jobs per second."""
        return self.jobs / self.seconds

    def row(self, what: str) -> dict[str, Cell]:
        """Returns its row of the table."""
        return {
            "what": what,
            "jobs": self.jobs,
            "jobs/s": self.per_s,
            "server µs/job": 1e6 * self.server_cpu_s / self.jobs,
            "postgres µs/job": 1e6 * self.postgres_cpu_s / self.jobs,
            "client µs/job": 1e6 * self.client_cpu_s / self.jobs,
        }


def submit(postgres: Postgres, server: Server, kind: str, jobs: int, *, ahead: int = 1) -> Submitted:
    """Has a process of callers submit ``jobs`` jobs; see ``benchmarks.submitters`` for the kinds and ``ahead``."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.submitters", kind, f"--address={server.address}", f"--queue={QUEUE}",
         f"--jobs={jobs}", f"--batch={BATCH}", f"--callers={CALLERS}",
         f"--ahead={ahead}"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as callers:  # fmt: skip
        assert callers.stdin is not None
        assert callers.stdout is not None
        try:
            if callers.stdout.readline() != "ready\n":
                raise RuntimeError("the callers did not come up")
            before = server.cpu_s(), postgres.cpu_s()
            callers.stdin.write("\n")
            callers.stdin.flush()
            line = callers.stdout.readline()
            after = server.cpu_s(), postgres.cpu_s()
        except BaseException:
            callers.kill()
            raise
        if not line:
            raise RuntimeError("the callers broke off")
        found = json.loads(line)
    return Submitted(jobs, found["seconds"], after[0] - before[0], after[1] - before[1], found["cpu_s"])


def run(bench: Bench) -> Result:
    """Runs the scenario."""
    result = Result("submit", TITLE)
    with bench.postgres() as postgres, bench.server(postgres) as server:
        make_queue(server, QUEUE)
        bench.say("one caller, batches of 1,000")
        jobs = bench.scale(200_000, 20_000)
        waiting = submit(postgres, server, "batch", jobs)
        batch = submit(postgres, server, "batch", jobs, ahead=AHEAD)
        bench.say("the same through the SDK")
        sdk = submit(postgres, server, "sdk", bench.scale(100_000, 5_000))
        bench.say("64 callers, one job each")
        singles = submit(postgres, server, "single", bench.scale(40_000, 4_000))
    result.rows.append(waiting.row(f"one caller, batches of {BATCH:,}, each answer waited for"))
    result.rows.append(batch.row(f"one caller, batches of {BATCH:,}, {AHEAD} on their way"))
    result.rows.append(sdk.row(f"the SDK, batches of {BATCH:,}, specs built meanwhile"))
    result.rows.append(singles.row(f"{CALLERS} callers, one job each"))
    result.bound("batch_per_s", batch.per_s, ">= 30000")
    result.bound("singles_per_s", singles.per_s, ">= 3000")
    result.figures["batch_waiting_per_s"] = waiting.per_s
    result.figures["sdk_batch_per_s"] = sdk.per_s
    result.notes.append(
        "one server process; callers, server and PostgreSQL share this host. A caller that waits for each answer has "
        "nothing of one batch overlap with the next: its rate is the sum of all three. Requests are built beforehand, "
        "but for the SDK's row."
    )
    return result
