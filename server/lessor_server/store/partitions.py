"""Partitions: made ahead of time, dropped by age.

``job`` and ``attempt`` are cut by job number, whose upper bits are the time of
the submit in milliseconds, one partition per UTC day. The tables of logs and
progress are cut by lease number: each day has its own range of 2**32 numbers,
and the lease sequence is moved to the day's range by the first statement of
that day, so that a chunk sent again after midnight meets its first copy.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg

DAYS_AHEAD = 7
_MS_PER_DAY = 86_400_000
_JOB_SHIFT = 21
_LEASE_SHIFT = 32

BY_JOB = ("job", "attempt")
BY_LEASE = ("progress", "log_head", "log_chunk")


def day_of(at: datetime) -> int:
    """Returns the UTC day of ``at``, counted from 1970-01-01."""
    return int(at.timestamp() * 1000) // _MS_PER_DAY


def job_bounds(day: int) -> tuple[int, int]:
    """Returns the first job number of ``day`` and of the day after."""
    return (day * _MS_PER_DAY) << _JOB_SHIFT, ((day + 1) * _MS_PER_DAY) << _JOB_SHIFT


def lease_bounds(day: int) -> tuple[int, int]:
    """Returns the first lease number of ``day`` and of the day after."""
    return day << _LEASE_SHIFT, (day + 1) << _LEASE_SHIFT


def lease_number_at(at: datetime) -> int:
    """Returns the lease number that stands for ``at`` when a day's range is spread evenly over the day.

    The numbers handed out by then are below it, for each day begins at the start of its
    range: up to 2**32 a day, 49,710 leases a second.
    """
    return (int(at.timestamp() * 1000) << _LEASE_SHIFT) // _MS_PER_DAY


def day_of_job(number: int) -> int:
    """Returns the UTC day of the submit of job ``number``: the day of its partition."""
    return (number >> _JOB_SHIFT) // _MS_PER_DAY


def day_of_lease(lease_id: int) -> int:
    """Returns the day of the partition that holds what belongs to a lease."""
    return lease_id >> _LEASE_SHIFT


def submitted_at(job_number: int) -> datetime:
    """Returns when the job of that number was submitted (millisecond resolution)."""
    return datetime.fromtimestamp((job_number >> _JOB_SHIFT) / 1000, UTC)


def first_job_at(at: datetime) -> int:
    """Returns the least job number that a submit at ``at`` can get."""
    return int(at.timestamp() * 1000) << _JOB_SHIFT


def partition_name(table: str, day: int) -> str:
    """Returns the name of a table's partition of ``day``: ``job_20260131``."""
    return f"{table}_{datetime.fromtimestamp(day * 86_400, UTC):%Y%m%d}"


async def ensure_partitions(connection: asyncpg.Connection | Any, now: datetime | None = None) -> int:
    """Makes the partitions from yesterday to a week ahead; returns how many were missing.

    Each is built apart and then attached, under a short lock timeout: nothing
    queues behind it. Safe to run twice at once. ``now`` defaults to the
    database's clock.
    """
    now = now or await connection.fetchval("SELECT now()")
    today = day_of(now)
    made = 0
    for day in range(today - 1, today + DAYS_AHEAD + 1):
        for tables, bounds in ((BY_JOB, job_bounds(day)), (BY_LEASE, lease_bounds(day))):
            for table in tables:
                made += await _ensure(connection, table, day, bounds)
    await roll_lease_numbers(connection, now)
    return made


async def _ensure(connection: asyncpg.Connection | Any, table: str, day: int, bounds: tuple[int, int]) -> bool:
    name = partition_name(table, day)
    attached = await connection.fetchval(
        "SELECT EXISTS (SELECT FROM pg_inherits WHERE inhrelid = to_regclass($1) AND inhparent = to_regclass($2))",
        name,
        table,
    )
    if attached:
        return False
    async with connection.transaction():
        await connection.execute("SET LOCAL lock_timeout = '2s'")
        # Serialises two replicas that find the same partition missing.
        await connection.execute("SELECT pg_advisory_xact_lock(hashtext($1))", name)
        # Not asked for by to_regclass: it may still see the catalogue as it was before we waited for that lock.
        # With whatever a newer schema may have given the table. Its indexes come with the attaching.
        await connection.execute(
            f"CREATE TABLE IF NOT EXISTS {name} (LIKE {table} INCLUDING DEFAULTS INCLUDING CONSTRAINTS "
            "INCLUDING GENERATED INCLUDING STORAGE INCLUDING COMPRESSION)"
        )
        already = await connection.fetchval(
            "SELECT EXISTS (SELECT FROM pg_inherits WHERE inhrelid = to_regclass($1))", name
        )
        if not already:
            await connection.execute(
                f"ALTER TABLE {table} ATTACH PARTITION {name} FOR VALUES FROM ({bounds[0]}) TO ({bounds[1]})"
            )
    return not already


async def roll_lease_numbers(connection: asyncpg.Connection | Any, now: datetime | None = None) -> None:
    """Moves the lease sequence into today's range, if it is not there yet.

    The row of ``leader`` is locked meanwhile: no claim draws a number between
    the look and the move, and two replicas cannot move it to the same place
    twice. The sequence only grows.
    """
    now = now or await connection.fetchval("SELECT now()")
    first, _ = lease_bounds(day_of(now))
    # One message, not a transaction of several: a process that is stopped between two of
    # them would hold the row, and nobody could take the lead from it.
    await connection.execute(
        f"""
        DO $$ BEGIN
            PERFORM FROM leader FOR UPDATE;
            IF (SELECT last_value FROM lease_number) < {first} THEN
                PERFORM setval('lease_number', {first});
            END IF;
        END $$
        """
    )


async def expired_partitions(
    connection: asyncpg.Connection | Any, keep: timedelta, now: datetime | None = None
) -> list[list[tuple[str, str]]]:
    """Returns the days that ended longer than ``keep`` ago and that nothing points into.

    Each is the (table, partition) pairs of tables that belong together, in the order to drop them.
    A day is kept while a job of it waits or runs, or a dedupe key names a job
    of it; logs are kept while a lease of their day stands. A partition whose
    drop was cut short is listed again, detached or not.
    """
    now = now or await connection.fetchval("SELECT now()")
    oldest_kept = day_of(now - keep)
    found = []
    for tables, live in ((BY_JOB, _LIVE_JOBS), (BY_LEASE, _LIVE_LEASES)):
        days: dict[int, list[tuple[str, str]]] = {}
        for table in tables:
            for day in await _days(connection, table):
                days.setdefault(day, []).append((table, partition_name(table, day)))
        for day in sorted(days):
            low, high = job_bounds(day) if tables is BY_JOB else lease_bounds(day)
            if day < oldest_kept and not await connection.fetchval(live, low, high):
                found.append(days[day])
    return found


_LIVE_JOBS = """
SELECT EXISTS (SELECT FROM ready WHERE job_id >= $1 AND job_id < $2)
    OR EXISTS (SELECT FROM delayed WHERE job_id >= $1 AND job_id < $2)
    OR EXISTS (SELECT FROM lease WHERE job_id >= $1 AND job_id < $2)
    OR EXISTS (SELECT FROM dedupe WHERE job_id >= $1 AND job_id < $2)
"""
_LIVE_LEASES = "SELECT EXISTS (SELECT FROM lease WHERE lease_id >= $1 AND lease_id < $2)"


async def _days(connection: asyncpg.Connection | Any, table: str) -> list[int]:
    """Returns the days a table has partitions of, found by name: one that is detached and not dropped counts."""
    rows = await connection.fetch(
        "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = current_schema()::regnamespace "
        "AND relname ~ ('^' || $1 || '_[0-9]{8}$') ORDER BY relname",
        table,
    )
    dates = [datetime.strptime(row["relname"].rsplit("_", 1)[1], "%Y%m%d").replace(tzinfo=UTC) for row in rows]
    return [day_of(date) for date in dates]


async def drop_partition(connection: asyncpg.Connection | Any, table: str, partition: str) -> None:
    """Detaches one partition without blocking anyone, then drops it.

    Raises:
        asyncpg.LockNotAvailableError: A reader stood in the way; try again later.
    """
    await connection.execute("SET lock_timeout = '2s'")
    try:
        # One of this table whose detach was cut short stands in the way of any other.
        for row in await connection.fetch(
            "SELECT inhrelid::regclass::text AS name FROM pg_inherits "
            "WHERE inhparent = to_regclass($1) AND inhdetachpending AND inhrelid <> to_regclass($2)",
            table,
            partition,
        ):
            await connection.execute(f"ALTER TABLE {table} DETACH PARTITION {row['name']} FINALIZE")
        pending = await connection.fetchval(
            "SELECT inhdetachpending FROM pg_inherits WHERE inhrelid = to_regclass($1)", partition
        )
        if pending is not None:
            how = "FINALIZE" if pending else "CONCURRENTLY"
            await connection.execute(f"ALTER TABLE {table} DETACH PARTITION {partition} {how}")
        await connection.execute(f"DROP TABLE IF EXISTS {partition}")
    finally:
        await connection.execute("RESET lock_timeout")
