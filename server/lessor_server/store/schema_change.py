"""Changing the schema under servers that go on: no statement of theirs waits long for a migration.

A change of a table asks for a lock that conflicts with everything. While it waits
for somebody's long transaction, every later statement on that table waits behind
it: one forgotten session would stop all servers. So a migration may wait, and make
others wait, for :data:`STALL` at most. Then it lets go of all it holds, is rolled
back, gives the servers time to catch up, and is tried again, for as long as the
caller has patience.

Two things see to that. ``lock_timeout`` ends a wait for a lock, also when this
process stands still meanwhile. A watch on a second connection ends whatever else
keeps others waiting: a table that is rewritten, an index built with the table
locked, a hundred partitions locked one by one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import asyncpg
from sqlalchemy import Connection, pool, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from lessor_server.domain.errors import SchemaMismatch
from lessor_server.store.database import sqlalchemy_url

STALL = timedelta(milliseconds=1500)
"""How long a migration waits for a lock, and how long a statement of anybody waits behind it. Longer than the second
(``deadlock_timeout``) after which an autovacuum gives way; shorter than the 5 s that a server gives its renewals."""

PATIENCE = timedelta(minutes=1)
"""How long a migration is tried again since it first met a lock."""

_GUARD_TIMEOUT_S = 10.0
"""A statement of the watch that takes so long waits on a dead connection."""

_LOOK_EVERY_S = 0.1
_PAUSES_S = (0.5, 1.0, 2.0, 4.0)
"""Between attempts, in which servers catch up; the last one again and again."""

_SETTINGS = {
    "application_name": "lessor migrate",
    "lock_timeout": f"{STALL // timedelta(milliseconds=1)}ms",
    # A process that is stopped between two statements must not keep their locks.
    "idle_in_transaction_session_timeout": "5s",
    "timezone": "UTC",
}

# One migration at a time, whoever starts it.
_MIGRATION_LOCK = 0x4C4553534F52

# $1: the backend of the migration. Whom it waits for, and since when the first waits for it (null: nobody does).
_LOOK = """
SELECT
    ARRAY(
        SELECT concat_ws(' ', 'process', a.pid, '(' || concat_ws(', ',
            COALESCE(NULLIF(a.application_name, ''), a.backend_type), a.state,
            'in a transaction for ' || round(extract(epoch FROM clock_timestamp() - a.xact_start)) || ' s') || ')')
        FROM unnest(pg_blocking_pids($1)) AS b (pid) JOIN pg_stat_activity AS a ON a.pid = b.pid
        ORDER BY a.xact_start
    ) AS holders,
    (
        SELECT extract(epoch FROM clock_timestamp() - min(l.waitstart)) FROM pg_locks AS l
        WHERE NOT l.granted AND l.pid <> $1 AND $1 = ANY (pg_blocking_pids(l.pid))
    ) AS kept_waiting_s
"""


@dataclass(slots=True)
class _Seen:
    """What the watch saw of one attempt."""

    holders: list[str] = field(default_factory=list)
    """Whom it waited for at the last look: not whom it has got past since."""
    before: list[str] = field(default_factory=list)
    """The same at the look before: the last one may have come just after the wait was over."""
    ended: bool = False
    """Others waited for it for too long, and it was cancelled."""
    ended_at: list[str] = field(default_factory=list)
    """Whom it waited for itself when it was cancelled."""

    def look(self, holders: list[str]) -> None:
        """Takes what one look found."""
        self.before, self.holders = self.holders, holders

    def because(self, error: asyncpg.PostgresError) -> str:
        """Says in half a sentence why the attempt was given up."""
        cancelled = isinstance(error, asyncpg.QueryCanceledError) and self.ended
        holders = self.ended_at if cancelled else self.holders or self.before
        if holders:
            return f"{', '.join(holders)} holds what it needs"
        if cancelled:
            return f"it kept other sessions waiting for more than {STALL / timedelta(seconds=1)} s"
        return str(error)


@dataclass(slots=True)
class _Trouble:
    """Lock trouble since the schema last moved on: that is what patience is for."""

    reached: str
    """Where the schema stood at the first of it."""
    since_s: float
    tries: int = 0
    """Attempts that met it."""

    def pause_s(self) -> float:
        """Returns for how long servers are to catch up before the next attempt."""
        return _PAUSES_S[min(self.tries, len(_PAUSES_S)) - 1]


async def open_guard(database_url: str) -> asyncpg.Connection | Any:
    """Opens a connection that can watch; it waits for no lock, and no dead host, for long."""
    return await asyncpg.connect(database_url, server_settings=_SETTINGS, timeout=5, command_timeout=_GUARD_TIMEOUT_S)


async def _unknown() -> str:
    return ""


async def change(
    guard: asyncpg.Connection | Any,
    database_url: str,
    steps: Callable[[Connection], None],
    after: Callable[[], Awaitable[object]],
    reached: Callable[[], Awaitable[str | None]] = _unknown,
    *,
    patience: timedelta = PATIENCE,
    pause: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> None:
    """Runs ``steps``, then ``after``, again until both went through; two at once wait for each other.

    Args:
        guard: A connection of the caller's own, for the watch (:func:`open_guard`).
        database_url: Where to open the connection of ``steps``.
        steps: Runs the migrations that are missing, each in a transaction of its own. Called again
            after it was cut off, it goes on with the one that was rolled back.
        after: What is to be done when the schema has changed; may meet a lock as well.
        reached: Looks where the schema stands, before each attempt, when no other migration can
            be at work any more; None: it is newer than what ``steps`` know, nothing is to be done.
        patience: How long attempts begin since one first met a lock; anew when ``reached`` moved on
            in between. As long again it waits for another migration, before all that.
        pause: Waits between attempts, in seconds.

    Raises:
        SchemaMismatch: It could not be done with that patience; what was being changed was rolled back.
    """
    patience_s = patience / timedelta(seconds=1)
    trouble: _Trouble | None = None
    engine = create_async_engine(
        sqlalchemy_url(database_url),
        poolclass=pool.NullPool,
        connect_args={"server_settings": _SETTINGS, "timeout": 5, "command_timeout": None},
    )
    try:
        async with _alone(guard, time.monotonic() + patience_s, pause):
            # Looked at here: whoever we waited for may have brought a schema that we do not know.
            while (stands := await reached()) is not None:
                seen = _Seen()
                try:
                    await _attempt(engine, guard, steps, seen)
                    seen = _Seen()
                    await after()
                    return
                except (DBAPIError, asyncpg.PostgresError) as error:
                    cause = _lock_trouble(error, seen)
                    if cause is None:
                        raise
                    now_s, stands = time.monotonic(), await reached() or stands
                    if trouble is None or trouble.reached != stands:
                        trouble = _Trouble(stands, now_s)
                    trouble.tries += 1
                    if now_s + trouble.pause_s() > trouble.since_s + patience_s:
                        raise SchemaMismatch(
                            f"the schema could not be changed for {patience_s:.0f} s: {seen.because(cause)} ({cause}); "
                            "what was begun is undone and servers go on: end that session or wait for it, then run "
                            "`lessor server migrate` again"
                        ) from error
                await pause(trouble.pause_s())
    finally:
        await engine.dispose()


@asynccontextmanager
async def _alone(
    guard: asyncpg.Connection | Any, gives_up: float, pause: Callable[[float], Awaitable[object]]
) -> AsyncIterator[None]:
    """Keeps other migrations out; gives up on one that does not end."""
    while not await guard.fetchval("SELECT pg_try_advisory_lock($1)", _MIGRATION_LOCK):
        if time.monotonic() > gives_up:
            # The halves of the key, as pg_locks shows one of 64 bits.
            pid = await guard.fetchval(
                "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 1 "
                "AND classid = ($1::bigint >> 32)::oid AND objid = ($1::bigint & 4294967295)::oid",
                _MIGRATION_LOCK,
            )
            raise SchemaMismatch(
                f"another `lessor server migrate` is at work on this database and does not end (process {pid} of "
                "PostgreSQL): wait for it, or end it, then run `lessor server migrate` again"
            )
        await pause(_LOOK_EVERY_S)
    try:
        yield
    finally:
        if not guard.is_closed():
            await guard.execute("SELECT pg_advisory_unlock($1)", _MIGRATION_LOCK)


async def _attempt(
    engine: AsyncEngine, guard: asyncpg.Connection | Any, steps: Callable[[Connection], None], seen: _Seen
) -> None:
    async with engine.connect() as connection:
        backend = (await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        await connection.rollback()
        over = asyncio.Event()
        watch = asyncio.create_task(_watch(guard, backend, seen, over))
        try:
            await connection.run_sync(steps)
        finally:
            # Not cancelled amid a statement: the connection is used again.
            over.set()
            await watch


async def _watch(guard: asyncpg.Connection | Any, backend: int, seen: _Seen, over: asyncio.Event) -> None:
    """Looks whom the migration waits for, and ends its statement when somebody has waited for it for too long."""
    while not over.is_set():
        try:
            (look,) = await guard.fetch(_LOOK, backend)
            seen.look(look["holders"])
            if (look["kept_waiting_s"] or 0) >= STALL / timedelta(seconds=1):
                seen.ended, seen.ended_at = True, seen.holders
                await guard.execute("SELECT pg_cancel_backend($1)", backend)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            # The connection is gone, and with it the lock that keeps other migrations out. What the database
            # does by itself still bounds a wait for a lock, and whatever uses this connection next says so.
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), _LOOK_EVERY_S)


def _lock_trouble(error: DBAPIError | asyncpg.PostgresError, seen: _Seen) -> asyncpg.PostgresError | None:
    """Returns the error of PostgreSQL that another attempt may get round, or None."""
    cause = error.orig.__cause__ if isinstance(error, DBAPIError) and error.orig is not None else error
    if isinstance(cause, asyncpg.LockNotAvailableError | asyncpg.DeadlockDetectedError):
        return cause
    if isinstance(cause, asyncpg.QueryCanceledError) and seen.ended:
        return cause
    return None
