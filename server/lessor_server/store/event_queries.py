"""Reads of ``event``: what changed, in the order in which it may be told.

Numbers are drawn before a transaction commits, so a row with a smaller number can
appear after a larger one was read. Only rows of transactions older than the
oldest one still running (the *horizon*) are read, in (xid, id) order: below it
nothing appears any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    Integer,
    Select,
    bindparam,
    exists,
    func,
    literal_column,
    select,
    text,
    true,
    tuple_,
)

from lessor_server.store import tables as t
from lessor_server.store.database import Database
from lessor_server.store.job_queries import progress_query
from lessor_server.store.partitions import day_of_lease, lease_bounds
from lessor_server.store.reads import asked_for, read_rows, rows, rows_by_day


class Position(NamedTuple):
    """Between two rows of ``event``: everything up to and with (xid, id) is before it. Positions sort as rows do."""

    xid: int
    id: int


@dataclass(frozen=True, slots=True)
class Event:
    """One row: the changes of one transaction. The three lists run in parallel."""

    position: Position
    at: datetime
    job_numbers: list[int]
    states: list[int]
    attempts: list[int]


@dataclass(frozen=True, slots=True)
class EventPage:
    """Rows after a position, and where that leaves the reader."""

    events: list[Event]
    reached: Position
    """Nothing at or before it will ever appear that is not in ``events`` or before the position asked for."""
    full: bool
    """There may be more that can be told now."""
    above: bool
    """There are rows at or above the horizon: look again soon."""
    floor: Position
    """Rows up to here may have been removed by retention."""
    horizon: int
    """The oldest transaction still running."""
    newest: int
    """Transactions from this xid on had not begun."""


@dataclass(frozen=True, slots=True)
class DatabaseIdentity:
    """Tells one database from another, a restored copy in another cluster included."""

    system: int
    oid: int


@dataclass(frozen=True, slots=True)
class ProgressRow:
    """The latest word of a lease."""

    job_number: int
    lease_id: int
    fraction: float | None
    message: str
    metrics: dict[str, float]
    updated_at: datetime


async def read_identity(database: Database) -> DatabaseIdentity:
    """Returns which database this is."""
    query = text(
        "SELECT system_identifier, (SELECT oid::bigint FROM pg_database WHERE datname = current_database()) "
        "FROM pg_control_system()"
    )
    (row,) = await rows(database, query)
    return DatabaseIdentity(row[0], row[1])


@cache
def events_query() -> Select[Any]:
    """The statement of :func:`read_events`; parameters xid, id, max_events. At least one row, perhaps of NULLs."""
    snapshot = func.pg_current_snapshot()
    horizon = (
        select(
            func.pg_snapshot_xmin(snapshot, type_=t.Xid8()).label("xmin"),
            func.pg_snapshot_xmax(snapshot, type_=t.Xid8()).label("xmax"),
            t.event_floor.c.xid.label("floor_xid"),
            t.event_floor.c.id.label("floor_id"),
        )
        .select_from(t.event_floor)
        .cte("horizon")
    )
    after = tuple_(bindparam("xid", type_=t.Xid8()), bindparam("id", type_=BigInteger))
    told = (
        select(t.event)
        .where(tuple_(t.event.c.xid, t.event.c.id) > after, t.event.c.xid < horizon.c.xmin)
        .order_by(t.event.c.xid, t.event.c.id)
        .limit(bindparam("max_events", type_=Integer))
        .lateral("told")
    )
    above = exists(select(literal_column("1")).select_from(t.event).where(t.event.c.xid >= horizon.c.xmin))
    return (
        select(
            horizon.c.xmin,
            horizon.c.xmax,
            horizon.c.floor_xid,
            horizon.c.floor_id,
            above.label("above"),
            told.c.xid,
            told.c.id,
            told.c.at,
            told.c.job_ids,
            told.c.states,
            told.c.attempts,
        )
        .select_from(horizon.outerjoin(told, true()))
        .order_by(told.c.xid, told.c.id)
    )


async def read_events(database: Database, after: Position, max_events: int) -> EventPage:
    """Returns the next rows after ``after`` that can be told, at most ``max_events`` (>= 1).

    Whoever reads must compare ``floor`` with the position it asked for: above
    it, rows may be missing.
    """
    found = await read_rows(database, events_query(), {"xid": after.xid, "id": after.id, "max_events": max_events})
    xmin, xmax, floor_xid, floor_id, above = tuple(found[0])[:5]
    events = [Event(Position(row[5], row[6]), *tuple(row)[7:]) for row in found if row[6] is not None]
    full = len(events) == max_events
    # No row has the number 0: (xmin, 0) is before everything that is still to come.
    reached = events[-1].position if full else max(after, Position(xmin, 0))
    return EventPage(events, reached, full, above, Position(floor_xid, floor_id), xmin, xmax)


@cache
def live_leases_query() -> Select[Any]:
    """The statement that finds the live leases of jobs; parameter numbers."""
    return select(t.lease.c.lease_id).where(asked_for(t.lease.c.job_id), t.lease.c.member == 0)


async def read_progress(database: Database, numbers: list[int], lease_ids: list[int]) -> list[ProgressRow]:
    """Returns the progress of the live leases of the jobs, and of ``lease_ids``, ended ones included."""
    live = await read_rows(database, live_leases_query(), {"numbers": numbers})
    known = [*lease_ids, *(row[0] for row in live)]
    found = await rows_by_day(database, progress_query, known, day_of_lease, lease_bounds)
    return [ProgressRow(*row) for row in found]
