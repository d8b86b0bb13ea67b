"""A release is replaced by the next one: the database first, under full load, then the servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import grpc
import pytest
from alembic.script import ScriptDirectory

from lessor.v1 import job_pb2
from lessor.v1.fleet_service_pb2 import DrainAgentRequest, UndrainAgentRequest
from lessor_server.store import migrate, tables
from lessor_server.store.partitions import BY_JOB, BY_LEASE, ensure_partitions
from tests.e2e.test_bad_input import run
from tests.integration.store.test_migrations import to_revision
from tests.support.cluster import Cluster, running_cluster
from tests.support.releases import BEFORE, VERSIONS, Release, sql
from tests.support.servers import Client
from tests.support.steady_load import SteadyLoad

pytestmark = pytest.mark.e2e

TABLES = sorted(tables.metadata.tables)
SUCCEEDED, FAILED, LOST = 1, 2, 6
CANCELLED = int(job_pb2.JOB_STATE_CANCELLED)

INDEXES = {
    "job": "(submitted_at)", "attempt": "(ended_at) WHERE final_state = 5", "log_chunk": "(read_at)",
    "ready": "(shape_id)", "lease": "(shape_id)", "dedupe": "(job_id)", "event": "(at)", "request": "(created_at)",
}  # fmt: skip


@pytest.fixture
def next_release(tmp_path: Path) -> Release:
    return Release.following(tmp_path / "next")


def expand(release: Release) -> None:
    """Whatever an expand step may do, to each table."""
    for table in TABLES:
        release.add(
            f"Expand: columns of {table}",
            sql(
                f"ALTER TABLE {table} ADD COLUMN next_text text NOT NULL DEFAULT 'as before', "
                "ADD COLUMN next_number bigint, ADD COLUMN next_list text[] NOT NULL DEFAULT '{}'"
            ),
        )
    # Names that statements make for themselves.
    release.add("Expand: more", sql("ALTER TABLE lease ADD COLUMN log_bytes bigint, ADD COLUMN final_state smallint"))
    release.add("Expand: a table", sql("CREATE TABLE next_table (job_id bigint PRIMARY KEY, note text NOT NULL)"))
    widened = "ALTER TABLE {0} DROP CONSTRAINT {1}, ADD CONSTRAINT {1} CHECK ({2}) NOT VALID"
    release.add("Expand: one more outcome", sql(widened.format("attempt", "attempt_outcome_check", "outcome < 20")))
    release.add("Expand: known to hold", sql("ALTER TABLE attempt VALIDATE CONSTRAINT attempt_outcome_check"))
    release.add("Expand: one more phase", sql(widened.format("lease", "lease_phase_check", "phase BETWEEN 1 AND 9")))
    release.add("Expand: known to hold", sql("ALTER TABLE lease VALIDATE CONSTRAINT lease_phase_check"))
    for table, columns in INDEXES.items():
        release.add(f"Expand: an index of {table}", f"build_index(op, 'next_{table}', {table!r}, {columns!r})")


@asynccontextmanager
async def client_of(cluster: Cluster) -> AsyncIterator[Client]:
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        yield Client(channel)


async def audit(database_url: str, load: SteadyLoad, lost: Iterable[str]) -> None:
    """Each job is there and ended once; no lease was lost but those that had to be; nothing is left over."""
    assert load.terminal == dict.fromkeys(load.submitted, 1), "each end is seen once"
    connection = await asyncpg.connect(database_url)
    try:
        count = connection.fetchval
        assert await count("SELECT count(*) FROM job") == len(load.submitted)
        assert await count("SELECT count(*) FROM attempt WHERE final_state IS NOT NULL") == len(load.submitted)
        assert await count(f"SELECT count(*) FROM attempt WHERE outcome = {LOST}") == len(list(lost))
        # What is cancelled before its agent was told of it is not begun at all.
        withdrawn = f"SELECT count(*) FROM attempt WHERE outcome IN (7, 8) AND final_state IS DISTINCT FROM {CANCELLED}"
        assert await count(withdrawn) == 0, "nothing else was withdrawn"
        assert await count("SELECT count(*) FROM attempt WHERE logs_truncated_at > 0") == 0
        for table in ("lease", "lease_gpu", "ready", "delayed"):
            assert await count(f"SELECT count(*) FROM {table}") == 0, table
        assert await count("SELECT count(*) FROM log_chunk") == await count("SELECT count(*) FROM log_head")
    finally:
        await connection.close()


async def shape_of(connection: asyncpg.Connection, table: str) -> list[tuple[object, ...]]:
    """Returns columns, constraints and indexes of a table, as they must be alike in each partition."""
    columns = await connection.fetch(
        "SELECT attname, format_type(atttypid, atttypmod), attnotnull, pg_get_expr(adbin, adrelid) "
        "FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum "
        "WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped ORDER BY attname",
        table,
    )
    checks = await connection.fetch(
        "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint "
        "WHERE conrelid = to_regclass($1) AND contype = 'c' ORDER BY 1",
        table,
    )
    indexes = await connection.fetch(
        "SELECT substring(pg_get_indexdef(indexrelid) FROM 'USING.*') FROM pg_index "
        "WHERE indrelid = to_regclass($1) AND indisvalid ORDER BY 1",
        table,
    )
    return [tuple(row) for row in (*columns, *checks, *indexes)]


async def partitions_are_alike(database_url: str) -> None:
    """Partitions of before, and one that the code of before makes now, are what their tables are."""
    connection = await asyncpg.connect(database_url)
    try:
        later = await connection.fetchval("SELECT now() + interval '30 days'")
        assert await ensure_partitions(connection, later) > 0
        for table in (*BY_JOB, *BY_LEASE):
            want = await shape_of(connection, table)
            found = await connection.fetch(
                "SELECT inhrelid::regclass::text AS name FROM pg_inherits WHERE inhparent = to_regclass($1)", table
            )
            assert len(found) > 10
            for row in found:
                assert await shape_of(connection, row["name"]) == want, row["name"]
    finally:
        await connection.close()


def made(directory: Path) -> Path:
    """Returns the directory, which was not there."""
    directory.mkdir()
    return directory


async def one_more(load: SteadyLoad, client: Client) -> None:
    """Has another server take a job, and waits for its end."""
    job = await client.submit()
    load.submitted.append(job)
    await load.ended(job)


async def test_the_next_schema_comes_under_load_and_nobody_notices(
    database_url: str, tmp_path: Path, next_release: Release
) -> None:
    expand(next_release)
    async with running_cluster(database_url, tmp_path) as cluster, client_of(cluster) as client:
        load = SteadyLoad(client)
        lost = await load.lose_a_job()
        async with load.running():
            await load.progressed()
            migrated = await asyncio.to_thread(next_release.run, "migrate", "--database-url", database_url)
            assert migrated.out == f"the database is at schema {next_release.newest}\n", migrated.err
            await load.progressed()
            await load.ended(lost)
            # A server of before may be started on it: one has crashed, or the upgrade is taken back.
            async with running_cluster(database_url, made(tmp_path / "again")) as again, client_of(again) as other:
                await one_more(load, other)
            await load.progressed()
        await audit(database_url, load, [lost])
    await partitions_are_alike(database_url)
    log = (tmp_path / "server.log").read_text()
    assert "ERROR" not in log, log


async def drained_under_another(pool: asyncpg.Pool, old_one: str, load: SteadyLoad) -> bool:
    """Has another server lead than the old one, through which all agents are drained and put back.

    Returns:
        Whether the other led all the time, so that what was looked at is its doing.
    """
    async with asyncio.timeout(60):
        while (holder := await pool.fetchval("SELECT holder FROM leader")) in ("", old_one):
            if holder:
                # As the leader does that stops; either may be the first to see it.
                await pool.execute("UPDATE leader SET epoch = epoch + 1, holder = ''")
    fleet = load.client.fleet
    names = [agent.raw.agent_id for agent in load.agents]
    for name in names:
        await fleet.DrainAgent(DrainAgentRequest(agent=name))
    drained = await pool.fetchrow("SELECT epoch, holder, beat, (SELECT last_value FROM lease_number) FROM leader")
    assert drained is not None
    waiting = await load.client.submit()
    load.submitted.append(waiting)
    async with asyncio.timeout(60):
        # The planner has had its turn, several times.
        while await pool.fetchval("SELECT beat FROM leader") < drained["beat"] + 5:
            continue
    made_since = await pool.fetchval("SELECT count(*) FROM lease WHERE lease_id > $1", drained["last_value"])
    now = await pool.fetchrow("SELECT epoch, holder FROM leader")
    assert now is not None
    led = (now["epoch"], now["holder"]) == (drained["epoch"], drained["holder"]) and now["holder"] != old_one
    assert not (led and made_since), "a lease was made on an agent that is drained"
    for name in names:
        await fleet.UndrainAgent(UndrainAgentRequest(agent=name))
    await load.ended(waiting)
    return led


async def test_every_migration_there_is_comes_under_load_of_servers_of_the_first_schema(
    empty_database_url: str, tmp_path: Path
) -> None:
    url = empty_database_url
    first = Release.of_schema("0001", tmp_path / "first")
    ran = await asyncio.to_thread(first.run, "migrate", "--database-url", url)
    assert ran.out == "the database is at schema 0001\n", ran.err
    async with running_cluster(url, made(tmp_path / "old"), **first.environment) as old, client_of(old) as client:
        load = SteadyLoad(client)
        lost = await load.lose_a_job()
        async with load.running():
            await load.progressed()
            migrated = await asyncio.to_thread(run, "server", "migrate", "--database-url", url)
            assert migrated.out == f"the database is at schema {migrate.head_revision()}\n", migrated.err
            await load.progressed()
            # Servers of both releases side by side: the agents are on the old one, and either leads.
            async with asyncpg.create_pool(url, min_size=1) as pool:
                old_one = await pool.fetchval("SELECT holder FROM leader")
                async with running_cluster(url, made(tmp_path / "new")) as new, client_of(new) as other:
                    await one_more(load, other)
                    await load.ended(lost)
                    while not await drained_under_another(pool, old_one, load):
                        await load.progressed()
                    await load.progressed()
        await audit(url, load, [lost])
        log = (old.directory / "server.log").read_text()
        assert "ERROR" not in log, log


def test_what_servers_were_before_each_migration_is_written_down() -> None:
    scripts = ScriptDirectory(str(Path(migrate.__file__).parent / "migrations"))
    numbers = sorted(script.revision for script in scripts.walk_revisions())
    assert numbers[1:] == sorted(BEFORE), "add the statements of before to BEFORE in tests/support/releases.py"


async def refused(release: Release, url: str, *words: str) -> None:
    """Asserts that a server of the release does not start, nor its commands do anything, and that each says why."""
    for command in (["--listen", "127.0.0.1:0"], ["migrate"], ["recover"]):
        ran = await asyncio.to_thread(release.run, *command, "--database-url", url)
        ran.refused(*words, code=1)


async def test_after_a_contract_step_servers_of_before_do_not_start(
    database_url: str, tmp_path: Path, next_release: Release
) -> None:
    current = Release.following(tmp_path / "current")
    next_release.add("Expand: a column", sql("ALTER TABLE agent ADD COLUMN called text"))
    needs = next_release.newest
    next_release.add(
        "Contract: nobody reads it any more",
        sql("ALTER TABLE agent DROP COLUMN hostname"),
        marker=f'serves_from = "{needs}"\nlast_needed_by = "0.1"',
    )
    ran = await asyncio.to_thread(next_release.run, "migrate", "--database-url", database_url)
    assert ran.code == 0, ran.err
    schemas = f"schema {next_release.newest}, which serves servers of schema {needs} and newer"
    await refused(current, database_url, schemas, migrate.head_revision(), "run the version of Lessor that wrote it")
    # Its own servers start, and so do those of the step before: it still serves them.
    (next_release.directory / VERSIONS / f"{next_release.newest}_next.py").unlink()
    step = running_cluster(database_url, made(tmp_path / "step"), **next_release.environment)
    async with step as cluster, client_of(cluster) as client:
        assert await client.submit()
    assert "newer than this server" in (tmp_path / "step" / "server.log").read_text()


async def test_commands_of_before_work_on_a_schema_that_was_only_added_to(
    database_url: str, tmp_path: Path, next_release: Release
) -> None:
    next_release.add("Expand: a column", sql("ALTER TABLE agent ADD COLUMN called text"))
    for release in (next_release, Release.following(tmp_path / "current")):
        ran = await asyncio.to_thread(release.run, "migrate", "--database-url", database_url)
        assert ran.out == f"the database is at schema {next_release.newest}\n", ran.err
    recovered = await asyncio.to_thread(run, "server", "recover", "--database-url", database_url)
    assert recovered.code == 0, recovered.err


async def test_a_server_refuses_an_older_schema_and_says_what_to_run(empty_database_url: str) -> None:
    url = empty_database_url
    await to_revision(url, "0001")
    for command in (["--listen", "127.0.0.1:0"], ["--listen", "127.0.0.1:0", "--workers", "2"], ["recover"]):
        ran = await asyncio.to_thread(run, "server", *command, "--database-url", url)
        ran.refused("has schema 0001", f"needs {migrate.head_revision()}", "`lessor server migrate", code=1)


async def test_patience_is_a_duration(database_url: str) -> None:
    ran = await asyncio.to_thread(run, "server", "migrate", "--database-url", database_url, "--patience", "soon")
    ran.refused("--patience", "'soon'", code=2)
