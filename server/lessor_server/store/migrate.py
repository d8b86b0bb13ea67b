"""The schema's versions: bringing a database up to date, and refusing one that is not."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from lessor_server.domain.errors import DatabaseUnavailable, SchemaMismatch
from lessor_server.store.database import outages_named, plain_url
from lessor_server.store.partitions import ensure_partitions
from lessor_server.store.schema_change import PATIENCE, change, open_guard

MIN_POSTGRES_VERSION = 150000
"""server_version_num of the oldest PostgreSQL that is supported."""

_EMPTY = "none"
"""Stands for the schema of a database that holds none."""

logger = logging.getLogger(__name__)


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def head_revision() -> str:
    """Returns the version of the schema that this code speaks."""
    revision = ScriptDirectory.from_config(_config()).get_current_head()
    assert revision is not None
    return revision


def upgrade(database_url: str, *, patience: timedelta = PATIENCE) -> str:
    """Brings the database to this code's schema, with partitions for the days to come.

    Servers go on meanwhile: no statement of theirs waits for longer than
    :data:`lessor_server.store.schema_change.STALL`. Each migration is a transaction;
    one that is cut off by whatever means is undone, and the next run goes on with it.
    Runs its own event loop; call it from a thread that has none. Two at once wait
    for each other.

    Args:
        database_url: The database.
        patience: How long to try again while other sessions hold what the next migration needs.

    Returns:
        The schema that the database holds: this code's, or a newer one that this code works on.

    Raises:
        ValueError: The URL is not one of PostgreSQL.
        DatabaseUnavailable: Nobody answers there, it refuses us, or the connection broke.
        SchemaMismatch: PostgreSQL is too old, the schema does not serve this code any more, or
            a table is held by somebody for too long; the migration that met it was undone.
    """
    return asyncio.run(_upgrade(database_url, patience))


async def _upgrade(database_url: str, patience: timedelta) -> str:
    url = plain_url(database_url)
    try:
        guard = await open_guard(url)
    except (TimeoutError, OSError, asyncpg.PostgresError) as error:
        raise DatabaseUnavailable(f"{type(error).__name__}: {error}") from error
    try:
        with outages_named():
            await change(
                guard, url, _run_alembic, lambda: ensure_partitions(guard), lambda: _reached(guard), patience=patience
            )
            return str(await current_revision(guard))
    finally:
        with suppress(TimeoutError):
            await guard.close(timeout=5)


async def _reached(connection: asyncpg.Connection | Any) -> str | None:
    """Returns the schema that this code's migrations are to go on from; None: it is newer, leave it alone.

    Raises:
        SchemaMismatch: PostgreSQL is too old, or servers of this code's schema are not served any more.
    """
    revision = await _suitable(connection)
    return (revision or _EMPTY) if _knows(revision) else None


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


async def check(pool_: asyncpg.Pool) -> None:
    """Makes sure that this code works on the schema that the database holds.

    That is its own, or a newer one that only added to it: a server of the version
    before may be started again while an upgrade is under way, or after it was taken back.

    Raises:
        SchemaMismatch: It does not; the message names the command that helps.
    """
    async with pool_.acquire() as connection:
        await check_connection(connection)


async def check_connection(connection: asyncpg.Connection | Any) -> None:
    """Does what :func:`check` does, on one connection.

    Raises:
        SchemaMismatch: This code does not work on that schema; the message names the command that helps.
    """
    current = await _suitable(connection)
    if not _knows(current):
        logger.info(
            "the schema is newer than this server, which works on it",
            extra={"event": "newer_schema", "schema": current, "own_schema": head_revision()},
        )
    elif current != head_revision():
        state = "holds no Lessor schema" if current is None else f"has schema {current}"
        raise SchemaMismatch(
            f"the database {state}, this version of Lessor needs {head_revision()}: "
            "run `lessor server migrate --database-url …` with it"
        )


def _knows(revision: str | None) -> bool:
    """Returns whether a schema is this code's or older; None, which is no schema, is."""
    return revision is None or revision in _known()


def _known() -> set[str]:
    return {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}


async def _suitable(connection: asyncpg.Connection | Any) -> str | None:
    """Returns the schema of the database.

    Raises:
        SchemaMismatch: PostgreSQL is too old, or servers of this code's schema are not served any more.
    """
    version = int(await connection.fetchval("SHOW server_version_num"))
    if version < MIN_POSTGRES_VERSION:
        raise SchemaMismatch(
            f"PostgreSQL {version // 10000} is too old: Lessor needs {MIN_POSTGRES_VERSION // 10000} or newer"
        )
    current = await current_revision(connection)
    if not _knows(current):
        # Whoever changed it last said which servers it still serves; this code cannot know.
        noted = await connection.fetchval("SELECT to_regclass('schema_floor')") is not None
        floor = await connection.fetchval("SELECT revision FROM schema_floor") if noted else None
        if floor not in _known():
            raise SchemaMismatch(
                f"the database has schema {current}, which serves servers of schema {floor or current} and newer; this "
                f"version of Lessor has {head_revision()}: run the version of Lessor that wrote it, or a newer one"
            )
    return current
