"""Statements of this release mean the same when a later one has added columns, whatever it calls them."""

from __future__ import annotations

import re
from typing import Any

import asyncpg
import pytest
from asyncpg.prepared_stmt import PreparedStatement

from lessor_server.store import tables
from lessor_server.store.database import SESSION_SETTINGS
from lessor_server.store.partitions import ensure_partitions
from lessor_server.store.statements import all_names, statement

_MADE_NAME = re.compile(r"\bAS (?:MATERIALIZED )?\"?([a-z_]+)\b")


async def names_in_use(connection: asyncpg.Connection) -> dict[str, str]:
    """Returns name → type of all columns there are, and of those that statements make for themselves."""
    types = {
        "ARRAY": "text[]", "bigint": "bigint", "boolean": "boolean", "bytea": "bytea", "integer": "int",
        "smallint": "smallint",
    }  # fmt: skip
    made = {name: "text" for query in all_names() for name in _MADE_NAME.findall(statement(query).text)}
    rows = await connection.fetch(
        "SELECT column_name, data_type FROM information_schema.columns WHERE table_name = ANY ($1)",
        list(tables.metadata.tables),
    )
    return made | {row["column_name"]: types.get(row["data_type"], "text") for row in rows}


@pytest.mark.parametrize("table", sorted(tables.metadata.tables))
async def test_a_column_may_have_any_name_that_is_used_elsewhere(database_url: str, table: str) -> None:
    """What a statement does not qualify would be ambiguous then, and fail in servers that run."""
    connection = await asyncpg.connect(database_url)
    try:
        have = set(tables.metadata.tables[table].columns.keys())
        names = await names_in_use(connection)
        assert {"log_bytes", "jitter", "final_state", "job_id"} <= set(names)
        added = ", ".join(f'ADD COLUMN "{name}" {kind}' for name, kind in names.items() if name not in have)
        await connection.execute(f"ALTER TABLE {table} {added}")
        failed = {}
        for query in all_names():
            try:
                await connection.prepare(statement(query).text)
            except asyncpg.PostgresError as error:
                failed[query] = str(error)
        assert failed == {}
    finally:
        await connection.close()


async def outcome(connection: asyncpg.Connection, prepared: PreparedStatement[Any]) -> str:
    """Executes a statement that was prepared, with nothing in it, and undoes it; says how it ended.

    Before it runs, PostgreSQL looks whether its plan still holds.
    """
    nothing: list[list[object] | None] = [
        [] if parameter.kind == "array" else None for parameter in prepared.get_parameters()
    ]
    transaction = connection.transaction()
    await transaction.start()
    try:
        await prepared.fetch(*nothing)
        return "rows"
    except asyncpg.IntegrityConstraintViolationError as error:
        return type(error).__name__
    finally:
        await transaction.rollback()


async def test_a_prepared_statement_goes_on_when_columns_are_added(database_url: str) -> None:
    """None returns whatever a table happens to have: its plan would be refused."""
    connection = await asyncpg.connect(database_url, server_settings=SESSION_SETTINGS)
    try:
        prepared = {query: await connection.prepare(statement(query).text) for query in all_names()}
        columns = {query: [str(a) for a in one.get_attributes()] for query, one in prepared.items()}
        outcomes = {query: await outcome(connection, one) for query, one in prepared.items()}
        assert {"rows", "NotNullViolationError"} <= set(outcomes.values())
        for table in tables.metadata.tables:
            await connection.execute(f"ALTER TABLE {table} ADD COLUMN next_text text NOT NULL DEFAULT 'as before'")
        for query, one in prepared.items():
            assert await outcome(connection, one) == outcomes[query], query
            again = await connection.prepare(statement(query).text + " ")
            assert [str(a) for a in again.get_attributes()] == columns[query], query
    finally:
        await connection.close()


async def test_a_partition_made_later_has_what_its_table_has(database_url: str) -> None:
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute(
            "ALTER TABLE job ADD COLUMN next_text text NOT NULL DEFAULT 'as before', "
            "ADD COLUMN doubled int GENERATED ALWAYS AS (priority * 2) STORED, "
            "ADD CONSTRAINT next_check CHECK (priority < 100000), ALTER spec SET STORAGE EXTERNAL"
        )
        later = await connection.fetchval("SELECT now() + interval '30 days'")
        assert await ensure_partitions(connection, later) > 0
        odd = await connection.fetch(
            "SELECT p.inhrelid::regclass, a.attname FROM pg_inherits AS p "
            "JOIN pg_attribute AS a ON a.attrelid = p.inhparent AND a.attnum > 0 AND NOT a.attisdropped "
            "LEFT JOIN pg_attribute AS own ON own.attrelid = p.inhrelid AND own.attname = a.attname "
            "WHERE p.inhparent = 'job'::regclass AND (own.atttypid, own.attnotnull, own.attstorage, own.attgenerated) "
            "IS DISTINCT FROM (a.atttypid, a.attnotnull, a.attstorage, a.attgenerated)"
        )
        # Storage is a setting of each partition: one of before keeps what it had.
        made = [row for row in odd if row["inhrelid"] > f"job_{later:%Y%m%d}"]
        assert made == []
    finally:
        await connection.close()
