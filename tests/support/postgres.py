"""Real PostgreSQL for tests: one server per test process, one database per test.

A database is cloned from a template that is migrated once. The server dies with
the test process, its directory with the server.
"""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar

import asyncpg

from lessor_server.embedded import EmbeddedPostgres

T = TypeVar("T")

VERSION_VARIABLE = "LESSOR_TEST_POSTGRES"
DEFAULT_VERSION = 18

SETTINGS = {
    "max_connections": "200",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "shared_buffers": "64MB",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "1h",
    # Plans and counts must not depend on when a vacuum comes by; a test that wants ANALYZE says so.
    "autovacuum": "off",
}
_TEMPLATE = "lessor_template"


def wanted_version() -> int:
    """Returns the major version of PostgreSQL that the tests run on."""
    return int(os.environ.get(VERSION_VARIABLE) or DEFAULT_VERSION)


class PostgresServer:
    """A throw-away server that makes and drops databases.

    Its methods block and may be called from any thread, with or without an event
    loop in it: a thread of its own runs the administrative connection.
    """

    def __init__(self, version: int) -> None:
        """Starts it.

        Raises:
            PostgresNotFound: That version is not on this host.
        """
        self._postgres = EmbeddedPostgres(None, version=version, settings=SETTINGS, durable=False)
        self._postgres.start()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="postgres-admin", daemon=True)
        self._thread.start()
        self._lock = threading.Lock()
        self._has_template = False
        self._admin: asyncpg.Connection = self._run(asyncpg.connect(self._postgres.url("postgres")))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def postgres(self) -> EmbeddedPostgres:
        """The server itself."""
        return self._postgres

    def create_empty(self) -> str:
        """Makes an empty database. Returns its URL."""
        return self._create("template1")

    def create_migrated(self) -> str:
        """Makes a database with the current schema. Returns its URL."""
        with self._lock:
            if not self._has_template:
                self._make_template()
                self._has_template = True
        return self._create(_TEMPLATE)

    def drop(self, database_url: str) -> None:
        """Drops a database and ends whatever is connected to it."""
        name = database_url.rpartition("/")[2]
        self._execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def close(self) -> None:
        """Stops the server; nothing of it is left."""
        try:
            self._run(self._admin.close(timeout=5))
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._postgres.stop()

    def _create(self, template: str) -> str:
        name = f"test_{uuid.uuid4().hex}"
        # Copied as files: less than half the time of writing each page to the log, which nothing here needs.
        self._execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY FILE_COPY')
        return self._postgres.url(name)

    def _make_template(self) -> None:
        # Imported here: tests that need no schema run without the store.
        from lessor_server.store import migrate

        self._execute(f'DROP DATABASE IF EXISTS "{_TEMPLATE}" WITH (FORCE)')
        self._execute(f'CREATE DATABASE "{_TEMPLATE}"')
        # A fresh thread: upgrade() may run an event loop of its own, which a thread that has one refuses.
        with ThreadPoolExecutor(1) as worker:
            worker.submit(migrate.upgrade, self._postgres.url(_TEMPLATE)).result()
        # A connection that is still going away would make the first clone fail.
        self._execute(f'ALTER DATABASE "{_TEMPLATE}" ALLOW_CONNECTIONS false')
        self._execute(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{_TEMPLATE}'")

    def _execute(self, statement: str) -> None:
        self._run(self._admin.execute(statement))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
