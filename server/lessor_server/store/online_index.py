"""An index for a migration, built on a table that servers go on writing to.

``CREATE INDEX`` locks out writers for as long as it takes. ``CREATE INDEX
CONCURRENTLY`` does not, but runs in no transaction: cut off, it leaves an index that
is kept up to date and never used; and it knows no partitioned tables. This builds
one of either kind, and goes on where it was cut off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from alembic.operations import Operations
from sqlalchemy import Connection, text

_WAIT_FOR_OLD_SNAPSHOTS = "60s"
"""It has to wait until whoever saw the table before is done. Nobody waits behind it meanwhile."""


def build_index(op: Operations | Any, name: str, table: str, columns: str) -> None:
    """Builds an index that is not there, or that was left unfinished.

    Ends the transaction of the migration: call it first and alone there. Partitions
    that are made meanwhile and later get it, too.

    Args:
        op: ``alembic.op``.
        name: Of the index; on a partition it is followed by the partition's object number.
        table: An ordinary or a partitioned table.
        columns: What stands in its parentheses, and a ``WHERE`` after them: ``(job_id) WHERE kind > 3``.
    """
    with op.get_context().autocommit_block():
        connection: Connection = op.get_bind()
        if _value(connection, "SELECT relkind = 'p' FROM pg_class WHERE oid = CAST(:table AS regclass)", table=table):
            # Only an entry in the catalogue: it takes an instant, and is not valid before each partition has its own.
            connection.execute(text(f"CREATE INDEX IF NOT EXISTS {name} ON ONLY {table} {columns}"))
            _build_on_partitions(connection, name, table, columns)
        else:
            _build(connection, name, table, columns)


def _build_on_partitions(connection: Connection, name: str, table: str, columns: str) -> None:
    while missing := _partitions_without(connection, name, table):
        for number, partition in missing:
            own = f"{name}_{number}"
            _build(connection, own, partition, columns)
            connection.execute(text(f"ALTER INDEX {name} ATTACH PARTITION {own}"))


def _partitions_without(connection: Connection, name: str, table: str) -> list[tuple[int, str]]:
    rows = connection.execute(
        text(
            """
            SELECT CAST(p.inhrelid AS bigint), CAST(p.inhrelid::regclass AS text)
            FROM pg_inherits AS p
            WHERE p.inhparent = CAST(:table AS regclass) AND NOT p.inhdetachpending AND NOT EXISTS (
                SELECT FROM pg_inherits AS a JOIN pg_index AS i ON i.indexrelid = a.inhrelid
                WHERE a.inhparent = CAST(:name AS regclass) AND i.indrelid = p.inhrelid
            )
            ORDER BY p.inhrelid
            """
        ),
        {"table": table, "name": name},
    )
    return [(number, partition) for number, partition in rows]


def _build(connection: Connection, name: str, table: str, columns: str) -> None:
    with _long_waits(connection):
        if _value(connection, "SELECT NOT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:name)", name=name):
            connection.execute(text(f"DROP INDEX CONCURRENTLY IF EXISTS {name}"))
        connection.execute(text(f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {name} ON {table} {columns}"))


@contextmanager
def _long_waits(connection: Connection) -> Iterator[None]:
    """Lets a statement that keeps nobody waiting wait for long itself."""
    connection.execute(text(f"SET lock_timeout = '{_WAIT_FOR_OLD_SNAPSHOTS}'"))
    yield
    # Not after an error: the connection is closed then.
    connection.execute(text("RESET lock_timeout"))


def _value(connection: Connection, query: str, **parameters: str) -> Any:
    return connection.execute(text(query), parameters).scalar()
