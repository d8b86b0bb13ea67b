"""The schema's versions: bringing a database up to date, and refusing one that is not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, pool
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from lessor_server.domain.errors import DatabaseUnavailable, SchemaMismatch
from lessor_server.store.database import plain_url, sqlalchemy_url
from lessor_server.store.partitions import ensure_partitions

MIN_POSTGRES_VERSION = 150000
"""server_version_num of the oldest PostgreSQL that is supported."""

# One migration at a time, whoever starts it.
_MIGRATION_LOCK = 0x4C4553534F52


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def head_revision() -> str:
    """Returns the version of the schema that this code speaks."""
    revision = ScriptDirectory.from_config(_config()).get_current_head()
    assert revision is not None
    return revision


def upgrade(database_url: str) -> None:
    """Brings the database to this code's schema, with partitions for the days to come.

    Runs its own event loop; call it from a thread that has none. Two at once
    wait for each other.

    Raises:
        ValueError: The URL is not one of PostgreSQL.
        DatabaseUnavailable: Nobody answers there, or it refuses us.
        SchemaMismatch: PostgreSQL is too old, the schema is newer than this code, or a
            table it changes is held by somebody; nothing was changed.
    """
    asyncio.run(_upgrade(database_url))


async def _upgrade(database_url: str) -> None:
    url = plain_url(database_url)
    try:
        guard = await asyncpg.connect(url, timeout=5)
    except (TimeoutError, OSError, asyncpg.PostgresError) as error:
        raise DatabaseUnavailable(f"{type(error).__name__}: {error}") from error
    try:
        await guard.execute("SELECT pg_advisory_lock($1)", _MIGRATION_LOCK)
        await _refuse_newer(guard)
        engine = create_async_engine(sqlalchemy_url(url), poolclass=pool.NullPool)
        try:
            async with engine.begin() as connection:
                await connection.run_sync(_run_alembic)
        except DBAPIError as error:
            if error.orig is not None and isinstance(error.orig.__cause__, asyncpg.LockNotAvailableError):
                # Better than to wait: whoever comes after us would wait behind us.
                raise SchemaMismatch(
                    f"the schema could not be changed now ({error.orig.__cause__}): another session holds a table; "
                    "nothing was changed, run `lessor server migrate` again"
                ) from error
            raise
        finally:
            await engine.dispose()
        await ensure_partitions(guard)
    finally:
        await guard.close()


def _run_alembic(connection: Connection) -> None:
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


async def current_revision(connection: asyncpg.Connection | Any) -> str | None:
    """Returns the version of the schema in the database; None: it holds none."""
    if await connection.fetchval("SELECT to_regclass('alembic_version')") is None:
        return None
    revision: str | None = await connection.fetchval("SELECT version_num FROM alembic_version")
    return revision


async def _refuse_newer(connection: asyncpg.Connection | Any) -> None:
    version = int(await connection.fetchval("SHOW server_version_num"))
    if version < MIN_POSTGRES_VERSION:
        raise SchemaMismatch(
            f"PostgreSQL {version // 10000} is too old: Lessor needs {MIN_POSTGRES_VERSION // 10000} or newer"
        )
    current = await current_revision(connection)
    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    if current is not None and current not in known:
        raise SchemaMismatch(
            f"the database has schema {current}, which this version of Lessor does not know "
            f"(it knows up to {head_revision()}): run the version of Lessor that wrote it, or a newer one"
        )


async def check(pool_: asyncpg.Pool) -> None:
    """Makes sure that the database holds this code's schema.

    Raises:
        SchemaMismatch: It does not; the message names the command that helps.
    """
    async with pool_.acquire() as connection:
        await check_connection(connection)


async def check_connection(connection: asyncpg.Connection | Any) -> None:
    """Does what :func:`check` does, on one connection.

    Raises:
        SchemaMismatch: The database holds another schema; the message names the command that helps.
    """
    await _refuse_newer(connection)
    current = await current_revision(connection)
    if current != head_revision():
        state = "holds no Lessor schema" if current is None else f"has schema {current}"
        raise SchemaMismatch(
            f"the database {state}, this version of Lessor needs {head_revision()}: "
            "run `lessor server migrate --database-url …` with it"
        )
