"""Migrations on a database with rows in it, while servers of the version before go on."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import asyncpg
import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, pool
from sqlalchemy.ext.asyncio import create_async_engine

from lessor_server.domain.errors import SchemaMismatch
from lessor_server.store import migrate
from lessor_server.store.database import sqlalchemy_url

# As the release before says them: without the column that is new.
OLD_TICK = "UPDATE leader SET clock = clock + $2, beat = beat + 1 WHERE epoch = $1 RETURNING clock"
OLD_TAKE_OVER = (
    "UPDATE leader SET epoch = epoch + 1, holder = $1, beat = beat + 1 WHERE epoch = $2 AND beat = $3 "
    "RETURNING epoch, clock"
)


async def to_revision(database_url: str, revision: str) -> None:
    """Brings a database to a schema."""

    def run(connection: Connection) -> None:
        config = Config()
        config.set_main_option("script_location", str(Path(migrate.__file__).parent / "migrations"))
        config.attributes["connection"] = connection
        command.upgrade(config, revision)

    engine = create_async_engine(sqlalchemy_url(database_url), poolclass=pool.NullPool)
    try:
        async with engine.connect() as connection:
            await connection.run_sync(run)
    finally:
        await engine.dispose()


@pytest.fixture
async def old(empty_database_url: str) -> str:
    """A database of the first schema."""
    await to_revision(empty_database_url, "0001")
    return empty_database_url


async def test_a_leader_of_the_version_before_goes_on_ticking(old: str) -> None:
    connection = await asyncpg.connect(old)
    try:
        term = await connection.fetchrow(OLD_TAKE_OVER, "old", 0, 0)
        assert term is not None
        tick = await connection.prepare(OLD_TICK)
        assert await tick.fetchval(term["epoch"], 250) == 250
        await to_revision(old, "head")
        assert await tick.fetchval(term["epoch"], 250) == 500
        assert await migrate.current_revision(connection) == migrate.head_revision()
        assert await connection.fetchval("SELECT stood_ms FROM leader") == 0
        row = await connection.fetchrow("SELECT epoch, beat FROM leader")
        assert row is not None
        assert await connection.fetchrow(OLD_TAKE_OVER, "another", row["epoch"], row["beat"]) is not None
    finally:
        await connection.close()


async def test_a_leader_that_holds_the_row_makes_the_migration_give_up(old: str) -> None:
    """It does not queue behind a stuck tick, and nothing queues behind it; run again, it goes through."""
    connection = await asyncpg.connect(old)
    try:
        async with connection.transaction():
            await connection.execute("SELECT FROM leader FOR UPDATE")
            with pytest.raises(SchemaMismatch, match=r"lock timeout.*is undone .*run `lessor server migrate` again"):
                await asyncio.to_thread(migrate.upgrade, old, patience=timedelta(0))
        assert await migrate.current_revision(connection) == "0001"
        await asyncio.to_thread(migrate.upgrade, old)
        assert await migrate.current_revision(connection) == migrate.head_revision()
    finally:
        await connection.close()
