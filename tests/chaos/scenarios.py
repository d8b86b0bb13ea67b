"""Targeted schedules, one per rule of the protocol: the interleaving in which it matters.

Each runs on loopback with two agents, with a mutant planted or without one. Without
one nothing may be wrong: that shows that it is the mutant that is caught.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import asyncpg

import lessor
from lessor.ids import encode_job_id
from lessor_agent.boottime import boot_id
from lessor_agent.keeper.directory import LeaseDirectory
from lessor_agent.runtimes.process import find_keepers
from tests.chaos.checker import Violation, check
from tests.chaos.evidence import collect
from tests.chaos.history import Execution, Fault, Submitted, read_executions
from tests.chaos.load import Load, Plan
from tests.chaos.mutants import MUTANTS, Mutant
from tests.chaos.overlay import Edit
from tests.chaos.run import come_to_rest
from tests.chaos.workload import now_ns
from tests.chaos.world import AgentHost, Shape, World, WorldBroken, running_world

PATIENCE_S = 40.0
REST_S = 25.0
"""After a scenario, all jobs end within this."""
_LOOK_S = 0.02
_LONG = Plan(seconds=60.0, stubborn=True, lines=5)
"""A job that nothing but SIGKILL ends."""


class Stage:
    """A world for one scenario, and what scenarios ask of it."""

    def __init__(self, world: World, client: lessor.AsyncClient) -> None:
        self.world = world
        self.client = client
        self.load = Load(world, client, random.Random(0))

    async def run(self, plan: Plan) -> Submitted:
        """Submits a job and waits until it runs."""
        (job,) = await self.load.submit([plan])
        await self.executions(job, 1)
        return job

    async def executions(self, job: Submitted, count: int) -> list[Execution]:
        """Waits until a job has begun so often, and ticks; returns its executions."""
        job_id = encode_job_id(job.job_number)
        found: list[Execution] = []

        def begun() -> bool:
            found[:] = [one for one in read_executions(self.world.diaries) if one.job_id == job_id]
            return len(found) >= count and found[-1].last_ns > found[-1].started_ns

        await until(begun)
        return found

    async def host_of(self, job: Submitted) -> AgentHost:
        """Returns the agent that holds a job's lease."""
        async with self.world.database() as connection:
            name = await connection.fetchval(
                "SELECT a.name FROM lease AS l JOIN agent AS a ON a.id = l.agent_id WHERE l.job_id = $1", job.job_number
            )
        for agent in self.world.agents:
            if agent.name == name:
                return agent
        raise WorldBroken(f"{job.name} has no lease any more: this host is too slow for a job that ends so soon")

    async def waits(self, job: Submitted) -> None:
        """Waits until a job waits for a grant."""
        async with self.world.database() as connection:
            await until_true(connection, "SELECT EXISTS (SELECT FROM ready WHERE job_id = $1)", job.job_number)

    async def cancel(self, job: Submitted) -> None:
        """Cancels a job."""
        await self.load.cancel(job.name, encode_job_id(job.job_number))


async def until(condition: Callable[[], bool], within_s: float = PATIENCE_S, look_s: float = _LOOK_S) -> None:
    """Waits for what another process writes; it is looked at every ``look_s``."""
    async with asyncio.timeout(within_s):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(look_s)


async def until_true(connection: asyncpg.Connection, query: str, *arguments: object) -> None:
    """Waits until a query returns true."""
    async with asyncio.timeout(PATIENCE_S):
        while not await connection.fetchval(query, *arguments):  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(_LOOK_S)


# ── the scenarios ────────────────────────────────────────────────────────────


async def agent_cut_off(stage: Stage) -> None:
    """An agent is cut off for longer than a lease; another gets its job."""
    job = await stage.run(_LONG)
    host = await stage.host_of(job)
    host.relay.refuse()
    await stage.executions(job, 2)
    host.relay.mend()
    await stage.cancel(job)


async def keeper_late_at_the_deadline(stage: Stage) -> None:
    """An agent is cut off, and the host is so busy that its keeper comes nearly a second late. Three times."""
    job = await stage.run(_LONG)
    for attempt in (2, 3, 4):
        host = await stage.host_of(job)
        host.relay.refuse()
        (keeper,) = find_keepers(host.state_dir).items()
        lease_id, pid = keeper
        deadline_ns = await _final_deadline_ns(host, lease_id)
        await _sleep_until(deadline_ns - 300_000_000)
        os.kill(pid, signal.SIGSTOP)
        await _sleep_until(deadline_ns + 650_000_000)
        os.kill(pid, signal.SIGCONT)
        await stage.executions(job, attempt)
        host.relay.mend()
    await stage.cancel(job)


async def _final_deadline_ns(host: AgentHost, lease_id: int) -> int:
    """Returns the deadline of a lease whose agent was just cut off, once no renewal is under way any more."""
    # Read by the agent's turn of the loop: an ack that came before the cut has moved it by then.
    await asyncio.sleep(0.5)
    directory = LeaseDirectory(str(host.state_dir / "leases" / str(lease_id)), lease_id)
    with contextlib.closing(directory), contextlib.closing(directory.map_record(boot_id())) as record:
        return record.deadline_ns()


async def _sleep_until(instant_ns: int) -> None:
    await asyncio.sleep(max(0, instant_ns - now_ns()) / 1e9)


async def end_from_a_stopped_replica(stage: Stage) -> None:
    """A replica stops with an end in its socket; the lease expires, the job runs elsewhere; the replica goes on."""
    world = stage.world
    for agent, replica in zip(world.agents, world.replicas, strict=True):
        agent.relay.targets = lambda port=replica.port: [("127.0.0.1", port)]  # type: ignore[misc]
        agent.relay.cut()
    await asyncio.sleep(1.0)
    job = await stage.run(Plan(seconds=6.0, exits=(7, 0)))
    host = await stage.host_of(job)
    replica = world.replicas[host.number]
    await _while_ticking(stage, job, 3.0)
    replica.send(signal.SIGSTOP)
    await until(lambda: any(one.exit_code is not None for one in read_executions(world.diaries)))
    # The end is journalled and sent; the kernel takes it for the stopped process.
    await asyncio.sleep(0.7)
    host.relay.close_door()
    host.relay.up.hold()
    host.relay.down.hold()
    await stage.executions(job, 2)
    replica.send(signal.SIGCONT)
    await _while_ticking(stage, job, 1.0)
    host.relay.mend()
    host.relay.cut()


async def _while_ticking(stage: Stage, job: Submitted, seconds: float) -> None:
    """Waits until the newest execution of a job has lived so long."""
    job_id = encode_job_id(job.job_number)

    def lived() -> bool:
        newest = [one for one in read_executions(stage.world.diaries) if one.job_id == job_id][-1]
        return newest.exit_code is not None or newest.last_ns - newest.started_ns > seconds * 1e9

    await until(lived)


async def end_lost_on_the_way(stage: Stage) -> None:
    """A job ends while nothing comes through; then the connection is reset."""
    job = await stage.run(Plan(seconds=2.0))
    relay = (await stage.host_of(job)).relay
    relay.up.hold()
    await until(lambda: any(one.exit_code is not None for one in read_executions(stage.world.diaries)))
    # Sent, and held in the relay: what the cut throws away is the end.
    await asyncio.sleep(0.7)
    relay.cut()
    relay.mend()


async def ack_comes_late(stage: Stage) -> None:
    """The ack of a heartbeat comes seconds after it was sent, and no further heartbeat gets through."""
    job = await stage.run(_LONG)
    host = await stage.host_of(job)
    host.relay.close_door()
    host.relay.down.hold()
    host.relay.up.hold_after_next()
    await until(lambda: host.relay.up.held)
    # Short of the three intervals after which the agent leaves a silent stream.
    await asyncio.sleep(4.8)
    host.relay.down.flow()
    await stage.executions(job, 2)
    await _while_ticking(stage, job, 3.0)
    host.relay.cut()
    host.relay.mend()
    await stage.cancel(job)


async def cancel(stage: Stage) -> None:
    """A running job is cancelled."""
    job = await stage.run(Plan(seconds=16.0))
    await stage.cancel(job)


_TRIES = 3
_TWO_LEAD = 1.4
"""Seconds of lease time in one: more than one leader counts it."""


async def _lease_time_per_second(stage: Stage) -> float:
    async with stage.world.database() as connection:
        before_ms, from_s = await connection.fetchval("SELECT clock FROM leader"), time.monotonic()
        await asyncio.sleep(2.0)
        after_ms = await connection.fetchval("SELECT clock FROM leader")
    return float(after_ms - before_ms) / 1000 / (time.monotonic() - from_s)


async def two_stopped_leaders(stage: Stage) -> None:
    """Each replica stands still for a while, so that both have led; then an agent is cut off."""
    job = await stage.run(_LONG)
    for _ in range(_TRIES):
        for replica in stage.world.replicas:
            replica.send(signal.SIGSTOP)
            await asyncio.sleep(3.0)
            replica.send(signal.SIGCONT)
            await asyncio.sleep(1.0)
        # One whose connection broke meanwhile asks who leads before it goes on; then there is nothing to see yet.
        if await _lease_time_per_second(stage) > _TWO_LEAD:
            break
    await stage.executions(job, 1)
    host = await stage.host_of(job)
    # A renewal first: the stops themselves must not cost the lease.
    async with stage.world.database() as connection:
        before = await connection.fetchval("SELECT max(renewed_at) FROM session")
        await until_true(connection, "SELECT min(renewed_at) > $1 FROM session", before)
    host.relay.refuse()
    await stage.executions(job, 2)
    await _while_ticking(stage, job, 1.0)
    host.relay.mend()
    await stage.cancel(job)


_EXPIRY_WAITS = """
SELECT EXISTS (
    SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%overdue AS MATERIALIZED%'
)
"""
_HELLO_CAME = """
SELECT (SELECT sum(epoch) FROM session) > $1 OR EXISTS (
    SELECT FROM pg_stat_activity
    WHERE wait_event_type = 'Lock' AND query LIKE '%UPDATE session%' AND query NOT LIKE '%overdue AS MATERIALIZED%'
)
"""


async def renewal_amid_expiry(stage: Stage) -> None:
    """A lease is being expired, and takes long over it; its agent comes back meanwhile."""
    job = await stage.run(Plan(seconds=14.0, stubborn=True, gpus=1))
    host = await stage.host_of(job)
    async with stage.world.database() as brake, stage.world.database() as connection:
        host.relay.refuse()
        # The expiry ends the lease first and frees its GPU then: held, the row stops it in between.
        async with brake.transaction():
            await brake.execute("SELECT FROM lease_gpu FOR UPDATE")
            await until_true(connection, _EXPIRY_WAITS)
            epochs = await connection.fetchval("SELECT sum(epoch) FROM session")
            host.relay.mend()
            await until_true(connection, _HELLO_CAME, epochs)


async def ended_while_waiting(stage: Stage) -> None:
    """A job ends while its agent is cut off; its lease expires, nobody else may run it; the agent comes back."""
    job = await stage.run(Plan(seconds=3.0, selectors=("host=agent-0",)))
    host = await stage.host_of(job)
    host.relay.refuse()
    await stage.waits(job)
    host.relay.mend()


async def ended_without_an_agent(stage: Stage) -> None:
    """The same with the agent killed: the next one finds the end on the host."""
    job = await stage.run(Plan(seconds=3.0, selectors=("host=agent-0",)))
    host = await stage.host_of(job)
    await host.kill()
    await stage.waits(job)
    host.start()


SCENARIOS: dict[str, Callable[[Stage], Awaitable[None]]] = {
    function.__name__: function
    for function in (
        agent_cut_off, keeper_late_at_the_deadline, end_from_a_stopped_replica, end_lost_on_the_way, ack_comes_late,
        cancel, two_stopped_leaders, renewal_amid_expiry, ended_while_waiting, ended_without_an_agent,
    )
}  # fmt: skip


# ── running them ─────────────────────────────────────────────────────────────


async def play(scenario: str, edits: Sequence[Edit] = (), keep: Path | None = None) -> list[Violation]:
    """Plays a scenario, with bugs planted or without. Returns what the checker says.

    Raises:
        TimeoutError: Something that the scenario waits for did not happen.
    """
    with tempfile.TemporaryDirectory(prefix="lessor-chaos-", ignore_cleanup_errors=True) as temporary:
        shape = Shape(agents=2, replicas=2, networks=False, heartbeat="2500ms", edits=edits)
        async with running_world(keep or Path(temporary), shape, 0) as world, world.client() as client:
            stage = Stage(world, client)
            from_ns = now_ns()
            await SCENARIOS[scenario](stage)
            await come_to_rest(world, REST_S)
            # What a scenario does, it does to everybody: a loss is no surprise. A cancel is heeded nevertheless.
            faults = [] if scenario == "cancel" else [Fault("scenario", "all", from_ns, now_ns())]
            return check(await collect(world, stage.load.submitted.values(), faults))


async def run_mutants(names: Sequence[str]) -> int:
    """Plays each mutant's scenario without and with it, and prints what was caught. Returns 0 if all were.

    Args:
        names: Which; empty: all.
    """
    known = {mutant.name: mutant for mutant in MUTANTS}
    if unknown := [name for name in names if name not in known]:
        print(f"no mutant {', '.join(unknown)}: there are {', '.join(known)}")
        return 2
    failed = []
    for mutant in [known[name] for name in names] or MUTANTS:
        begin_s = time.monotonic()
        word = await _judge(mutant)
        print(f"{mutant.name:20} {time.monotonic() - begin_s:5.1f} s  {word}", flush=True)
        if not word.startswith("caught"):
            failed.append(mutant.name)
    print(f"{len(names or MUTANTS) - len(failed)} of {len(names or MUTANTS)} mutants caught")
    return 1 if failed else 0


async def _judge(mutant: Mutant) -> str:
    """Returns one line: what the mutant was caught as, or why that was not shown."""
    # Side by side, each in a world of its own: most of their time both wait for a lease to run out.
    healthy, found = await asyncio.gather(
        play(mutant.scenario), play(mutant.scenario, mutant.edits), return_exceptions=True
    )
    for which, result in (("without it", healthy), ("with it", found)):
        if isinstance(result, BaseException):
            return f"NOT SHOWN: {mutant.scenario} {which} did not come to its end: {type(result).__name__}: {result}"
    assert not isinstance(healthy, BaseException)
    assert not isinstance(found, BaseException)
    if healthy:
        return f"NOT SHOWN: without it {mutant.scenario} is not clean: {healthy[0]}"
    caught = [violation for violation in found if violation.kind in mutant.caught_as]
    if caught:
        return f"caught: {caught[0]}"
    return f"NOT CAUGHT in {mutant.scenario}: {[str(one) for one in found] or 'nothing'}"
