"""Connections to the database that all runs share, and how it is emptied between them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from datetime import UTC, datetime
from typing import Any, TypeVar

import asyncpg
import uvloop

from lessor_server.store.database import SESSION_SETTINGS
from lessor_server.store.partitions import BY_JOB, BY_LEASE, day_of, ensure_partitions, lease_bounds, partition_name

T = TypeVar("T")

BEGINNING = datetime(2026, 1, 1, 6, tzinfo=UTC)
"""The database's wall clock when a run begins."""

CONNECTIONS = 16

_SETTINGS = {
    **SESSION_SETTINGS,
    # Real time plays no part: the simulation finds deadlocks and counts timeouts itself.
    "deadlock_timeout": "10min",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "synchronous_commit": "off",
}

_TABLES = (
    "ready", "delayed", "lease", "lease_gpu", "attempt", "job", "session", "gpu", "agent", "request", "dedupe",
    "checkpoint", "progress", "log_head", "log_chunk", "event", "shape",
)  # fmt: skip
# Not DELETE: where a row stands decides in which order a statement without an order returns it.
_TRUNCATE = f"TRUNCATE {', '.join(_TABLES)}"
_ANEW = """
DELETE FROM leader;
INSERT INTO leader (epoch, holder, clock, beat) VALUES (0, '', 0, 0);
DO $$ BEGIN
    PERFORM setval('job_number', 0, false), setval('lease_number', {first_lease}, false),
        setval(pg_get_serial_sequence('session', 'id'), 1, false),
        setval(pg_get_serial_sequence('event', 'id'), 1, false),
        setval(pg_get_serial_sequence('shape', 'id'), 1, false);
END $$
"""


class Cluster:
    """Connections to one database, shared by all runs; between runs it is emptied."""

    def __init__(self, database_url: str) -> None:
        """Connects.

        Args:
            database_url: Of a database with the schema that nobody else uses.
        """
        self._loop = uvloop.new_event_loop()
        self.backends = [Backend(self.wait(self._connect(database_url))) for _ in range(CONNECTIONS)]
        self._monitor = self.wait(self._connect(database_url))
        self.wait(self._keep_one_day())
        self._first_lease = lease_bounds(day_of(BEGINNING))[0] + 1

    async def _connect(self, url: str) -> Any:
        connection = await asyncpg.connect(url, server_settings=_SETTINGS)
        await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=str, decoder=json.loads)
        return connection

    async def _keep_one_day(self) -> None:
        """Leaves the partitions of the virtual day alone: every other one would cost each statement time."""
        await ensure_partitions(self._monitor, BEGINNING)
        kept = {partition_name(table, day_of(BEGINNING)) for table in (*BY_JOB, *BY_LEASE)}
        for row in await self._monitor.fetch("SELECT inhrelid::regclass::text AS name FROM pg_inherits JOIN pg_class "
                                             "ON oid = inhrelid WHERE relkind = 'r'"):  # fmt: skip
            if row["name"] not in kept:
                await self._monitor.execute(f"DROP TABLE {row['name']}")

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs database work to its end. Nothing else happens meanwhile."""
        return self._loop.run_until_complete(work)

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begins database work; see :meth:`ended`."""
        return self._loop.create_task(work)

    def ended(self, task: asyncio.Task[Any], within_s: float) -> bool:
        """Returns whether work has ended after at most so much real time."""
        if not task.done():
            self._loop.run_until_complete(asyncio.wait({task}, timeout=within_s))
        return task.done()

    def look(self, text: str, *arguments: object) -> list[asyncpg.Record]:
        """Reads what is committed."""
        return self.wait(self._monitor.fetch(text, *arguments))

    def cancel(self, backend: Backend) -> None:
        """Has a waiting statement give up."""
        self.wait(self._monitor.execute("SELECT pg_cancel_backend($1)", backend.pid))

    def empty(self) -> None:
        """Makes the database as it was before the first run."""
        for backend in self.backends:
            if backend.connection.is_in_transaction():
                self.wait(backend.connection.execute("ROLLBACK"))
            backend.is_open = False
        self.wait(self._monitor.execute(f"BEGIN; {_TRUNCATE}; {_ANEW.format(first_lease=self._first_lease)}; COMMIT"))

    def close(self) -> None:
        """Disconnects."""
        for connection in (self._monitor, *(backend.connection for backend in self.backends)):
            self.wait(connection.close(timeout=5))
        self._loop.close()


class Backend:
    """A connection."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.pid: int = connection.get_server_pid()
        self.is_open = False
        """A transaction is open on it."""
