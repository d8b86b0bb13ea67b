"""Connections to Postgres.

Two doors to one database: asyncpg's own pool for the contended statements of
``sql/``, whose batches are its field, and a SQLAlchemy engine for the rest.
Database work runs in tasks of the server, never inside an RPC handler's own
task: a cancelled stream must not cancel a commit (see :mod:`.group_commit`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol, TypeVar

import asyncpg
from sqlalchemy import exc as sqlalchemy_errors
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from lessor_server.domain.errors import DatabaseUnavailable
from lessor_server.store.statements import statement

T = TypeVar("T")

# What every connection of the server asks of Postgres: a forgotten transaction
# or a lock that is not had in time ends the statement, not the service.
SESSION_SETTINGS = {
    "application_name": "lessor",
    "idle_in_transaction_session_timeout": "10s",
    "lock_timeout": "10s",
    "tcp_user_timeout": "10000",
    "jit": "off",
    "timezone": "UTC",
    # One plan per statement: to plan one anew over a hundred partitions takes
    # longer than to run it (8 ms against 1). Tests look at these plans.
    "plan_cache_mode": "force_generic_plan",
    # Such a plan is estimated to read every partition, and would start processes to look up one row.
    "max_parallel_workers_per_gather": "0",
}

VITAL = frozenset(
    {"tick", "read_leader", "take_over", "renew_term", "resign", "renew", "claim", "count_silent", "expire"}
)
"""Statements that keep leases alive. They have connections of their own, so that
no burst of requests makes them wait: a late renewal ends a healthy job."""

VITAL_CONNECTIONS = 4

SHORT_TIMEOUT_S = 5.0
"""A statement of milliseconds that takes so long waits on a dead connection: a host that vanished says nothing.
As long again the driver waits for word that it was cancelled, then the connection is dropped."""

_LARGE_BATCHES = frozenset({"claim", "expire"})
"""The vital statements that may rightly take longer."""

_TIMEOUT_S = 60.0

# A connection that is gone, a server that stops or starts, or a standby.
_UNAVAILABLE = (
    OSError,
    asyncio.TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.LockNotAvailableError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    # Cancelled by an operator or a timeout of the role; out of disk, memory or
    # connections; an I/O error; a password that was changed. None of it is the
    # statement's fault, and all of it may pass.
    asyncpg.QueryCanceledError,
    asyncpg.InsufficientResourcesError,
    asyncpg.PostgresSystemError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InternalClientError,
)
# A statement that Postgres gave up for another's sake: run it again.
_RETRY = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError)
_ATTEMPTS = 5


def plain_url(url: str) -> str:
    """Returns a database URL without a SQLAlchemy driver name, as asyncpg takes it.

    Raises:
        ValueError: It is not a PostgreSQL URL.
    """
    if url.startswith("postgres://"):
        url = "postgresql://" + url.removeprefix("postgres://")
    try:
        parsed = make_url(url)
    except sqlalchemy_errors.ArgumentError:
        raise ValueError(f"{url!r} is not a database URL; expected postgresql://user@host:port/name") from None
    if parsed.get_backend_name() != "postgresql":
        raise ValueError(f"{url!r} is not a PostgreSQL URL; expected postgresql://user@host:port/name")
    return parsed.set(drivername="postgresql").render_as_string(hide_password=False)


def sqlalchemy_url(url: str) -> str:
    """Returns ``url`` with the driver name that SQLAlchemy needs for asyncpg."""
    return "postgresql+asyncpg://" + plain_url(url).removeprefix("postgresql://")


async def _read_json(connection: asyncpg.Connection) -> None:
    """Has a connection read jsonb as Python values; it is written as JSON text."""
    await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=str, decoder=json.loads)


async def _left_as_it_is(connection: asyncpg.Connection) -> None:
    """Keeps a connection from being reset when it comes back, which takes a round trip.

    Whoever sets something for longer than a transaction sets it back.
    """


async def _open_pool(url: str, size: int, timeout_s: float = _TIMEOUT_S) -> asyncpg.Pool:
    """Opens a pool of at most ``size`` connections, on which a statement may take ``timeout_s``.

    Raises:
        DatabaseUnavailable: Nobody answers there, or it refuses us.
    """
    try:
        return await asyncpg.create_pool(
            url,
            min_size=min(2, size),
            max_size=size,
            max_inactive_connection_lifetime=300,
            server_settings=SESSION_SETTINGS,
            timeout=5,
            command_timeout=timeout_s,
            init=_read_json,
            reset=_left_as_it_is,
        )
    except _UNAVAILABLE as error:
        raise DatabaseUnavailable(f"{type(error).__name__}: {error}") from error
    except asyncpg.PostgresError as error:
        raise DatabaseUnavailable(str(error)) from error


class Statements(Protocol):
    """Runs the statements of ``sql/``: each in its own transaction, or all in one."""

    async def fetch(self, name: str, /, **values: Any) -> list[asyncpg.Record]:
        """Runs ``sql/<name>.sql`` and returns its rows."""


class Database:
    """The pools of one server process. Made by :meth:`connect`, ended by :meth:`close`."""

    def __init__(
        self, url: str, pool: asyncpg.Pool, vital: asyncpg.Pool, reading: asyncpg.Pool, engine: AsyncEngine
    ) -> None:
        self.url = url
        self.pool = pool
        self._vital = vital
        self._reading = reading
        self._engine = engine

    @classmethod
    async def connect(cls, url: str, *, pool_size: int = 10) -> Database:
        """Opens the pools: ``pool_size`` (>= 2) connections for writes, as many for all else, and the vital ones.

        Raises:
            ValueError: The URL is not one of PostgreSQL.
            DatabaseUnavailable: Nobody answers there, or it refuses us.
        """
        url = plain_url(url)
        pools: list[asyncpg.Pool] = []
        try:
            pools.append(await _open_pool(url, pool_size))
            pools.append(await _open_pool(url, VITAL_CONNECTIONS, SHORT_TIMEOUT_S))
            # Reads of jobs, lists and events: however many are asked for, they hold up no write.
            pools.append(await _open_pool(url, pool_size // 2))
        except BaseException:
            for pool in pools:
                pool.terminate()
            raise
        engine = create_async_engine(
            sqlalchemy_url(url),
            pool_size=pool_size - pool_size // 2,
            max_overflow=0,
            pool_timeout=10,
            pool_recycle=300,
            connect_args={"server_settings": SESSION_SETTINGS, "timeout": 5, "command_timeout": _TIMEOUT_S},
        )
        pool, vital, reading = pools
        return cls(url, pool, vital, reading, engine)

    async def close(self) -> None:
        """Closes the pools; statements under way are waited for, at most 5 s."""
        for pool in (self.pool, self._vital, self._reading):
            try:
                await asyncio.wait_for(pool.close(), 5)
            except TimeoutError:
                pool.terminate()
        await self._engine.dispose()

    async def fetch(self, name: str, /, **values: Any) -> list[asyncpg.Record]:
        """Runs the statement ``sql/<name>.sql`` in its own transaction and returns its rows.

        A deadlock or serialization failure is tried again.

        Raises:
            DatabaseUnavailable: The connection failed; the outcome is unknown.
            asyncpg.DataError: A value cannot be stored.
        """
        query = statement(name)
        arguments = query.arguments(values)

        pool = self._vital if name in VITAL else self.pool
        timeout_s = _TIMEOUT_S if name in _LARGE_BATCHES else None

        async def run() -> list[asyncpg.Record]:
            try:
                return await pool.fetch(query.text, *arguments, timeout=timeout_s)
            except TimeoutError:
                # What happened to this connection happened to all: were each found out by a
                # statement of its own, no agent would be renewed in the meantime.
                if pool is self._vital:
                    await self._expire_connections()
                else:
                    await pool.expire_connections()
                raise

        return await guarded(run)

    async def _expire_connections(self) -> None:
        """Has every connection replaced that is not in use, before its next use: the host behind them has vanished.

        On the others a statement takes a minute to find out.
        """
        for pool in (self._vital, self.pool, self._reading):
            await pool.expire_connections()
        await self._engine.dispose(close=False)

    async def query(self, text: str, *arguments: Any) -> list[asyncpg.Record]:
        """Runs one statement that is not of ``sql/``, with $1, $2, …, as :meth:`fetch` does.

        Raises:
            DatabaseUnavailable: The connection failed; the outcome is unknown.
        """

        async def run() -> list[asyncpg.Record]:
            return await self.pool.fetch(text, *arguments)

        return await guarded(run)

    async def look(self, text: str, *arguments: Any) -> list[asyncpg.Record]:
        """Runs one statement that only reads, with $1, $2, …, on the connections that are kept for reads.

        Raises:
            DatabaseUnavailable: The connection failed.
        """

        async def run() -> list[asyncpg.Record]:
            return await self._reading.fetch(text, *arguments)

        return await guarded(run)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """Opens a transaction of several statements on one connection.

        Raises:
            DatabaseUnavailable: The connection failed; the outcome is unknown.
        """
        try:
            async with self.pool.acquire() as connection, connection.transaction():
                yield Transaction(connection)
        except _UNAVAILABLE as error:
            raise DatabaseUnavailable(f"{type(error).__name__}: {error}") from error

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        """Opens a SQLAlchemy transaction, for the statements that are not contended.

        Raises:
            DatabaseUnavailable: The connection failed; the outcome is unknown.
        """
        with outages_named():
            async with self._engine.begin() as connection:
                yield connection

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """Opens a SQLAlchemy connection in autocommit: one statement, one snapshot, one round trip.

        Raises:
            DatabaseUnavailable: The connection failed.
        """
        with outages_named():
            async with self._engine.connect() as connection:
                yield await connection.execution_options(isolation_level="AUTOCOMMIT")


@contextmanager
def outages_named() -> Iterator[None]:
    """Turns what asyncpg and SQLAlchemy raise when the database is out of reach into DatabaseUnavailable."""
    try:
        yield
    except sqlalchemy_errors.DBAPIError as error:
        cause = error.orig.__cause__ if error.orig is not None else None
        if error.connection_invalidated or isinstance(cause, _UNAVAILABLE):
            raise DatabaseUnavailable(str(cause or error.orig)) from error
        raise
    except (sqlalchemy_errors.TimeoutError, *_UNAVAILABLE) as error:
        raise DatabaseUnavailable(f"{type(error).__name__}: {error}") from error


class Transaction:
    """Statements of ``sql/`` in one transaction."""

    def __init__(self, connection: asyncpg.Connection | Any) -> None:
        self.connection = connection

    async def fetch(self, name: str, /, **values: Any) -> list[asyncpg.Record]:
        """Runs ``sql/<name>.sql`` and returns its rows."""
        query = statement(name)
        rows: list[asyncpg.Record] = await self.connection.fetch(query.text, *query.arguments(values))
        return rows


async def guarded(run: Callable[[], Awaitable[T]]) -> T:
    """Runs one autocommit statement; tries again after a deadlock, names an outage.

    Raises:
        DatabaseUnavailable: The connection failed; the outcome is unknown.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return await run()
        except _RETRY as error:
            if attempt == _ATTEMPTS - 1:
                raise DatabaseUnavailable(f"{type(error).__name__}: {error}") from error
        except _UNAVAILABLE as error:
            raise DatabaseUnavailable(f"{type(error).__name__}: {error}") from error
    raise AssertionError("unreachable")
