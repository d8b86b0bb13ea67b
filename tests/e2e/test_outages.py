"""Postgres is gone for a while, and `lessor server recover`: installed programs, real processes, a real restart."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest

import lessor
from lessor import JobState, timing
from lessor_server.embedded import EmbeddedPostgres
from lessor_server.store import migrate
from tests.e2e.test_bad_input import Ran, run
from tests.support.cluster import Cluster, lives, running_cluster, submit_ticker, until
from tests.support.postgres import SETTINGS, wanted_version

AWAY_NS = 5_000_000_000


@pytest.fixture
def postgres() -> Iterator[EmbeddedPostgres]:
    """A server of the test's own, on a directory that outlives a stop."""
    # Not the test's directory: an unprivileged account must be able to reach it.
    with tempfile.TemporaryDirectory(prefix="lessor-outage-", ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o755)
        with EmbeddedPostgres(
            Path(directory) / "data", version=wanted_version(), settings=SETTINGS, durable=False
        ) as made:
            migrate.upgrade(made.database_url)
            yield made


@pytest.fixture
async def cluster(postgres: EmbeddedPostgres, tmp_path: Path) -> AsyncIterator[Cluster]:
    """A server on that Postgres."""
    async with running_cluster(postgres.database_url, tmp_path) as made:
        yield made


def restarted(postgres: EmbeddedPostgres) -> EmbeddedPostgres:
    """The same server on the same port."""
    again = EmbeddedPostgres(
        postgres.data_dir, port=postgres.port, version=wanted_version(), settings=SETTINGS, durable=False
    )
    again.start()
    return again


async def test_postgres_is_gone_for_five_seconds_while_jobs_run_and_end(
    postgres: EmbeddedPostgres, cluster: Cluster, tmp_path: Path
) -> None:
    cluster.agent("one", "--cpu", "4")
    ticks, short_ticks = tmp_path / "ticks", tmp_path / "short"
    async with lessor.AsyncClient(cluster.address, timeout=60) as client:
        long = await submit_ticker(client, ticks, 9, ttl="1m")
        short = await submit_ticker(client, short_ticks, 2, ttl="1m")
        waiting = await client.submit(["/bin/true"], cpu="4")
        await until(lambda: all(folder.is_dir() and any(folder.iterdir()) for folder in (ticks, short_ticks)))
        await until(lambda: all(len(life) > 1 for life in (*lives(ticks).values(), *lives(short_ticks).values())))
        await asyncio.to_thread(postgres.stop)
        ((_, stopped_ns),) = [life[-1] for life in lives(ticks).values()]
        submitting = asyncio.create_task(client.submit(["/bin/true"], request_id="meanwhile"))
        # The running job's own clock says when it has been gone for long enough.
        await until(lambda: next(iter(lives(ticks).values()))[-1][1] >= stopped_ns + AWAY_NS)
        assert next(iter(lives(short_ticks).values()))[-1][0] == "end", "it ended while nobody could be told"
        assert not submitting.done()
        again = await asyncio.to_thread(restarted, postgres)
        try:
            meanwhile = await submitting
            done = await client.wait([long, short, waiting, meanwhile], timeout=60)
            assert {job.state for job in done} == {JobState.SUCCEEDED}
            assert {(job.attempt, job.losses, job.failures) for job in done} == {(1, 0, 0)}
            assert [len(lives(folder)) for folder in (ticks, short_ticks)] == [1, 1]
            assert b"".join([chunk.data async for chunk in client.logs(long)]) == b"ticking\n"
        finally:
            await cluster.stop()
            await asyncio.to_thread(again.stop)


def recover(database_url: str) -> Ran:
    return run("server", "recover", "--database-url", database_url)


async def test_recover_refuses_beside_a_server_and_works_after_it(
    database_url: str, pool: asyncpg.Pool, tmp_path: Path
) -> None:
    async with running_cluster(database_url, tmp_path) as cluster:
        agent = cluster.agent("one")
        async with lessor.AsyncClient(cluster.address, timeout=60) as client:
            ticks = tmp_path / "ticks"
            job = await submit_ticker(client, ticks, 3600, ttl="1m")
            await until(lambda: ticks.is_dir() and any(len(life) > 1 for life in lives(ticks).values()))
            before = await pool.fetchval("SELECT last_value FROM lease_number")
            refused = await asyncio.to_thread(recover, database_url)
            refused.refused("a server is alive", "stop every server", code=1)
            assert await pool.fetchval("SELECT last_value FROM lease_number") == before
            await cluster.kill_server()
            done = await asyncio.to_thread(recover, database_url)
            assert done.code == 0, done
            (line,) = done.out.splitlines()
            assert line.startswith("recovered: lease numbers go on above ")
            assert "1 leases have their full time again" in line
            await cluster.start_server(cluster.address)
            # The same attempt goes on, in a new session of the agent that was there all along.
            second = await client.submit(["/bin/true"])
            (ended,) = await client.wait([second], timeout=60)
            assert (ended.state, ended.attempt) == (JobState.SUCCEEDED, 1)
            assert await pool.fetchval("SELECT max(lease_id) FROM attempt") > before + 1
            standing = await client.get(job)
            assert (standing.state, standing.attempt, standing.losses) == (JobState.RUNNING, 1, 0)
            assert len(lives(ticks)) == 1
            await client.cancel(job)
            await client.wait([job], timeout=60)
        agent.terminate()


def test_recover_says_what_is_wrong(empty_database_url: str) -> None:
    run("server", "recover").refused("--database-url", code=2)
    recover("postgresql://postgres@127.0.0.1:9/lessor").refused("database", "--database-url", code=1)
    recover(empty_database_url).refused("no Lessor schema", "lessor server migrate", code=1)
    recover("mysql://root@127.0.0.1/lessor").refused("mysql://", "postgresql://", code=2)


def test_a_storm_brake_that_is_no_duration_is_refused() -> None:
    flags = ("--database-url", "postgresql://postgres@127.0.0.1:9/lessor", "--storm-brake-max")
    run("server", *flags, "soon").refused("storm_brake_max", "'soon' is not a duration", code=2)
    run("server", *flags, "2h").refused("storm_brake_max", "1 hour", code=2)
    assert timing.STORM_BRAKE_MAX.total_seconds() <= 3600
