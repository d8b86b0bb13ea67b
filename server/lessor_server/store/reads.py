"""Reads that a cancelled caller cannot cut off.

A stream handler is cancelled whenever its client goes away. Were the read it
waits for cancelled with it, its connection would be left in the middle of an
answer; so every read runs in a task of its own, to its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias, TypeVar

import asyncpg
from sqlalchemy import Executable, Row, Select
from sqlalchemy.dialects.postgresql import asyncpg as asyncpg_dialect

from lessor_server.store.database import Database

T = TypeVar("T")
Rows: TypeAlias = Sequence[Row[*tuple[Any, ...]]]

_DIALECT = asyncpg_dialect.dialect()  # type: ignore[no-untyped-call]

# The loop itself keeps no task alive.
_running: set[asyncio.Task[Any]] = set()


async def undisturbed(work: Coroutine[Any, Any, T]) -> T:
    """Runs ``work`` to its end, even if the caller is cancelled; its error then goes to nobody.

    ``work`` must be bounded in time: statements are, by the pool's command timeout.
    """
    task = asyncio.ensure_future(work)
    _running.add(task)
    task.add_done_callback(_forget)
    return await asyncio.shield(task)


def _forget(task: asyncio.Task[Any]) -> None:
    _running.discard(task)
    if not task.cancelled():
        # Looked at, so that an error nobody waits for any more is not reported as never retrieved.
        task.exception()


@cache
def _compiled(query: Select[Any]) -> tuple[str, tuple[str, ...], Mapping[str, Any]]:
    """Returns a statement as asyncpg takes it, the names of $1, $2, …, and its constants; made once per statement."""
    compiled = query.compile(dialect=_DIALECT)
    return str(compiled), tuple(compiled.positiontup or ()), compiled.params


async def plain_rows(
    database: Database, query: Select[Any], parameters: Mapping[str, Any] | None = None
) -> list[asyncpg.Record]:
    """Returns the rows of one statement as :func:`rows` does, without SQLAlchemy's work per row and call.

    For what runs in every planning cycle. ``query`` must be made once and kept.

    Raises:
        DatabaseUnavailable: The connection failed.
    """
    text, names, constants = _compiled(query)
    values = {**constants, **(parameters or {})}
    arguments = [values[name] for name in names]
    return await undisturbed(database.query(text, *arguments))


async def rows(database: Database, query: Executable, parameters: Mapping[str, Any] | None = None) -> Rows:
    """Returns the rows of one statement: one snapshot, one round trip.

    Raises:
        DatabaseUnavailable: The connection failed.
    """

    async def read() -> Rows:
        async with database.read() as connection:
            return (await connection.execute(query, parameters)).all()

    return await undisturbed(read())
