"""The leader is stopped, cut off, or caught in the middle of a transaction: another leads, and nothing late counts."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import asyncpg
import pytest

from lessor.sdk.wire import duration_message
from lessor.v1 import job_pb2
from tests.support.cluster import running_cluster, until
from tests.support.postgres_proxy import Fate, PostgresProxy
from tests.support.servers import RawAgent, connected, ended, running_server

pytestmark = pytest.mark.integration

TAKEOVER_BOUND = timedelta(seconds=5)
"""Far above what a take-over needs, for a machine that is busy; the figure is printed."""

SLOW = duration_message(timedelta(seconds=10))
"""A heartbeat interval that nothing here waits for."""


async def taken_over(pool: asyncpg.Pool, term: int, since_s: float) -> timedelta:
    """Waits until another term has begun; returns how long that took."""
    async with asyncio.timeout(60):
        while await pool.fetchval("SELECT epoch FROM leader") == term:
            continue
    took = timedelta(seconds=time.monotonic() - since_s)
    print(f"nobody led for {took.total_seconds():.2f} s")
    return took


async def next_beat(pool: asyncpg.Pool) -> int:
    """Returns the term once its leader has just ticked: the longest a follower can have to wait."""
    row = await pool.fetchrow("SELECT epoch, beat FROM leader")
    assert row is not None
    async with asyncio.timeout(60):
        while await pool.fetchval("SELECT beat FROM leader") == row["beat"]:
            continue
    return int(row["epoch"])


@pytest.fixture
async def proxy(database_url: str) -> AsyncIterator[PostgresProxy]:
    async with PostgresProxy(database_url) as made:
        yield made


async def test_the_leading_process_is_stopped_and_goes_on_later(
    database_url: str, pool: asyncpg.Pool, tmp_path: Path
) -> None:
    async with (
        running_cluster(database_url, tmp_path) as cluster,
        running_server(database_url) as follower,
        connected(follower) as client,
    ):
        agent = RawAgent(client, heartbeat_interval=SLOW)
        await agent.connect()
        term = await next_beat(pool)
        clock = await pool.fetchval("SELECT clock FROM leader")
        assert cluster.server is not None
        stopped_s = time.monotonic()
        cluster.server.send_signal(signal.SIGSTOP)
        took = await taken_over(pool, term, stopped_s)
        assert await pool.fetchval("SELECT holder FROM leader") == follower.replica
        job = await client.submit()
        await agent.heartbeat()
        lease = await agent.grant()
        # Whatever the old one has left to say, it says now.
        cluster.server.send_signal(signal.SIGCONT)
        log = tmp_path / "server.log"
        await until(lambda: "another replica leads" in log.read_text())
        row = await pool.fetchrow("SELECT epoch, holder, clock FROM leader")
        assert row is not None
        assert (row["epoch"], row["holder"]) == (term + 1, follower.replica)
        passed_ms = (time.monotonic() - stopped_s) * 1000
        assert row["clock"] - clock <= passed_ms, "lease time did not jump over the stop"
        await agent.run(lease)
        await agent.tell(lease, ended=ended())
        assert (await client.until(job, job_pb2.JOB_STATE_SUCCEEDED)).attempt == 1
        await agent.leave()
    assert took < TAKEOVER_BOUND


async def test_a_leader_that_is_cut_off_finds_out_when_it_is_back(
    database_url: str, pool: asyncpg.Pool, proxy: PostgresProxy
) -> None:
    async with running_server(proxy.url) as leader:
        term = await next_beat(pool)
        assert await pool.fetchval("SELECT holder FROM leader") == leader.replica
        async with running_server(database_url) as follower:
            cut_s = time.monotonic()
            proxy.go_away()
            took = await taken_over(pool, term, cut_s)
            proxy.come_back()
            async with connected(leader) as client, asyncio.timeout(60):
                agent = RawAgent(client, heartbeat_interval=SLOW)
                await agent.connect()
                job = await client.submit()
                lease = await agent.grant()
                assert lease.job_id == job
                await agent.leave()
            row = await pool.fetchrow("SELECT epoch, holder FROM leader")
            assert row is not None
            assert (row["epoch"], row["holder"]) == (term + 1, follower.replica)
    assert took < TAKEOVER_BOUND


@pytest.mark.parametrize(
    "words",
    [
        pytest.param("INSERT INTO lease (", id="a claim"),
        pytest.param("COMMIT", id="a hello"),
        pytest.param("clock = clock +", id="a tick"),
    ],
)
async def test_a_leader_caught_in_the_middle_of(
    database_url: str, pool: asyncpg.Pool, proxy: PostgresProxy, words: str
) -> None:
    """Its statement, or the end of its transaction, stays under way until the other has granted; then it arrives."""
    async with running_server(proxy.url) as caught, connected(caught) as old_client:
        term = await next_beat(pool)
        async with running_server(database_url) as follower, connected(follower) as client:
            agent = RawAgent(client, heartbeat_interval=SLOW)
            await agent.connect()
            proxy.expect(words, Fate.HOLD)
            mute = RawAgent(old_client, "raw-agent-2", heartbeat_interval=SLOW)
            greeting = asyncio.create_task(mute.connect()) if words == "COMMIT" else None
            job = await client.submit()
            await proxy.happened.wait()
            # The rest of it is as good as stopped: its other statements do not arrive either.
            caught_s = time.monotonic()
            proxy.go_away_but_for_the_held()
            took = await taken_over(pool, term, caught_s)
            lease = await agent.grant()
            assert lease.job_id == job
            leases = await pool.fetch("SELECT lease_id, attempt FROM lease")
            proxy.come_back()
            proxy.release()
            await agent.run(lease)
            if greeting is not None:
                greeting.cancel()
                await asyncio.gather(greeting, return_exceptions=True)
            assert await pool.fetch("SELECT lease_id, attempt FROM lease") == leases
            assert await pool.fetchval("SELECT epoch FROM leader") == term + 1
            await agent.tell(lease, ended=ended())
            assert (await client.until(job, job_pb2.JOB_STATE_SUCCEEDED)).attempt == 1
            await agent.leave()
    assert took < TAKEOVER_BOUND
