"""Replicas wake each other, and one that is alone is silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest

from lessor_server.bells import Bells
from lessor_server.wakeups import CHANNEL, HERE, Wakeups

pytestmark = pytest.mark.integration

_SOON_S = 10.0


@asynccontextmanager
async def replica(database_url: str, name: str, *, beacon_s: float) -> AsyncIterator[Bells]:
    """The wake-ups of one replica."""
    bells = Bells()
    wakeups = Wakeups(database_url, bells, name, beacon_s=beacon_s)
    task = asyncio.create_task(wakeups.run())
    try:
        yield bells
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Ear:
    """Hears what is said on the channel."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection
        self._said: asyncio.Queue[str] = asyncio.Queue()

    async def listen(self) -> None:
        await self._connection.add_listener(CHANNEL, lambda *message: self._said.put_nowait(str(message[-1])))

    async def next(self) -> str:
        async with asyncio.timeout(_SOON_S):
            return await self._said.get()

    async def until(self, message: str) -> list[str]:
        """Returns what was said before ``message``."""
        before = []
        async with asyncio.timeout(_SOON_S):
            while (said := await self._said.get()) != message:
                before.append(said)
        return before


@pytest.fixture
async def ear(database_url: str) -> AsyncIterator[Ear]:
    connection = await asyncpg.connect(database_url)
    made = Ear(connection)
    await made.listen()
    yield made
    await connection.close()


async def test_a_replica_that_is_alone_only_says_that_it_is_there(database_url: str, ear: Ear) -> None:
    async with replica(database_url, "a", beacon_s=0.05) as bells:
        assert await ear.next() == f"{HERE}a"
        for _ in range(3):
            bells.changed()
            assert await ear.next() == f"{HERE}a"


async def test_replicas_that_know_of_each_other_tell_changes(database_url: str, ear: Ear) -> None:
    # Beacons are far apart: a replica that is new is greeted at once.
    async with (
        replica(database_url, "a", beacon_s=3600) as here,
        replica(database_url, "b", beacon_s=3600) as there,
    ):
        for teller, hearer, name in ((here, there, "a"), (there, here, "b")):
            seen = hearer.planning.count, hearer.events.count
            async with asyncio.timeout(_SOON_S):
                # Nothing is told until the greeting has come.
                while hearer.planning.count == seen[0]:
                    teller.changed()
                    await hearer.planning.wait(seen[0], 0.1)
            assert hearer.events.count > seen[1]
            await ear.until(name)


async def test_a_beacon_rings_no_bell(database_url: str, ear: Ear) -> None:
    async with replica(database_url, "a", beacon_s=3600) as bells, replica(database_url, "b", beacon_s=0.05):
        await ear.until(f"{HERE}a")
        for _ in range(3):
            await ear.until(f"{HERE}b")
        assert (bells.planning.count, bells.events.count, bells.grants.count) == (0, 0, 0)


async def test_wakeups_come_back_when_their_connection_breaks(database_url: str, ear: Ear, pool: asyncpg.Pool) -> None:
    async with replica(database_url, "a", beacon_s=3600):
        await ear.until(f"{HERE}a")
        await pool.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND query LIKE 'SELECT pg_notify%' AND pid <> pg_backend_pid()"
        )
        async with replica(database_url, "b", beacon_s=0.2):
            await ear.until(f"{HERE}a")
