"""A migration and those it would keep waiting: it gives way, comes back, and says what stood in its way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta

import asyncpg
import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import Connection, text

from lessor_server.domain.errors import DatabaseUnavailable, SchemaMismatch
from lessor_server.store import migrate
from lessor_server.store.online_index import build_index
from lessor_server.store.partitions import ensure_partitions
from lessor_server.store.schema_change import STALL, change
from tests.support.waiting import until

SLACK_S = 2.5
"""A busy host may take so much longer over everything."""
ADD = "ALTER TABLE {} ADD COLUMN next_text text NOT NULL DEFAULT 'as before'"


def steps(*statements: str) -> Callable[[Connection], None]:
    """One migration: these statements in a transaction."""

    def run(connection: Connection) -> None:
        with connection.begin():
            for statement in statements:
                connection.execute(text(statement))

    return run


async def nothing() -> None:
    """Nothing is to be done afterwards."""


@pytest.fixture
async def guard(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """The connection that watches."""
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


@pytest.fixture
async def other(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """Somebody else's session."""
    connection = await asyncpg.connect(database_url, server_settings={"application_name": "a report"})
    yield connection
    await connection.close()


async def changed(
    guard: asyncpg.Connection, database_url: str, run: Callable[[Connection], None], patience_s: float = 60
) -> None:
    await change(guard, database_url, run, nothing, patience=timedelta(seconds=patience_s))


class Prober:
    """A server's statements: one after the other, each timed."""

    def __init__(self, connection: asyncpg.Connection, statement: str) -> None:
        self._connection = connection
        self._statement = statement
        self.longest_s = 0.0
        self.done = 0

    @asynccontextmanager
    async def probing(self) -> AsyncIterator[None]:
        """Runs them beside the body; an error of one fails it."""
        stopped = asyncio.Event()

        async def probe() -> None:
            while not stopped.is_set():
                began = time.monotonic()
                await self._connection.execute(self._statement)
                self.longest_s = max(self.longest_s, time.monotonic() - began)
                self.done += 1

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(probe())
            try:
                yield
            finally:
                stopped.set()


@asynccontextmanager
async def probed(database_url: str, statement: str) -> AsyncIterator[Prober]:
    connection = await asyncpg.connect(database_url)
    try:
        prober = Prober(connection, statement)
        async with prober.probing():
            yield prober
    finally:
        await connection.close()


async def columns(connection: asyncpg.Connection, table: str) -> set[str]:
    rows = await connection.fetch(
        "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped", table
    )
    return {row["attname"] for row in rows}


async def test_statements_go_on_while_a_migration_cannot(
    database_url: str, guard: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    """A forgotten transaction that once read the table stands in the way of the change, and of nobody else."""
    async with other.transaction():
        await other.fetch("SELECT count(*) FROM lease")
        pid = other.get_server_pid()
        async with probed(database_url, "UPDATE lease SET phase = phase") as prober:
            with pytest.raises(SchemaMismatch) as caught:
                await changed(guard, database_url, steps(ADD.format("lease")), patience_s=5)
            done = prober.done
            await until(lambda: prober.done > done + 10)
        assert prober.longest_s < STALL.total_seconds() + SLACK_S
        assert prober.done > 50
    message = caught.value.message
    assert "\n" not in message
    for part in ("for 5 s", f"process {pid} (a report, idle in transaction", "lock timeout", "`lessor server migrate`"):
        assert part in message, message
    assert "next_text" not in await columns(guard, "lease")
    await changed(guard, database_url, steps(ADD.format("lease")))
    assert "next_text" in await columns(guard, "lease")


async def test_a_migration_goes_through_once_the_transaction_has_ended(
    database_url: str, guard: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    transaction = other.transaction()
    await transaction.start()
    await other.fetch("SELECT count(*) FROM lease")
    given_way = asyncio.Event()

    async def pause(_: float) -> None:
        if not given_way.is_set():
            await transaction.rollback()
        given_way.set()

    await change(guard, database_url, steps(ADD.format("lease")), nothing, pause=pause)
    assert given_way.is_set()
    assert "next_text" in await columns(guard, "lease")


async def test_whoever_waits_behind_a_long_step_does_not_wait_long(
    database_url: str, guard: asyncpg.Connection
) -> None:
    """Such as a table that is rewritten, or an index that is built with the table locked."""
    rewrite = steps("LOCK TABLE ready", "SELECT pg_sleep(60)")
    async with probed(database_url, "UPDATE ready SET priority = priority") as prober:
        with pytest.raises(SchemaMismatch, match=r"kept other sessions waiting for more than 1.5 s"):
            await changed(guard, database_url, rewrite, patience_s=1)
        done = prober.done
        await until(lambda: prober.done > done + 10)
    assert STALL.total_seconds() * 0.9 < prober.longest_s < STALL.total_seconds() + SLACK_S


async def test_a_long_step_that_nobody_waits_for_is_left_alone(database_url: str, guard: asyncpg.Connection) -> None:
    longer_s = STALL.total_seconds() * 1.2
    await changed(guard, database_url, steps("LOCK TABLE ready", f"SELECT pg_sleep({longer_s})"), patience_s=0)


async def test_tables_locked_one_by_one_keep_nobody_waiting_for_their_sum(
    database_url: str, guard: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    """It has the first when it meets the transaction at the second, and gives both up."""
    async with other.transaction():
        await other.fetch("SELECT count(*) FROM attempt")
        async with probed(database_url, "UPDATE lease SET phase = phase") as prober:
            with pytest.raises(SchemaMismatch, match="a report"):
                await changed(guard, database_url, steps(ADD.format("lease"), ADD.format("attempt")), patience_s=4)
        assert prober.longest_s < STALL.total_seconds() + SLACK_S
    assert "next_text" not in await columns(guard, "lease")


async def test_a_process_that_stands_still_keeps_no_lock(database_url: str, guard: asyncpg.Connection) -> None:
    """Nobody is there then to end its statement: the database does it."""
    seen = {}

    def run(connection: Connection) -> None:
        for name in ("lock_timeout", "idle_in_transaction_session_timeout"):
            seen[name] = connection.execute(text(f"SHOW {name}")).scalar_one()

    await changed(guard, database_url, run)
    assert seen == {"lock_timeout": "1500ms", "idle_in_transaction_session_timeout": "5s"}


async def test_an_error_of_a_step_is_not_tried_again(database_url: str, guard: asyncpg.Connection) -> None:
    tries = 0

    def run(connection: Connection) -> None:
        nonlocal tries
        tries += 1
        steps("SELECT 1 / 0")(connection)

    with pytest.raises(Exception, match="division by zero"):
        await changed(guard, database_url, run)
    assert tries == 1


async def test_what_comes_after_is_tried_again_as_well(database_url: str, guard: asyncpg.Connection) -> None:
    tries = []

    async def after() -> None:
        tries.append("once")
        if len(tries) == 1:
            raise asyncpg.LockNotAvailableError("canceling statement due to lock timeout")

    async def pause(_: float) -> None:
        assert tries == ["once"]

    await change(guard, database_url, steps("SELECT 1"), after, pause=pause)
    assert len(tries) == 2


async def held(database_url: str, hold: Callable[[], Awaitable[None]]) -> None:
    """Runs ``hold`` while another migration is at work."""
    busy, let_go = asyncio.Event(), asyncio.Event()

    async def after() -> None:
        busy.set()
        await let_go.wait()

    first = await asyncpg.connect(database_url)
    try:
        working = asyncio.create_task(change(first, database_url, steps("SELECT 1"), after))
        await busy.wait()
        try:
            await hold()
        finally:
            let_go.set()
        await working
    finally:
        await first.close()


async def test_a_second_migration_waits_for_the_first_and_names_it_when_it_gives_up(
    database_url: str, guard: asyncpg.Connection
) -> None:
    ran = []

    async def hold() -> None:
        with pytest.raises(SchemaMismatch, match=r"another `lessor server migrate` is at work .*\(process \d+ of"):
            await changed(guard, database_url, lambda _: ran.append("too early"), patience_s=0.3)
        assert not ran

    await held(database_url, hold)
    await changed(guard, database_url, lambda _: ran.append("afterwards"))
    assert ran == ["afterwards"]


async def test_a_migration_that_is_killed_has_done_nothing_and_keeps_nobody_out(
    empty_database_url: str,
) -> None:
    """As when its process dies: each connection is gone at some instant; the next run does what is missing."""
    connection = await asyncpg.connect(empty_database_url)
    try:
        kills = 0
        for _ in range(3):
            migrating = asyncio.create_task(asyncio.to_thread(migrate.upgrade, empty_database_url))
            killed = 0
            while not killed and not migrating.done():
                killed = await connection.fetchval(
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid() "
                    "AND (SELECT count(*) FROM pg_locks AS l WHERE l.pid = pg_stat_activity.pid AND mode ~ 'Excl') > 2"
                )
            kills += killed
            if killed:
                with pytest.raises(DatabaseUnavailable):
                    await migrating
            else:
                await migrating
        assert kills > 0
        assert await asyncio.to_thread(migrate.upgrade, empty_database_url) == migrate.head_revision()
        assert await connection.fetchval("SELECT count(*) FROM schema_floor") == 1
        assert await connection.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0
    finally:
        await connection.close()


async def indexed(database_url: str, guard: asyncpg.Connection, *index: str) -> None:
    """Builds an index as a migration does."""

    def run(connection: Connection) -> None:
        context = MigrationContext.configure(connection, opts={"transaction_per_migration": True})
        with context.begin_transaction(_per_migration=True):
            build_index(Operations(context), *index)

    await changed(guard, database_url, run, patience_s=20)


VALID = "SELECT indisvalid AND indisready FROM pg_index WHERE indexrelid = to_regclass($1)"


async def test_an_index_is_built_beside_writers(
    database_url: str, guard: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    """A transaction that has written is waited for; whoever comes after is not kept waiting."""
    transaction = other.transaction()
    await transaction.start()
    await other.execute("INSERT INTO dedupe (queue_id, key, job_id) VALUES (1, 'open', 1)")
    async with probed(database_url, "UPDATE dedupe SET job_id = job_id WHERE key = 'another'") as prober:
        building = asyncio.create_task(indexed(database_url, guard, "next_dedupe", "dedupe", "(job_id)"))
        while not await guard_waits(database_url):
            assert not building.done()
        done = prober.done
        await until(lambda: prober.done > done + 20)
        assert not building.done()
        await transaction.commit()
        await building
    assert prober.longest_s < SLACK_S
    assert await guard.fetchval(VALID, "next_dedupe")
    await indexed(database_url, guard, "next_dedupe", "dedupe", "(job_id)")


async def guard_waits(database_url: str) -> bool:
    """Returns whether the migration waits for somebody."""
    connection = await asyncpg.connect(database_url)
    try:
        found: bool = await connection.fetchval(
            "SELECT count(*) > 0 FROM pg_locks AS l JOIN pg_stat_activity AS a ON a.pid = l.pid "
            "WHERE NOT l.granted AND a.application_name = 'lessor migrate' AND a.datname = current_database()"
        )
        return found
    finally:
        await connection.close()


async def test_an_index_that_was_left_unfinished_is_built_anew(database_url: str, guard: asyncpg.Connection) -> None:
    await guard.execute("INSERT INTO dedupe (queue_id, key, job_id) VALUES (1, 'a', 7), (1, 'b', 7)")
    with pytest.raises(asyncpg.UniqueViolationError):
        await guard.execute("CREATE UNIQUE INDEX CONCURRENTLY next_dedupe ON dedupe (job_id)")
    assert await guard.fetchval(VALID, "next_dedupe") is False
    await indexed(database_url, guard, "next_dedupe", "dedupe", "(job_id)")
    assert await guard.fetchval(VALID, "next_dedupe") is True


async def test_an_index_of_a_partitioned_table_goes_on_where_it_was_cut_off(
    database_url: str, guard: asyncpg.Connection
) -> None:
    partitions = await guard.fetch(
        "SELECT inhrelid::bigint AS number, inhrelid::regclass::text AS name FROM pg_inherits "
        "WHERE inhparent = 'attempt'::regclass ORDER BY 1"
    )
    first, second = partitions[0], partitions[1]
    await guard.execute("CREATE INDEX next_attempt ON ONLY attempt (ended_at)")
    await guard.execute(f"CREATE INDEX next_attempt_{first['number']} ON {first['name']} (ended_at)")
    await guard.execute(f"ALTER INDEX next_attempt ATTACH PARTITION next_attempt_{first['number']}")
    # Built, not attached.
    await guard.execute(f"CREATE INDEX next_attempt_{second['number']} ON {second['name']} (ended_at)")
    # Made in the meantime, by a server.
    await ensure_partitions(guard, await guard.fetchval("SELECT now() + interval '9 days'"))
    await indexed(database_url, guard, "next_attempt", "attempt", "(ended_at)")
    assert await guard.fetchval(VALID, "next_attempt") is True
    await ensure_partitions(guard, await guard.fetchval("SELECT now() + interval '19 days'"))
    without = await guard.fetchval(
        "SELECT count(*) FROM pg_inherits AS p WHERE p.inhparent = 'attempt'::regclass AND NOT EXISTS ("
        "SELECT FROM pg_inherits AS a JOIN pg_index AS i ON i.indexrelid = a.inhrelid "
        "WHERE a.inhparent = 'next_attempt'::regclass AND i.indrelid = p.inhrelid AND i.indisvalid)"
    )
    assert without == 0
