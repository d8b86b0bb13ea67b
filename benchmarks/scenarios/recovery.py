"""Recovery: a thousand agents vanish and their leases are granted again; a server dies and they come back to it."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import asyncpg
from google.protobuf.duration_pb2 import Duration

from benchmarks.report import Result, percentile
from benchmarks.scenarios import drain
from benchmarks.system import Bench, Fleet, Postgres, Server
from lessor import timing
from lessor.ids import encode_job_id
from lessor.lifecycle import Outcome
from lessor.v1 import job_pb2
from lessor.v1 import job_service_pb2 as pb

TITLE = "agents that vanish all at once, and a server killed under its agents"
QUICK = False

QUEUE = "recovery"
JOBS_PER_AGENT = 8
SLOTS = 16
HEARTBEAT_S = 2.0
TTL = timing.MIN_TTL

_POLL_S = 0.05
_CLOCK_POLL_S = 0.01
_PATIENCE_S = 120.0
_LOST = f"SELECT count(*) FROM attempt WHERE outcome = {int(Outcome.LOST)}"
_LEASES = "SELECT count(*) FROM lease"


def run(bench: Bench) -> Result:
    """Runs the scenario."""
    result = Result("recovery", TITLE)
    agents = bench.scale(1_000, 100)
    options: dict[str, Any] = {"work": "hold", "slots": SLOTS, "heartbeat": HEARTBEAT_S}
    # What is measured is how fast leases are granted again once they expire, not the wait before that.
    with bench.postgres() as postgres, bench.server(postgres, "--storm-brake-max", "0") as server:
        drain.make_queue(server, QUEUE)
        with bench.fleet(server, agents, **options) as vanishing:
            _lease(server, vanishing, agents * JOBS_PER_AGENT)
            # The same program with other names: they wait beside those that will vanish.
            with bench.fleet(server, agents, first=agents, trace=True, **options) as standby:
                bench.say(f"{agents} agents with {agents * JOBS_PER_AGENT} leases vanish")
                asyncio.run(_vanish(postgres, vanishing, standby, result))
                bench.say("the server is killed")
                asyncio.run(_restart(postgres, server, standby, result))
    result.notes.append("storm brake off: lease time runs on while all these sessions are silent at once")
    result.notes.append(
        f"ttl {TTL / timedelta(seconds=1):.0f} s, heartbeat {HEARTBEAT_S:.0f} s; a lease expires at renewed_at + ttl + "
        "margin by lease time, which advances every 250 ms; both fleets are processes of this host"
    )
    return result


def _lease(server: Server, fleet: Fleet, jobs: int) -> None:
    """Has the fleet hold ``jobs`` jobs that do not end."""
    ttl = Duration()
    ttl.FromTimedelta(TTL)
    spec = job_pb2.JobSpec(queue=QUEUE, command=job_pb2.Command(argv=["/bin/true"]), lease=job_pb2.LeasePolicy(ttl=ttl))
    with server.channel() as channel:
        stub = server.jobs(channel)
        for begin in range(0, jobs, drain.BATCH):
            stub.SubmitJobs(pb.SubmitJobsRequest(specs=[spec] * min(drain.BATCH, jobs - begin)))
    give_up = time.monotonic() + _PATIENCE_S
    while (began := sum(answer["began"] for answer in fleet.ask("stats"))) < jobs:
        if time.monotonic() > give_up:
            raise RuntimeError(f"only {began} of {jobs} jobs began")
        time.sleep(_POLL_S)


# ---------------------------------------------------------------- agents vanish


async def _vanish(postgres: Postgres, vanishing: Fleet, standby: Fleet, result: Result) -> None:
    connection = await asyncpg.connect(postgres.url)
    try:
        leases = await connection.fetchval(_LEASES)
        await asyncio.to_thread(vanishing.kill)
        killed_s = time.monotonic()
        due_ms = await _expiries(connection)
        async with LeaseTime.followed(postgres) as lease_time:
            begun = await asyncio.to_thread(_await_begun, standby, leases)
    finally:
        await connection.close()
    expired_s = {job_id: lease_time.passed_s(ms) for job_id, ms in due_ms.items()}
    last_s = max(expired_s.values())
    again_s = max(begun.values()) / 1e9
    delays = [begun[job_id] / 1e9 - at_s for job_id, at_s in expired_s.items()]
    result.rows.append(
        {
            "what": "agents vanished",
            "leases": leases,
            "first expiry s": min(expired_s.values()) - killed_s,
            "last expiry s": last_s - killed_s,
            "last begun again s": again_s - killed_s,
            "own expiry to begun p50 s": percentile(delays, 0.5),
            "p99 s": percentile(delays, 0.99),
            "max s": max(delays),
        }
    )
    result.figures["regrant_p50_s"] = percentile(delays, 0.5)
    result.figures["regrant_each_max_s"] = max(delays)
    result.bound("regrant_s", again_s - last_s, "<= 2")


class LeaseTime:
    """Lease time on our clock: when it was seen to pass what."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, float]] = []
        """(lease time in ms, when it was first seen): both grow."""

    @classmethod
    @asynccontextmanager
    async def followed(cls, postgres: Postgres) -> AsyncIterator[LeaseTime]:
        """Looks at it while the block runs."""
        lease_time = cls()
        connection = await asyncpg.connect(postgres.url)
        task = asyncio.create_task(lease_time._follow(connection))
        try:
            yield lease_time
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await connection.close()

    async def _follow(self, connection: asyncpg.Connection) -> None:
        while True:
            self.note(await connection.fetchval("SELECT clock FROM leader"), time.monotonic())
            await asyncio.sleep(_CLOCK_POLL_S)

    def note(self, ms: int, at_s: float) -> None:
        """Takes down that it stood at ``ms`` at ``at_s`` (``time.monotonic``)."""
        if not self._seen or ms > self._seen[-1][0]:
            self._seen.append((ms, at_s))

    def passed_s(self, ms: float) -> float:
        """Returns when lease time was first seen beyond ``ms`` (``time.monotonic``).

        Raises:
            RuntimeError: It was not.
        """
        place = bisect_right(self._seen, ms, key=lambda seen: seen[0])
        if place == len(self._seen):
            raise RuntimeError("a job began again before its lease ran out")
        return self._seen[place][1]


async def _expiries(connection: asyncpg.Connection) -> dict[str, float]:
    """Returns job → lease time (ms) at which its lease runs out, now that nothing renews it any more."""
    rows = await connection.fetch(
        "SELECT l.job_id, s.renewed_at, l.ttl_ms FROM lease AS l JOIN session AS s ON s.id = l.session_id"
    )
    found = {}
    for row in rows:
        ttl = timedelta(milliseconds=row["ttl_ms"])
        wait_ms = (ttl + timing.margin(ttl)) / timedelta(milliseconds=1)
        found[encode_job_id(row["job_id"])] = row["renewed_at"] + wait_ms
    return found


def _await_begun(fleet: Fleet, jobs: int) -> dict[str, int]:
    """Returns job → when it began on ``fleet`` (CLOCK_MONOTONIC, ns), once ``jobs`` jobs have begun there."""
    give_up_s = time.monotonic() + _PATIENCE_S
    while (began := sum(answer["began"] for answer in fleet.ask("stats"))) < jobs:
        if time.monotonic() > give_up_s:
            raise RuntimeError(f"only {began} of {jobs} leases were granted again")
        time.sleep(_POLL_S)
    found: dict[str, int] = {}
    for answer in fleet.ask("begun"):
        found.update(answer["at"])
    return found


# ---------------------------------------------------------------- the server is killed


async def _restart(postgres: Postgres, server: Server, fleet: Fleet, result: Result) -> None:
    connection = await asyncpg.connect(postgres.url)
    try:
        lost_before = await connection.fetchval(_LOST)
        leases_before = await connection.fetchval(_LEASES)
        fleet.ask("reset")
        killed_s = time.monotonic()
        server.kill()
        server.start()
        listened_s = time.monotonic()
        back_s = await asyncio.to_thread(_await_welcomed, fleet, listened_s + _PATIENCE_S)
        # A lease that was not held on to would run out now, and be granted again.
        await asyncio.sleep((TTL + timing.margin(TTL)) / timedelta(seconds=1) + HEARTBEAT_S)
        answers = fleet.ask("stats")
        lost = await connection.fetchval(_LOST) - lost_before
        leases_after = await connection.fetchval(_LEASES)
    finally:
        await connection.close()
    again = sum(answer["began"] for answer in answers)
    result.rows.append(
        {
            "what": "server killed",
            "agents": fleet.agents,
            "server away s": listened_s - killed_s,
            "all back after s": back_s - listened_s,
            "leases before": leases_before,
            "leases after": leases_after,
            "attempts lost": lost,
            "begun again": again,
        }
    )
    result.bound("reattach_s", back_s - listened_s, "<= 5")
    result.bound("leases_lost", float(lost + abs(leases_before - leases_after) + again), "<= 0")


def _await_welcomed(fleet: Fleet, give_up_s: float) -> float:
    """Returns when the last agent was welcomed (``time.monotonic``), once all of them are connected again."""
    while True:
        answers = fleet.ask("stats")
        up = sum(answer["up"] for answer in answers)
        welcomes = sum(answer["welcomes"] for answer in answers)
        if up == fleet.agents and welcomes >= fleet.agents:
            return max(int(answer["last_welcome_ns"]) for answer in answers) / 1e9
        if time.monotonic() > give_up_s:
            raise RuntimeError(f"only {up} of {fleet.agents} agents came back")
        time.sleep(_POLL_S)
