"""What can be restarted, and in which ways: the parts of a world, each taken away and brought back."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from lessor_agent.runtimes.process import find_keepers
from tests.chaos.faults import Way, away, stop_keeper
from tests.chaos.history import Fault, Submitted
from tests.chaos.load import Load
from tests.chaos.workload import now_ns
from tests.chaos.world import Program, Replica, World, WorldBroken
from tests.support.processes import wait_gone

KEEPERS_KILLED = 5


@dataclass
class Trial:
    """A world in which a part is restarted, and its jobs."""

    world: World
    way: Way
    load: Load
    lasting: Sequence[Submitted] = ()
    """The jobs that do not end before the part is back."""
    faults: list[Fault] = field(default_factory=list)
    down: set[Replica] = field(default_factory=set)
    """Replicas that are away: nobody is sent there, as by any balancer that asks for health."""

    def open(self, gate: str) -> None:
        """Lets the jobs behind a gate end."""
        Path(self.gate(gate)).touch()

    def gate(self, gate: str) -> str:
        """Returns the path of a gate."""
        return str(self.world.directory / f"gate-{gate}")

    def targets(self) -> list[tuple[str, int]]:
        """Returns the replicas to connect to, in the order to try."""
        replicas = self.world.replicas
        there = [replica for replica in replicas if replica not in self.down]
        return [("127.0.0.1", replica.port) for replica in self.world.rng.sample(there, len(there))]


# ── the parts ────────────────────────────────────────────────────────────────

Part = Callable[[Trial], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def _agents(trial: Trial) -> AsyncIterator[None]:
    async with _away_together(trial.world.agents, trial.way):
        yield


@asynccontextmanager
async def _away_together(programs: Sequence[Program], way: Way) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        takers = [away(program, way) for program in programs]
        await asyncio.gather(*(taker.__aenter__() for taker in takers))
        for taker in takers:
            stack.push_async_exit(taker)
        yield


@asynccontextmanager
async def _keepers(trial: Trial) -> AsyncIterator[None]:
    keepers = await asyncio.to_thread(_keepers_of, trial.world)
    if trial.way is Way.KILL:
        await _kill_keepers(trial, keepers)
        yield
        return
    number = signal.SIGTERM if trial.way is Way.TERM else signal.SIGSTOP
    for pid in keepers.values():
        os.kill(pid, number)
    yield
    if trial.way is Way.STOP:
        for pid in keepers.values():
            os.kill(pid, signal.SIGCONT)


def _keepers_of(world: World) -> dict[int, int]:
    """Returns lease_id → pid."""
    return {lease_id: pid for agent in world.agents for lease_id, pid in find_keepers(agent.state_dir).items()}


async def _kill_keepers(trial: Trial, keepers: dict[int, int]) -> None:
    lasting = {job.job_number for job in trial.lasting}
    async with trial.world.database() as connection:
        rows = await connection.fetch("SELECT lease_id, job_id FROM lease ORDER BY lease_id")
    leases = [row["lease_id"] for row in rows if row["job_id"] in lasting and row["lease_id"] in keepers]
    for lease_id in leases[:: max(1, len(leases) // KEEPERS_KILLED)][:KEEPERS_KILLED]:
        from_ns = now_ns()
        if not stop_keeper(keepers[lease_id], lease_id):
            raise WorldBroken(f"lease {lease_id} has no keeper though its job runs")
        os.kill(keepers[lease_id], signal.SIGKILL)
        trial.faults.append(Fault("keeper KILL", "keeper", from_ns, now_ns(), lease_id=lease_id))


@asynccontextmanager
async def _replicas(trial: Trial, *, leads: bool) -> AsyncIterator[None]:
    async with trial.world.database() as connection:
        holder = await connection.fetchval("SELECT holder FROM leader")
    chosen = next((one for one in trial.world.replicas if (f"-{_pid(one)}-" in holder) is leads), None)
    if chosen is None:
        raise WorldBroken(f"of the replicas none {'leads' if leads else 'follows'}: the leader is {holder!r}")
    trial.down.add(chosen)
    async with away(chosen, trial.way):
        yield
    if trial.way is not Way.STOP:
        await chosen.listens()
    trial.down.clear()


def _follower(trial: Trial) -> AbstractAsyncContextManager[None]:
    return _replicas(trial, leads=False)


def _leader(trial: Trial) -> AbstractAsyncContextManager[None]:
    return _replicas(trial, leads=True)


def _pid(program: Program) -> int:
    assert program.process is not None
    return program.process.pid


@asynccontextmanager
async def _postgres(trial: Trial) -> AsyncIterator[None]:
    postgres = trial.world.postgres
    if trial.way is Way.STOP:
        stopped = await asyncio.to_thread(_stop_postgres, postgres.pid)
        yield
        for process in reversed(stopped):
            with suppress(psutil.NoSuchProcess):
                process.resume()
        return
    if trial.way is Way.KILL:
        # The postmaster alone: its backends notice, and the next one has to wait for the last of them.
        backends = psutil.Process(postgres.pid).children()
        os.kill(postgres.pid, signal.SIGKILL)
        for backend in backends:
            await asyncio.to_thread(wait_gone, backend.pid)
    await asyncio.to_thread(postgres.stop)
    yield
    await asyncio.to_thread(postgres.start)


def _stop_postgres(pid: int) -> list[psutil.Process]:
    """Stops the postmaster, then all of its processes; it makes no new ones meanwhile. Returns them."""
    postmaster = psutil.Process(pid)
    postmaster.suspend()
    stopped = [postmaster]
    for backend in postmaster.children():
        with suppress(psutil.NoSuchProcess):
            backend.suspend()
            stopped.append(backend)
    return stopped


@asynccontextmanager
async def _control_plane(trial: Trial) -> AsyncIterator[None]:
    world = trial.world
    trial.down |= set(world.replicas)
    async with _away_together(world.replicas, trial.way):
        await asyncio.to_thread(world.postgres.stop)
        yield
        await asyncio.to_thread(world.postgres.start)
    for replica in world.replicas:
        await replica.listens()
    trial.down.clear()


PARTS: dict[str, Part] = {
    "agent": _agents,
    "keeper": _keepers,
    "server": _follower,
    "leader": _leader,
    "Postgres": _postgres,
    "control plane": _control_plane,
}
"""Name → what takes the part away on entry and brings it back on exit: all agents, all keepers (KILL: some of them),
a replica that follows, the one that leads, the database, or the database with all replicas."""
