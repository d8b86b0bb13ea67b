"""A leader that is told to stop hands over at once, whatever else it still has to do."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import asyncpg
import pytest

import lessor
from lessor import timing
from lessor_server import server as server_module
from lessor_server.config import ServerSettings
from lessor_server.server import Server
from tests.support.servers import running_server

pytestmark = pytest.mark.integration


async def test_a_commit_that_hangs_does_not_hold_up_the_next_leader(
    database_url: str, pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_GRACE_S", 0.1)
    # Nobody takes over because a leader is silent, however long this host stands still.
    monkeypatch.setattr(timing, "LEADER_TAKEOVER", timedelta(hours=1))
    leader = Server(ServerSettings(database_url=database_url, listen="127.0.0.1:0"))
    await leader.start()
    async with running_server(database_url) as follower, lessor.AsyncClient(f"127.0.0.1:{leader.port}") as client:
        async with pool.acquire() as brake, brake.transaction():
            await brake.execute("LOCK TABLE job IN EXCLUSIVE MODE")
            submitting = asyncio.create_task(client.submit(["/bin/true"], request_id="held-up"))
            await waits_for_a_lock(pool)
            term = await pool.fetchrow("SELECT epoch, holder FROM leader")
            assert term is not None
            assert term["holder"] == leader.replica
            stopping = asyncio.create_task(leader.stop())
            async with asyncio.timeout(30):
                while await pool.fetchval("SELECT holder FROM leader") != follower.replica:
                    continue
            assert not stopping.done()
            # One for the resignation, one for the term that it made way for.
            assert await pool.fetchval("SELECT epoch FROM leader") == term["epoch"] + 2
        await stopping
        # What was under way was committed, and is found again by those that ask once more.
        submitting.cancel()
        await asyncio.gather(submitting, return_exceptions=True)
        async with lessor.AsyncClient(f"127.0.0.1:{follower.port}") as again:
            assert (await again.submit(["/bin/true"], request_id="held-up")).existing
        assert await pool.fetchval("SELECT count(*) FROM job") == 1


async def waits_for_a_lock(pool: asyncpg.Pool) -> None:
    """Returns once a statement of the server waits for the table."""
    async with asyncio.timeout(30):
        while not await pool.fetchval(
            "SELECT EXISTS (SELECT FROM pg_locks WHERE relation = 'job'::regclass AND NOT granted)"
        ):
            continue
