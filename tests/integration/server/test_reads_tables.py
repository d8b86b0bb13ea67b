"""The Core tables are those of the migrated database."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, inspect
from sqlalchemy.dialects import postgresql

from lessor_server.store import tables
from lessor_server.store.database import Database


async def test_tables_are_those_of_the_migrated_database(database: Database) -> None:
    def columns(connection: Connection) -> dict[str, dict[str, tuple[Any, bool]]]:
        inspector = inspect(connection)
        parents = {n for n in inspector.get_table_names() if not n[-8:].isdigit() and n != "alembic_version"}
        found = {}
        for name in parents:
            listed = connection.exec_driver_sql(
                "SELECT attname, format_type(atttypid, NULL), attnotnull FROM pg_attribute "
                "WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped",
                (name,),
            )
            found[name] = {row[0]: (row[1], not row[2]) for row in listed}
        return found

    async with database.read() as connection:
        migrated = await connection.run_sync(columns)

    names = {"INTEGER": "integer", "BIGINT": "bigint", "SMALLINT": "smallint"}

    def type_name(column: Any) -> str:
        text = str(column.type.compile(dialect=postgresql.dialect()))
        base = text.removesuffix("[]").lower()
        return names.get(base.upper(), base) + ("[]" if text.endswith("[]") else "")

    declared = {
        table.name: {column.name: (type_name(column), column.nullable) for column in table.columns}
        for table in tables.metadata.tables.values()
    }
    assert declared == migrated


async def test_a_transaction_id_round_trips(database: Database) -> None:
    from sqlalchemy import bindparam, select

    query = select(bindparam("xid", type_=tables.Xid8()).label("xid"))
    async with database.read() as connection:
        assert (await connection.execute(query, {"xid": 2**40})).scalar_one() == 2**40
