"""A migration and those it would keep waiting: it gives way, comes back, and says what stood in its way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from types import SimpleNamespace

import asyncpg
import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import Connection, text

from lessor_server.domain.errors import DatabaseUnavailable, SchemaMismatch
from lessor_server.store import migrate
from lessor_server.store.online_index import build_index
from lessor_server.store.partitions import ensure_partitions
from lessor_server.store.schema_change import STALL, change, open_guard
from tests.support.waiting import until

SLACK_S = 2.5
"""A busy host may take so much longer, beside the time for which it stands still altogether."""
STOOD_STILL_S = 0.05
"""An unblocked statement that takes so long was kept by the host."""
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
    guard: asyncpg.Connection,
    database_url: str,
    run: Callable[[Connection], None],
    patience_s: float = 60,
    pause: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> None:
    await change(guard, database_url, run, nothing, patience=timedelta(seconds=patience_s), pause=pause)


class Host:
    """How long this host, its event loop and PostgreSQL stand still: what nothing else blocks takes as long then."""

    def __init__(self) -> None:
        self._before_s = 0.0
        self._began_s = time.monotonic()

    def begin(self) -> None:
        """Notes that an unblocked statement begins, and that the one before has ended."""
        self._before_s = self.stood_still_s()
        self._began_s = time.monotonic()

    def stood_still_s(self) -> float:
        """Returns the sum so far."""
        takes_s = time.monotonic() - self._began_s
        return self._before_s + (takes_s if takes_s >= STOOD_STILL_S else 0)


class Prober:
    """A server's statements: one after the other, each timed."""

    def __init__(self, statement: str) -> None:
        self._statement = statement
        self._host = Host()
        self.held_up_s = 0.0
        """The longest that one took, without the time for which the host stood still."""
        self.longest_s = 0.0
        self.done = 0

    async def goes_on(self) -> None:
        """Waits until some more have been done."""
        done = self.done
        await until(lambda: self.done > done + 10)

    async def catches_up(self, seconds: float) -> None:
        """Is a pause in which nobody has anything to wait for."""
        await self.goes_on()
        await asyncio.sleep(seconds)

    @asynccontextmanager
    async def probing(self, connection: asyncpg.Connection, unblocked: asyncpg.Connection) -> AsyncIterator[None]:
        """Runs them beside the body; an error of one fails it."""
        stopped = asyncio.Event()

        async def probe() -> None:
            while not stopped.is_set():
                began, stood = time.monotonic(), self._host.stood_still_s()
                await connection.execute(self._statement)
                took = time.monotonic() - began
                self.longest_s = max(self.longest_s, took)
                self.held_up_s = max(self.held_up_s, took - (self._host.stood_still_s() - stood))
                self.done += 1

        async def look_at_the_host() -> None:
            while not stopped.is_set():
                self._host.begin()
                await unblocked.execute("UPDATE leader SET holder = holder")
                await asyncio.sleep(0.01)  # Its pace: it is to be no load.

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(probe())
            tasks.create_task(look_at_the_host())
            try:
                yield
            finally:
                stopped.set()


@asynccontextmanager
async def probed(database_url: str, statement: str) -> AsyncIterator[Prober]:
    connection, unblocked = await asyncpg.connect(database_url), await asyncpg.connect(database_url)
    try:
        prober = Prober(statement)
        async with prober.probing(connection, unblocked):
            yield prober
    finally:
        await connection.close()
        await unblocked.close()


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
                await changed(guard, database_url, steps(ADD.format("lease")), 5, prober.catches_up)
            await prober.goes_on()
        assert prober.held_up_s < STALL.total_seconds() + SLACK_S
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
            await changed(guard, database_url, rewrite, 1, prober.catches_up)
        await prober.goes_on()
    assert prober.longest_s > STALL.total_seconds() * 0.9
    assert prober.held_up_s < STALL.total_seconds() + SLACK_S


async def test_who_has_let_go_is_not_named(
    database_url: str, guard: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    """It was waited for at first; what the migration was ended for is something else."""

    def run(connection: Connection) -> None:
        steps("LOCK TABLE lease")(connection)
        steps("LOCK TABLE ready", "SELECT pg_sleep(60)")(connection)

    transaction = other.transaction()
    await transaction.start()
    await other.fetch("SELECT count(*) FROM lease")
    changing = asyncio.create_task(changed(guard, database_url, run, patience_s=0))
    while not await guard_waits(database_url):
        assert not changing.done()
    await looked_at(database_url, guard)
    await transaction.rollback()
    async with probed(database_url, "UPDATE ready SET priority = priority"):
        with pytest.raises(SchemaMismatch, match=r"kept other sessions waiting for more than 1.5 s") as caught:
            await changing
    assert "a report" not in caught.value.message


async def looked_at(database_url: str, guard: asyncpg.Connection) -> None:
    """Returns once the watch has looked at what there is now."""
    connection = await asyncpg.connect(database_url)
    try:
        looks: set[object] = set()
        while len(looks) < 3:
            query = "SELECT query_start FROM pg_stat_activity WHERE pid = $1"
            looks.add(await connection.fetchval(query, guard.get_server_pid()))
    finally:
        await connection.close()


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
            both = steps(ADD.format("lease"), ADD.format("attempt"))
            with pytest.raises(SchemaMismatch, match="a report"):
                await changed(guard, database_url, both, 4, prober.catches_up)
        assert prober.held_up_s < STALL.total_seconds() + SLACK_S
    assert "next_text" not in await columns(guard, "lease")


async def test_a_process_that_stands_still_keeps_no_lock(database_url: str) -> None:
    """Nobody is there then to end its statement: the database does it, on either connection."""
    want = {"application_name": "lessor migrate", "lock_timeout": "1500ms", "idle_in_transaction_session_timeout": "5s"}
    seen = {}

    def run(connection: Connection) -> None:
        for name in want:
            seen[name] = connection.execute(text(f"SHOW {name}")).scalar_one()

    guard = await open_guard(database_url)
    try:
        await changed(guard, database_url, run)
        assert seen == want
        assert {name: await guard.fetchval(f"SHOW {name}") for name in want} == want
    finally:
        await guard.close()


async def test_the_watch_waits_for_no_dead_host(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lessor_server.store.schema_change._GUARD_TIMEOUT_S", 0.1)
    guard = await open_guard(database_url)
    try:
        with pytest.raises(TimeoutError):
            await guard.execute("SELECT pg_sleep(60)")
    finally:
        await guard.close()


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


async def test_patience_begins_with_the_trouble_and_anew_with_each_migration(
    database_url: str, guard: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither another migration nor those that went through use it up."""
    now_s, tries = 0.0, 0
    waited = asyncio.Event()
    monkeypatch.setattr("lessor_server.store.schema_change.time", SimpleNamespace(monotonic=lambda: now_s))

    async def pause(seconds: float) -> None:
        nonlocal now_s
        if tries or now_s < 1.8:
            now_s += seconds
        else:
            waited.set()
            await asyncio.sleep(0)

    def run(_: Connection) -> None:
        nonlocal now_s
        if not tries:
            now_s += 100

    async def meets_a_lock() -> None:
        nonlocal tries
        tries += 1
        raise asyncpg.LockNotAvailableError("canceling statement due to lock timeout")

    async def reached() -> str:
        # The third try of the first and the second of the next have got on; a third one of the last gives up.
        return str(sum(tries >= count for count in (3, 5)))

    changing: asyncio.Task[None] | None = None

    async def hold() -> None:
        nonlocal changing
        patience = timedelta(seconds=2)
        coroutine = change(guard, database_url, run, meets_a_lock, reached, patience=patience, pause=pause)
        changing = asyncio.create_task(coroutine)
        await waited.wait()

    await held(database_url, hold)
    assert changing is not None
    with pytest.raises(SchemaMismatch, match="for 2 s: canceling statement"):
        await changing
    assert tries == 7


@pytest.mark.parametrize("serves_from", ["0001", "9999"])
async def test_a_newer_schema_that_came_while_it_waited_is_left_alone(
    database_url: str, other: asyncpg.Connection, serves_from: str
) -> None:
    upgrading: asyncio.Task[str] | None = None

    async def hold() -> None:
        nonlocal upgrading
        upgrading = asyncio.create_task(asyncio.to_thread(migrate.upgrade, database_url))
        asked = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND application_name = 'lessor migrate' AND query LIKE '%pg_try_advisory_lock%'"
        )
        while not await other.fetchval(asked):
            assert not upgrading.done()
        await other.execute("UPDATE alembic_version SET version_num = '9999'")
        await other.execute("UPDATE schema_floor SET revision = $1", serves_from)

    await held(database_url, hold)
    assert upgrading is not None
    if serves_from == "0001":
        assert await upgrading == "9999"
    else:
        with pytest.raises(SchemaMismatch, match="schema 9999, which serves servers of schema 9999 and newer"):
            await upgrading


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
        await prober.goes_on()
        assert not building.done()
        await transaction.commit()
        await building
    assert prober.held_up_s < SLACK_S
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
