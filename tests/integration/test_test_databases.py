"""The databases that tests get: fresh, apart from each other, dropped afterwards."""

from __future__ import annotations

import asyncpg

from tests.support.postgres import PostgresServer, wanted_version


async def test_the_server_is_of_the_wanted_version(empty_database_url: str) -> None:
    connection = await asyncpg.connect(empty_database_url)
    try:
        assert connection.get_server_version().major == wanted_version()
        assert await connection.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0
    finally:
        await connection.close()


async def test_a_clone_has_the_schema_and_is_dropped_under_its_connections(postgres_server: PostgresServer) -> None:
    first, second = postgres_server.create_migrated(), postgres_server.create_migrated()
    assert first != second
    connection = await asyncpg.connect(first)
    assert await connection.fetchval("SELECT count(*) FROM leader") == 1
    postgres_server.drop(first)
    postgres_server.drop(second)
    await connection.close()
    remaining = await names(postgres_server)
    assert first.rpartition("/")[2] not in remaining
    assert second.rpartition("/")[2] not in remaining


async def test_the_pool_works_on_a_migrated_database(pool: asyncpg.Pool) -> None:
    assert await pool.fetchval("SELECT count(*) FROM leader") == 1


async def names(server: PostgresServer) -> set[str]:
    connection = await asyncpg.connect(server.postgres.url("postgres"))
    try:
        return {row["datname"] for row in await connection.fetch("SELECT datname FROM pg_database")}
    finally:
        await connection.close()
