"""What the harness's watch over the database's history reports, and what it lets pass."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.chaos import audit
from tests.support.store import Store, open_store, succeeded

pytestmark = pytest.mark.integration


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    """A store on a fresh database that is watched."""
    async with open_store(database_url) as made:
        await made.database.pool.execute(audit.WATCH)
        yield made


async def reports(store: Store) -> list[str]:
    return [row["text"] for row in await store.database.pool.fetch(audit.REPORTS)]


async def test_an_ordinary_life_is_not_reported(store: Store) -> None:
    ended, lost = await store.running(), await store.running()
    await store.report(ended, succeeded())
    await store.set_clock(3_600_000)
    assert await store.expire()
    assert await store.where(lost.job) == "ready"
    # The late end takes the loss back: an attempt that was not the last one.
    await store.report(lost, succeeded())
    assert await store.where(lost.job) == "SUCCEEDED"
    assert await reports(store) == []


async def test_a_terminal_row_that_changes_is_reported(store: Store) -> None:
    lease = await store.running()
    await store.report(lease, succeeded())
    await store.database.pool.execute("UPDATE attempt SET exit_code = 1")
    await store.database.pool.execute("DELETE FROM attempt")
    changed, deleted = await reports(store)
    assert changed == f"job {lease.job}: its end with lease {lease.lease_id} was taken back (UPDATE)"
    assert deleted.endswith("(DELETE)")


async def test_a_lease_expired_beside_a_renewal_is_reported(store: Store) -> None:
    lease = await store.running()
    # As if the renewal had come between the look for what is overdue and the end of the lease.
    await store.database.pool.execute(
        """
        WITH over AS (DELETE FROM lease RETURNING *)
        INSERT INTO attempt (job_id, lease_id, attempt, agent_id, gpu_uuids, outcome, signal, error, failures, losses,
            ended_at, log_bytes)
        SELECT job_id, lease_id, attempt, agent_id, gpu_uuids, 6, 0, 'LEASE_EXPIRED', 0, 1, now(), 0 FROM over
        """
    )
    (told,) = await reports(store)
    assert told.startswith(f"lease {lease.lease_id} was expired at ")
