"""Reads that a cancelled caller cannot cut off.

A stream handler is cancelled whenever its client goes away. Were the read it
waits for cancelled with it, its connection would be left in the middle of an
answer; so every read runs in a task of its own, to its end.

A statement over all partitions opens every one of them at each execution, and
takes a hundred times as long to plan as to run; and it is planned again after
each vacuum. What is asked by number is therefore asked of single days
(:func:`rows_by_day`), and what is walked, of spans of days (:func:`rows_within`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, TypeAlias, TypeVar

import asyncpg
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    CompoundSelect,
    Executable,
    Row,
    Select,
    and_,
    any_,
    bindparam,
    literal_column,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.dialects.postgresql import asyncpg as asyncpg_dialect

from lessor_server.store.database import Database

T = TypeVar("T")
Rows: TypeAlias = Sequence[Row[*tuple[Any, ...]]]
Query: TypeAlias = Select[Any] | CompoundSelect[Any]

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
def _compiled(query: Query) -> tuple[str, tuple[str, ...], Mapping[str, Any]]:
    """Returns a statement as asyncpg takes it, the names of $1, $2, …, and its constants; made once per statement."""
    compiled = query.compile(dialect=_DIALECT)
    return str(compiled), tuple(compiled.positiontup or ()), compiled.params


def _bound(query: Query, parameters: Mapping[str, Any] | None) -> tuple[str, list[Any]]:
    """Returns a statement as asyncpg takes it, and the values of $1, $2, …"""
    text, names, constants = _compiled(query)
    values = {**constants, **(parameters or {})}
    return text, [values[name] for name in names]


async def plain_rows(
    database: Database, query: Select[Any], parameters: Mapping[str, Any] | None = None
) -> list[asyncpg.Record]:
    """Returns the rows of one statement as :func:`rows` does, without SQLAlchemy's work per row and call.

    For what runs in every planning cycle. ``query`` must be made once and kept.

    Raises:
        DatabaseUnavailable: The connection failed.
    """
    text, arguments = _bound(query, parameters)
    return await undisturbed(database.query(text, *arguments))


async def read_rows(
    database: Database, query: Query, parameters: Mapping[str, Any] | None = None
) -> list[asyncpg.Record]:
    """Returns the rows of one statement as :func:`plain_rows` does, on the connections that are kept for reads.

    Values of jsonb are given as JSON text.

    Raises:
        DatabaseUnavailable: The connection failed.
    """
    text, arguments = _bound(query, parameters)
    return await undisturbed(database.look(text, *arguments))


# ---------------------------------------------------------------- of some days

MAX_DAYS = 4
"""Numbers of more days than this are asked for in one statement over all partitions."""

Within: TypeAlias = Callable[[ColumnElement[int]], ColumnElement[bool]]
"""Bounds of a column by which a table is partitioned."""

_FIRST, _BEYOND = "FIRST_NUMBER", "NUMBER_BEYOND"


def of_some_days(column: ColumnElement[int]) -> ColumnElement[bool]:
    """Bounds that are filled in as literals: the plan is made for the partitions of these days alone."""
    return and_(column >= literal_column(_FIRST, BigInteger), column < literal_column(_BEYOND, BigInteger))


def of_any_day(column: ColumnElement[int]) -> ColumnElement[bool]:
    """Bounds that are parameters: partitions beyond the numbers asked for are left out, late and one by one."""
    return and_(
        column >= bindparam("lowest", type_=BigInteger),
        column <= bindparam("highest", type_=BigInteger),
    )


def asked_for(column: ColumnElement[int]) -> ColumnElement[bool]:
    """The numbers asked for; bounds must stand beside it, for Postgres leaves out no partition by an array."""
    return column == any_(bindparam("numbers", type_=ARRAY(BigInteger)))


@lru_cache(maxsize=1000)
def _text_within(text: str, first: int, beyond: int) -> str:
    return text.replace(_BEYOND, str(beyond)).replace(_FIRST, str(first))


async def rows_within(
    database: Database, query: Query, parameters: Mapping[str, Any], first: int, beyond: int
) -> list[asyncpg.Record]:
    """Returns the rows of a statement whose bounds are :func:`of_some_days`: the numbers from ``first`` to ``beyond``.

    Raises:
        DatabaseUnavailable: The connection failed.
    """
    text, arguments = _bound(query, parameters)
    return await undisturbed(database.look(_text_within(text, first, beyond), *arguments))


async def rows_by_day(
    database: Database,
    query: Callable[[Within], Query],
    numbers: Iterable[int],
    day_of: Callable[[int], int],
    bounds: Callable[[int], tuple[int, int]],
    *,
    max_days: int = MAX_DAYS,
) -> list[asyncpg.Record]:
    """Returns the rows that a statement finds for each of ``numbers``: one snapshot per day.

    Args:
        database: The store.
        query: Makes the statement for :func:`of_some_days` or :func:`of_any_day`, each once; it asks for
            what is :func:`asked_for`.
        numbers: Of jobs, or of leases.
        day_of: The day of a number's partition.
        bounds: The first number of a day and of the day after.
        max_days: Numbers of more days come from one snapshot, more slowly.

    Raises:
        DatabaseUnavailable: The connection failed.
    """
    days: dict[int, list[int]] = {}
    for number in sorted(set(numbers)):
        days.setdefault(day_of(number), []).append(number)
    if len(days) > max_days:
        every = [number for line in days.values() for number in line]
        return await read_rows(
            database, query(of_any_day), {"numbers": every, "lowest": every[0], "highest": every[-1]}
        )
    found: list[asyncpg.Record] = []
    for day, line in days.items():
        found += await rows_within(database, query(of_some_days), {"numbers": line}, *bounds(day))
    return found


async def rows(database: Database, query: Executable, parameters: Mapping[str, Any] | None = None) -> Rows:
    """Returns the rows of one statement: one snapshot, one round trip.

    Raises:
        DatabaseUnavailable: The connection failed.
    """

    async def read() -> Rows:
        async with database.read() as connection:
            return (await connection.execute(query, parameters)).all()

    return await undisturbed(read())
