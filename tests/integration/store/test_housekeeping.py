"""Housekeeping: what is old goes, whatever stood in the way the last time."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from lessor_server.maintenance.housekeeping import Housekeeping, Retention
from lessor_server.maintenance.leadership import Leadership
from lessor_server.store.partitions import day_of, partition_name, submitted_at
from tests.support.store import Store, succeeded

LATER = datetime.now(UTC) + timedelta(days=40)


@pytest.fixture
def housekeeping(store: Store) -> Housekeeping:
    retention = Retention(jobs=timedelta(days=30), agents=timedelta(days=30))
    leadership = Leadership(store.database, "test", time.monotonic)
    return Housekeeping(store.database, leadership, retention, LATER)


async def exists(store: Store, name: str) -> bool:
    return bool(await store.value("SELECT to_regclass($1) IS NOT NULL", name))


async def test_what_is_old_goes(store: Store, housekeeping: Housekeeping) -> None:
    (job,) = await store.submit(dedupe_key="k")
    (lease,) = await store.claim([job], await store.hello())
    await store.report(lease, succeeded())
    await housekeeping.step()
    day = day_of(submitted_at(job))
    for table in ("job", "attempt", "log_chunk", "progress"):
        assert not await exists(store, partition_name(table, day)), table
    for table in ("dedupe", "request", "event"):
        assert await store.value(f"SELECT count(*) FROM {table}") == 0, table
    assert await store.value("SELECT id FROM event_floor") > 0


async def test_what_lives_stays(store: Store, housekeeping: Housekeeping) -> None:
    lease = await store.running()
    (waiting,) = await store.submit()
    await housekeeping.step()
    assert await store.where(lease.job) == "lease"
    assert await store.where(waiting) == "ready"
    assert await store.value("SELECT count(*) FROM job") == 2
    assert await store.value("SELECT count(*) FROM agent") == 1


async def test_a_reader_in_the_way_only_delays(store: Store, housekeeping: Housekeeping) -> None:
    lease = await store.running()
    await store.report(lease, succeeded())
    day = day_of(submitted_at(lease.job))
    chunks = partition_name("log_chunk", day)
    reader = await asyncpg.connect(store.database.url)
    try:
        async with reader.transaction():
            await reader.fetch(f"SELECT * FROM {chunks}")
            await housekeeping.step()
            assert await exists(store, chunks)
            assert await store.value("SELECT count(*) FROM request") == 0, "the rest is done all the same"
    finally:
        await reader.close()
    await housekeeping.step()
    assert not await exists(store, chunks)
    assert not await exists(store, partition_name("job", day))


async def test_a_drop_cut_short_after_the_detach_is_finished(store: Store, housekeeping: Housekeeping) -> None:
    day = day_of(datetime.now(UTC))
    name = partition_name("attempt", day)
    await store.database.pool.execute(f"ALTER TABLE attempt DETACH PARTITION {name}")
    await housekeeping.step()
    assert not await exists(store, name)
