"""Partitions: made ahead, cut at midnight UTC, dropped by age and only when nothing points into them."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from lessor_server.store.logs import Chunk, append
from lessor_server.store.partitions import (
    day_of,
    drop_partition,
    ensure_partitions,
    expired_partitions,
    job_bounds,
    lease_bounds,
    partition_name,
    roll_lease_numbers,
    submitted_at,
)
from lessor_server.store.statements import statement
from tests.support.races import overtake
from tests.support.store import Store, succeeded

MIDNIGHT = datetime(2031, 5, 17, tzinfo=UTC)


async def names(pool: asyncpg.Pool, table: str) -> set[str]:
    rows = await pool.fetch(
        "SELECT inhrelid::regclass::text AS name FROM pg_inherits WHERE inhparent = $1::regclass", table
    )
    return {row["name"] for row in rows}


async def test_days_are_made_ahead_once(pool: asyncpg.Pool) -> None:
    async with pool.acquire() as connection:
        assert await ensure_partitions(connection, MIDNIGHT) > 0
        assert await ensure_partitions(connection, MIDNIGHT) == 0
    assert {"job_20310516", "job_20310517", "job_20310524"} <= await names(pool, "job")


async def test_replicas_that_start_at_once_make_each_day_once(pool: asyncpg.Pool) -> None:
    async def start() -> int:
        async with pool.acquire() as connection:
            return await ensure_partitions(connection, MIDNIGHT)

    made = await asyncio.gather(*(start() for _ in range(8)))
    # Yesterday, today and a week ahead, five tables each.
    assert sum(made) == 9 * 5
    assert await pool.fetchval("SELECT last_value FROM lease_number") == lease_bounds(day_of(MIDNIGHT))[0]


async def test_a_job_of_the_last_millisecond_stands_in_its_day(store: Store) -> None:
    pool = store.database.pool
    async with pool.acquire() as connection:
        await ensure_partitions(connection, MIDNIGHT)
    before = await pool.fetchval("SELECT next_job_id($1)", MIDNIGHT - timedelta(milliseconds=1))
    after = await pool.fetchval("SELECT next_job_id($1)", MIDNIGHT)
    assert submitted_at(after) == MIDNIGHT
    low, high = job_bounds(day_of(MIDNIGHT))
    assert before < low <= after < high
    await store.submit()
    text = "INSERT INTO job SELECT $1, {} FROM job LIMIT 1 RETURNING tableoid::regclass::text"
    columns = (
        "queue_id, shape_id, priority, name, labels, spec, ttl_ms, start_timeout_ms, max_failures, max_losses, "
        "backoff_initial_ms, backoff_max_ms, dedupe_key, retry_of, submitted_at"
    )
    assert await pool.fetchval(text.format(columns), before) == "job_20310516"
    assert await pool.fetchval(text.format(columns), after) == "job_20310517"


async def test_each_day_has_its_range_of_lease_numbers(store: Store) -> None:
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    session = await store.hello()
    (today,) = await store.claim(await store.submit(), session)
    async with store.database.pool.acquire() as connection:
        await ensure_partitions(connection, tomorrow)
        await roll_lease_numbers(connection, tomorrow)
    (next_day,) = await store.claim(await store.submit(), session)
    low, high = lease_bounds(day_of(tomorrow))
    assert today.lease_id < low <= next_day.lease_id < high


async def test_a_chunk_sent_again_after_midnight_is_stored_once(store: Store) -> None:
    lease = await store.running()
    chunk = Chunk(lease.job, lease.lease_id, lease.agent_id, 0, 1, b"abc", datetime.now(UTC))
    await append(store.database, [chunk])
    async with store.database.pool.acquire() as connection:
        await roll_lease_numbers(connection, datetime.now(UTC) + timedelta(days=1))
    position = (await append(store.database, [chunk]))[lease.lease_id]
    assert position.end_offset == 3
    assert await store.value("SELECT count(*) FROM log_chunk") == 1


async def test_two_replicas_do_not_move_the_lease_numbers_to_one_place_twice(store: Store) -> None:
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    session = await store.hello()

    async def roll() -> None:
        async with store.database.pool.acquire() as connection:
            await roll_lease_numbers(connection, tomorrow)

    await overtake(store, lambda t: roll_lease_numbers(t.connection, tomorrow), roll)
    (first,) = await store.claim(await store.submit(), session)
    await roll()
    (second,) = await store.claim(await store.submit(), session)
    assert second.lease_id > first.lease_id


async def test_a_day_is_dropped_when_it_is_old_and_nothing_points_into_it(store: Store) -> None:
    pool = store.database.pool
    lease = await store.running()
    keep, later = timedelta(days=3), datetime.now(UTC) + timedelta(days=10)
    today = day_of(submitted_at(lease.job))

    async def expired() -> set[str]:
        async with pool.acquire() as connection:
            return {name for day in await expired_partitions(connection, keep, later) for _, name in day}

    assert partition_name("job", today) not in await expired(), "a job of that day runs"
    assert partition_name("log_chunk", today) not in await expired(), "a lease of that day stands"
    await store.report(lease, succeeded())
    assert {partition_name("job", today), partition_name("attempt", today)} <= await expired()
    async with pool.acquire() as connection:
        for day in await expired_partitions(connection, keep, later):
            for table, name in day:
                await drop_partition(connection, table, name)
    assert partition_name("job", today) not in await names(pool, "job")
    assert await pool.fetchval("SELECT count(*) FROM job") == 0


async def test_a_dedupe_key_keeps_the_day_of_its_job(store: Store) -> None:
    (job,) = await store.submit(dedupe_key="k")
    (lease,) = await store.claim([job], await store.hello())
    await store.report(lease, succeeded())
    async with store.database.pool.acquire() as connection:
        found = await expired_partitions(connection, timedelta(days=3), datetime.now(UTC) + timedelta(days=10))
    assert partition_name("job", day_of(submitted_at(job))) not in {name for day in found for _, name in day}


async def test_dropping_gives_way_to_a_reader_and_submits_go_on(store: Store) -> None:
    name = partition_name("job", day_of(datetime.now(UTC) - timedelta(days=1)))
    reader = await asyncpg.connect(store.database.url)
    try:
        async with reader.transaction():
            await reader.fetch(f"SELECT * FROM {name}")
            async with store.database.pool.acquire() as connection:
                with pytest.raises(asyncpg.LockNotAvailableError):
                    await drop_partition(connection, "job", name)
            assert len(await store.submit()) == 1
        async with store.database.pool.acquire() as connection:
            await drop_partition(connection, "job", name)
    finally:
        await reader.close()
    assert name not in await names(store.database.pool, "job")


def test_statements_name_their_parameters_once() -> None:
    claim = statement("claim")
    assert len(set(claim.parameters)) == len(claim.parameters)
    assert ":" not in claim.text.replace("::", "")
    with pytest.raises(KeyError):
        claim.arguments({"epoch": 1})
