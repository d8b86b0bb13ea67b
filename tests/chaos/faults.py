"""How each kind of fault is done to a world, and undone."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum

import asyncpg

from lessor_agent.keeper.kernel import read_title
from lessor_agent.runtimes.process import find_keepers
from tests.chaos.history import Fault
from tests.chaos.schedule import Planned
from tests.chaos.workload import now_ns
from tests.chaos.world import AgentHost, Program, Replica, World, read_proc

UNREACHABLE = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError)


@dataclass
class Injured:
    """What a fault has found to hit."""

    lease_id: int = 0
    missed: bool = False
    """There was nothing to hit: no keeper, no backend."""


Injury = Callable[[World, Planned, random.Random], AbstractAsyncContextManager[Injured]]
INJURIES: dict[str, Injury] = {}
"""Name of a kind → what does it on entry and heals it on exit."""


def injury(name: str) -> Callable[[Callable[[World, Planned, random.Random], AsyncIterator[Injured]]], Injury]:
    """Registers how a kind of fault is done."""

    def register(function: Callable[[World, Planned, random.Random], AsyncIterator[Injured]]) -> Injury:
        INJURIES[name] = asynccontextmanager(function)
        return INJURIES[name]

    return register


async def suffer(world: World, planned: Planned, seed: int) -> Fault | None:
    """Does a fault, lets it last, and heals it. Returns what to log, or None if there was nothing to hit."""
    rng = random.Random(f"fault {seed} {planned}")
    from_ns = now_ns()
    async with INJURIES[planned.kind](world, planned, rng) as injured:
        if not injured.missed and planned.lasts_s:
            await asyncio.sleep(planned.lasts_s)
    if injured.missed:
        return None
    return Fault(planned.kind, planned.whom, from_ns, now_ns(), lease_id=injured.lease_id)


def _agent(world: World, planned: Planned) -> AgentHost:
    return world.agents[planned.target]


def _replica(world: World, planned: Planned) -> Replica:
    return world.replicas[planned.target]


# ── the network of an agent ──────────────────────────────────────────────────


def _dropping(name: str, *chains: str) -> None:
    @injury(name)
    async def drop(world: World, planned: Planned, rng: random.Random) -> AsyncIterator[Injured]:
        cable = _agent(world, planned).cable
        assert cable is not None
        cable.drop(*chains, share=rng.uniform(0.1, 0.6) if name == "loss" else 1.0)
        yield Injured()
        cable.mend()


_dropping("partition", "INPUT", "OUTPUT")
_dropping("partition up", "OUTPUT")
_dropping("partition down", "INPUT")
_dropping("loss", "INPUT", "OUTPUT")


@injury("link down")
async def _link_down(world: World, planned: Planned, rng: random.Random) -> AsyncIterator[Injured]:
    cable = _agent(world, planned).cable
    assert cable is not None
    cable.unplug()
    yield Injured()
    cable.mend()


@injury("delay")
async def _delay(world: World, planned: Planned, rng: random.Random) -> AsyncIterator[Injured]:
    relay = _agent(world, planned).relay
    for direction in (relay.up, relay.down):
        direction.delay_s = rng.uniform(0.05, 1.5)
    yield Injured()
    relay.mend()


@injury("reset")
async def _reset(world: World, planned: Planned, rng: random.Random) -> AsyncIterator[Injured]:
    _agent(world, planned).relay.cut()
    yield Injured()


# ── processes ────────────────────────────────────────────────────────────────


class Way(StrEnum):
    """How a process is taken away."""

    TERM = "TERM"
    """Asked to stop, and started again."""
    KILL = "KILL"
    """Killed, and started again."""
    STOP = "STOP"
    """Stopped with SIGSTOP, and continued."""


@asynccontextmanager
async def away(program: Program, way: Way) -> AsyncIterator[None]:
    """Takes a process away, and brings it back."""
    if way is Way.STOP:
        program.send(signal.SIGSTOP)
    elif way is Way.KILL:
        await program.kill()
    else:
        await program.terminate()
    yield
    if way is Way.STOP:
        program.send(signal.SIGCONT)
    else:
        program.start()


def _process(name: str, program: Callable[[World, Planned], Program], way: Way) -> None:
    @injury(name)
    async def take_away(world: World, planned: Planned, rng: random.Random) -> AsyncIterator[Injured]:
        async with away(program(world, planned), way):
            yield Injured()


for _verb, _way in (("kill", Way.KILL), ("stop", Way.STOP), ("restart", Way.TERM)):
    _process(f"agent {_verb}", _agent, _way)
    _process(f"server {_verb}", _replica, _way)


@injury("zygote kill")
async def _zygote_kill(world: World, planned: Planned, rng: random.Random) -> AsyncIterator[Injured]:
    pid = await asyncio.to_thread(_zygote_of, world, _agent(world, planned))
    if pid is not None:
        _send(pid, signal.SIGKILL)
    yield Injured(missed=pid is None)


@injury("disk full")
async def _disk_full(world: World, planned: Planned, rng: random.Random) -> AsyncIterator[Injured]:
    disk = _agent(world, planned).disk
    assert disk is not None
    await asyncio.to_thread(disk.fill)
    yield Injured()
    disk.clear()


@injury("keeper kill")
async def _keeper_kill(world: World, planned: Planned, rng: random.Random) -> AsyncIterator[Injured]:
    lease_id, pid = await asyncio.to_thread(_stopped_keeper, _agent(world, planned), rng)
    if pid:
        _send(pid, signal.SIGKILL)
    yield Injured(lease_id, missed=not pid)


def _keeper_stops(name: str) -> None:
    @injury(name)
    async def stop(world: World, planned: Planned, rng: random.Random) -> AsyncIterator[Injured]:
        lease_id, pid = await asyncio.to_thread(_stopped_keeper, _agent(world, planned), rng)
        yield Injured(lease_id, missed=not pid)
        if pid:
            _send(pid, signal.SIGCONT)


_keeper_stops("keeper stop")
_keeper_stops("keeper long stop")


# ── PostgreSQL ───────────────────────────────────────────────────────────────


@injury("backend kill")
async def _backend_kill(world: World, planned: Planned, rng: random.Random) -> AsyncIterator[Injured]:
    pid = await _backend(world, rng)
    if pid:
        # PostgreSQL ends all other backends, too, and recovers.
        _send(pid, signal.SIGKILL)
    yield Injured(missed=not pid)


@injury("backend stop")
async def _backend_stop(world: World, planned: Planned, rng: random.Random) -> AsyncIterator[Injured]:
    pid = await _backend(world, rng)
    if pid:
        _send(pid, signal.SIGSTOP)
    yield Injured(missed=not pid)
    if pid:
        _send(pid, signal.SIGCONT)


@injury("postgres restart")
async def _postgres_restart(world: World, planned: Planned, rng: random.Random) -> AsyncIterator[Injured]:
    await asyncio.to_thread(world.postgres.stop)
    yield Injured()
    await asyncio.to_thread(world.postgres.start)


async def _backend(world: World, rng: random.Random) -> int:
    """Returns a connection's process, one at work if there is one; 0: there is none."""
    with suppress(*UNREACHABLE):
        async with world.database() as connection:
            rows = await connection.fetch(
                "SELECT pid, state FROM pg_stat_activity WHERE application_name = 'lessor' ORDER BY pid"
            )
        busy = [row["pid"] for row in rows if row["state"] != "idle"]
        if rows:
            return int(rng.choice(busy or [row["pid"] for row in rows]))
    return 0


def _stopped_keeper(agent: AgentHost, rng: random.Random) -> tuple[int, int]:
    """Stops a keeper. Returns (lease_id, pid), or (0, 0) if there is none."""
    keepers = find_keepers(agent.state_dir)
    for lease_id in rng.sample(sorted(keepers), len(keepers)):
        if stop_keeper(keepers[lease_id], lease_id):
            return lease_id, keepers[lease_id]
    return 0, 0


def stop_keeper(pid: int, lease_id: int) -> bool:
    """Stops a process if it is the keeper of this lease. Returns whether it was.

    It is looked at once it stands still: a keeper may end one lease and begin
    another at any time.
    """
    _send(pid, signal.SIGSTOP)
    title = read_title(pid)
    if title is not None and title[0] == lease_id:
        return True
    _send(pid, signal.SIGCONT)
    return False


def _zygote_of(world: World, agent: AgentHost) -> int | None:
    state_dir = os.fsencode(agent.state_dir)
    for pid in world.processes():
        words = read_proc(pid, "cmdline").split(b"\0")
        if b"--socket" in words and state_dir in words:
            return pid
    return None


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
