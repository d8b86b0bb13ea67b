"""Processes: ``/bin/true`` through a real agent on this host, beside the same program spawned and nothing else."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import psutil

from benchmarks import plain_spawn
from benchmarks.report import Cell, Result
from benchmarks.scenarios import drain
from benchmarks.system import LESSOR, Bench, Postgres, Server
from lessor.lifecycle import Outcome
from lessor.v1 import fleet_service_pb2 as fleet_pb

TITLE = "/bin/true through the process runtime of one agent, beside plain spawn"
QUICK = True

SLOTS = 64
"""Jobs the agent may have at once: as many as it may be offered, so that none waits for a round trip."""

_UP_TIMEOUT_S = 30.0
_STALL_S = 60.0
_POLL_S = 0.02
_SUCCEEDED = f"SELECT count(*) FROM attempt WHERE outcome = {int(Outcome.SUCCEEDED)}"


class HostAgent:
    """A running ``lessor agent``."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)

    def cpu_s(self) -> tuple[float, float]:
        """Returns the CPU seconds of the agent, and those of all that it started."""
        own = self._process.cpu_times()
        started = 0.0
        for process in self._process.children(recursive=True):
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                # Its parent has buried it, and has its times.
                continue
            started += times.user + times.system + times.children_user + times.children_system
        return own.user + own.system, started


@contextmanager
def host_agent(bench: Bench, server: Server) -> Iterator[HostAgent]:
    """A real agent on this host, connected when the block begins; what it still runs ends with the block.

    Raises:
        RuntimeError: It did not connect.
    """
    directory = bench.scratch("agent")
    log = directory / "agent.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                str(LESSOR), "agent", "--address", server.address, "--state-dir", str(directory / "state"),
                "--name", "bench", "--cpu", str(SLOTS), "--on-exit", "stop", "--log-level", "warning",
            ],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        _await_connected(server, process, log)
        yield HostAgent(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_connected(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    give_up = time.monotonic() + _UP_TIMEOUT_S
    with server.channel() as channel:
        stub = server.fleet(channel)
        while not stub.ListAgents(fleet_pb.ListAgentsRequest()).agents:
            if process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"the agent did not connect:\n{log.read_text()[-4000:]}")
            time.sleep(_POLL_S)


def run_jobs(postgres: Postgres, server: Server, agent: HostAgent, jobs: int) -> dict[str, Cell]:
    """Runs jobs that were all stored before; a row of the table.

    The time is from the queue's release to the last end committed, with its last byte of output.

    Raises:
        RuntimeError: They stand still, or not all of them succeeded.
    """
    return asyncio.run(_run_jobs(postgres, server, agent, jobs))


async def _run_jobs(postgres: Postgres, server: Server, agent: HostAgent, jobs: int) -> dict[str, Cell]:
    connection = await asyncpg.connect(postgres.url)
    try:
        drain.pause(server, True)
        drain.submit(server, jobs)
        succeeded_before = await connection.fetchval(_SUCCEEDED)
        before = (*agent.cpu_s(), server.cpu_s(), postgres.cpu_s())
        began = time.monotonic()
        drain.pause(server, False)
        seconds = await _await_all_ended(connection) - began
        after = (*agent.cpu_s(), server.cpu_s(), postgres.cpu_s())
        succeeded = await connection.fetchval(_SUCCEEDED) - succeeded_before
    finally:
        await connection.close()
    if succeeded != jobs:
        raise RuntimeError(f"{succeeded} of {jobs} jobs succeeded")
    used = [1e6 * (b - a) / jobs for a, b in zip(before, after, strict=True)]
    return {
        "what": f"through the agent, up to {SLOTS} at once",
        "programs": jobs,
        "per s": jobs / seconds,
        "agent µs each": used[0],
        "keeper and program µs each": used[1],
        "server µs each": used[2],
        "postgres µs each": used[3],
    }


async def _await_all_ended(connection: asyncpg.Connection) -> float:
    """Returns when nothing waited or ran any more, by ``time.monotonic``."""
    left, moved = -1, time.monotonic()
    while left != 0:
        await asyncio.sleep(_POLL_S)
        now_left = await connection.fetchval("SELECT (SELECT count(*) FROM ready) + (SELECT count(*) FROM lease)")
        if now_left != left:
            left, moved = now_left, time.monotonic()
        elif time.monotonic() - moved > _STALL_S:
            raise RuntimeError(f"{left} jobs stand still")
    return moved


def run(bench: Bench) -> Result:
    """Runs the scenario."""
    result = Result("processes", TITLE)
    jobs = bench.scale(5_000, 500)
    bench.say("plain spawn")
    plain = plain_spawn.measure(jobs)
    with bench.postgres() as postgres, bench.server(postgres) as server, host_agent(bench, server) as agent:
        drain.make_queue(server)
        run_jobs(postgres, server, agent, jobs // 10)
        bench.say("through the agent")
        row = run_jobs(postgres, server, agent, jobs)
    result.rows.append(row)
    result.rows.extend({"what": what, "programs": jobs, "per s": per_s} for what, per_s in plain.items())
    limit = max(plain[what] for what in plain_spawn.LOOPS)
    result.figures["plain_spawn_per_s"] = limit
    result.figures["through_agent_per_s"] = per_s = float(row["per s"] or 0)
    result.bound("to_plain_spawn", per_s / limit, ">= 0.3", ratio=True)
    result.ratios["to_plain_spawn_on_all_cpus"] = per_s / max(plain.values())
    result.notes.append(
        f"each program has a keeper, a journalled lease, files of its own and a committed end; plain spawn is the "
        f"better of {' and '.join(plain_spawn.LOOPS)}, and has the host to itself"
    )
    return result
