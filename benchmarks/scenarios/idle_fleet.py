"""Idle fleet: what thousands of connected agents that do nothing cost one server process."""

from __future__ import annotations

import asyncio
import resource
import threading
import time
from dataclasses import dataclass

import asyncpg
import uvloop

from benchmarks.report import Cell, Result, percentile
from benchmarks.scenarios import latency
from benchmarks.scenarios.drain import make_queue
from benchmarks.system import Bench, Fleet, Postgres, Server

TITLE = "connected agents that do nothing, one server process, a heartbeat each 5 s"
QUICK = False

SIZES = (1_000, 5_000, 10_000)
_FIRST_AGENTS = 64
"""Connect once before memory is measured: what is imported, compiled and pooled then does not count per agent."""
_SETTLE_S = 12.0
"""Between the last connection and the measurement: two heartbeats of each agent."""
_FLEET_PROCESSES = 2
_SPARE_FILES = 500
_JOBS = 100
"""Submitted one at a time in the end, to see what an idle fleet costs a job."""


@dataclass(frozen=True, slots=True)
class Window:
    """What was used during one stretch of doing nothing."""

    seconds: float
    server_cpu_s: float
    postgres_cpu_s: float
    fleet_cpu_s: float
    commits: int

    @property
    def commits_per_s(self) -> float:
        """Transactions committed per second."""
        return self.commits / self.seconds


def commits(postgres: Postgres) -> int:
    """Returns how many transactions the database has committed."""

    async def ask() -> int:
        connection = await asyncpg.connect(postgres.url)
        try:
            query = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
            return int(await connection.fetchval(query))
        finally:
            await connection.close()

    return asyncio.run(ask())


def watch(seconds: float, postgres: Postgres, server: Server, fleet: Fleet | None = None) -> Window:
    """Measures for so long what everybody uses."""

    def used() -> tuple[float, float, float]:
        return server.cpu_s(), postgres.cpu_s(), fleet.cpu_s() if fleet is not None else 0.0

    committed = commits(postgres)
    began_s, before = time.monotonic(), used()
    threading.Event().wait(seconds)
    took_s, after = time.monotonic() - began_s, used()
    spent = [b - a for a, b in zip(before, after, strict=True)]
    return Window(took_s, spent[0], spent[1], spent[2], commits(postgres) - committed)


def open_files() -> int:
    """Returns how many files a process may have open here, at most."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return hard if hard != resource.RLIM_INFINITY else 1 << 20


class IdleFleet:
    """The scenario for one size of the fleet, on a database and a server of its own."""

    def __init__(self, bench: Bench, result: Result, agents: int) -> None:
        self._bench = bench
        self._result = result
        self._agents = agents
        self.commits_per_s = 0.0
        """Transactions per second, once measured."""

    def run(self) -> None:
        """Connects the agents, measures, adds a row and figures."""
        bench, agents = self._bench, self._agents
        bench.say(f"{agents:,} agents")
        with bench.postgres() as postgres, bench.server(postgres) as server:
            make_queue(server, latency.QUEUE)
            alone = watch(bench.scale(10, 3), postgres, server)
            with bench.fleet(server, _FIRST_AGENTS):
                pass
            # Their streams end, and what was held for them is free again.
            threading.Event().wait(2.0)
            rss_before = server.rss_bytes()
            began_s = time.monotonic()
            with bench.fleet(server, agents, processes=_FLEET_PROCESSES, trace=True) as fleet:
                connected_s = time.monotonic() - began_s
                threading.Event().wait(bench.scale(1, 0) * _SETTLE_S)
                fleet.ask("reset")
                window = watch(bench.scale(20, 5), postgres, server, fleet)
                stats = fleet.ask("stats")
                rss = server.rss_bytes() - rss_before
                made = uvloop.run(latency.trips(server.address, _JOBS))
                began = latency.begun(fleet)
        lost, up = sum(s["streams_lost"] for s in stats), sum(s["up"] for s in stats)
        if lost or up < agents:
            raise RuntimeError(f"of {agents:,} agents {up:,} are connected, {lost:,} streams broke")
        ack_p50_ms = max(s["heartbeat_ack_p50_ms"] for s in stats)
        ack_p99_ms = max(s["heartbeat_ack_p99_ms"] for s in stats)
        self.commits_per_s = window.commits_per_s
        to_running = [(began[trip.job_id] - trip.submitted) / 1e6 for trip in made]
        share, kb = window.server_cpu_s / window.seconds, rss / 1024 / agents
        row: dict[str, Cell] = {
            "agents": agents,
            "server cores": share,
            "postgres cores": window.postgres_cpu_s / window.seconds,
            "fleet cores": window.fleet_cpu_s / window.seconds,
            "server KB/agent": kb,
            "transactions/s": window.commits_per_s,
            "without agents": alone.commits_per_s,
            "heartbeats/s": sum(s["heartbeat_acks"] for s in stats) / window.seconds,
            "ack p50 ms": ack_p50_ms,
            "ack p99 ms": ack_p99_ms,
            "connected in s": connected_s,
            "a job runs p50 ms": percentile(to_running, 0.5),
            "a job runs p99 ms": percentile(to_running, 0.99),
        }
        self._result.rows.append(row)
        figures = self._result.figures
        figures[f"heartbeat_ack_p99_ms_{agents}"] = ack_p99_ms
        figures[f"postgres_cpu_share_{agents}"] = window.postgres_cpu_s / window.seconds
        figures[f"transactions_per_s_{agents}"] = window.commits_per_s
        if agents == max(SIZES):
            self._result.bound("server_cpu_share", share, "<= 0.5")
            self._result.bound("server_kb_per_agent", kb, "<= 100")
        else:
            figures[f"server_cpu_share_{agents}"] = share
            figures[f"server_kb_per_agent_{agents}"] = kb


def run(bench: Bench) -> Result:
    """Runs the scenario."""
    result = Result("idle_fleet", TITLE)
    sizes = [size for size in SIZES if size + _SPARE_FILES <= open_files()]
    if len(sizes) < len(SIZES):
        result.notes.append(f"fleets larger than {max(sizes, default=0):,} are left out: {open_files():,} open files")
    runs = {size: IdleFleet(bench, result, size) for size in sizes[: bench.scale(len(sizes), 1)]}
    for one in runs.values():
        one.run()
    if len(runs) > 1:
        most, least = runs[max(runs)], runs[min(runs)]
        ratio = most.commits_per_s / least.commits_per_s
        result.bound("transactions_most_to_fewest_agents", ratio, "<= 1.5", ratio=True)
    result.notes.append(
        f"an ack waits until the heartbeats of 100 ms are stored together; {_JOBS} jobs are submitted one at a time, "
        "after the measurement; few agents that connected together beat together, in fewer transactions than many"
    )
    return result
