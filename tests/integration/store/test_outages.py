"""The database goes away for five seconds, a minute, ten minutes, or its host vanishes without a word."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy

from lessor import timing
from lessor.lifecycle import LeasePhase
from lessor_server.bells import Bells
from lessor_server.domain.errors import DatabaseUnavailable
from lessor_server.maintenance.leadership import Leadership
from lessor_server.maintenance.reaper import Reaper
from lessor_server.store import database as connections
from lessor_server.store.database import Database
from lessor_server.store.hello import Answer, Held, take_standing
from lessor_server.store.partitions import lease_bounds, roll_lease_numbers
from lessor_server.store.reports import Verdict
from tests.support.postgres_proxy import Fate, PostgresProxy
from tests.support.store import Leased, Store, at, succeeded

JOBS = 20


@pytest.fixture
async def proxy(store: Store) -> AsyncIterator[PostgresProxy]:
    async with PostgresProxy(store.database.url) as made:
        yield made


async def running_jobs(store: Store) -> list[Leased]:
    session = await store.hello()
    leases = await store.claim(await store.submit(JOBS), session)
    await store.database.pool.execute("UPDATE lease SET phase = 3, started_at = now()")
    return leases


@pytest.mark.parametrize("away_s", [5, 60, 600])
async def test_no_lease_is_lost_to_an_outage_and_its_ends_are_taken_after_it(
    store: Store, proxy: PostgresProxy, away_s: int
) -> None:
    leases = await running_jobs(store)
    await store.database.fetch("resign", epoch=store.epoch)
    clock = [0.0]
    database = await Database.connect(proxy.url)
    leader = Leadership(database, "one", lambda: clock[0])
    reaper = Reaper(database, leader, Bells())
    await leader.step()
    proxy.go_away()
    steps_s = 0.25 if away_s < 600 else 2.5
    for _ in range(int(away_s / steps_s)):
        clock[0] += steps_s
        await leader.step()
        with pytest.raises(DatabaseUnavailable):
            await reaper.step()
    assert leader.epoch is not None, "an outage of the database is not a loss of the lead"
    assert await store.value("SELECT clock FROM leader") == 0
    proxy.come_back()
    # Some time passes before the agent is back: less than a ttl.
    for _ in range(160):
        clock[0] += 0.25
        await leader.step()
        await reaper.step()
    assert await store.value("SELECT clock FROM leader") == 40_000
    assert await store.value("SELECT count(*) FROM attempt") == 0
    old = leases[0].session
    session = await store.hello(session_id=old.session_id)
    assert session.resumed
    held = [Held(lease.job, lease.lease_id, LeasePhase.RUNNING) for lease in leases]
    standing = await take_standing(store.database, "agent-one", session, held)
    assert {answer.decision for answer in standing.answers} == {Answer.KEEP}
    said = [store.said(Leased(lease.job, lease.lease_id, session, "agent-one"), succeeded()) for lease in leases]
    assert (await store.commit(said)).verdicts == [Verdict.RECORDED] * JOBS
    attempts = await store.database.pool.fetch("SELECT attempt, outcome, losses FROM attempt")
    assert {tuple(row) for row in attempts} == {(1, 1, 0)}
    assert len(attempts) == JOBS
    await database.close()


async def test_two_replicas_come_out_of_an_outage_with_one_leader(store: Store, proxy: PostgresProxy) -> None:
    await store.database.fetch("resign", epoch=store.epoch)
    clock = [0.0]
    database = await Database.connect(proxy.url)
    one, two = (Leadership(database, name, lambda: clock[0]) for name in ("one", "two"))
    await one.step()
    await two.step()
    first_term = one.epoch
    proxy.go_away()
    for _ in range(40):
        clock[0] += 0.25
        await one.step()
        await two.step()
    proxy.come_back()
    # The follower may be the first to get through, with a beat it has not seen move for ten seconds.
    await two.step()
    await one.step()
    clock[0] += 0.25
    await one.step()
    await two.step()
    leaders = [replica for replica in (one, two) if replica.epoch is not None]
    assert len(leaders) == 1
    (row,) = await store.database.fetch("read_leader")
    assert row["epoch"] == leaders[0].epoch
    assert first_term is not None
    assert row["epoch"] in (first_term, first_term + 1)
    assert row["clock"] <= 250, "whoever leads, the outage did not age a lease"
    await database.close()


async def test_connections_whose_host_vanished_are_given_up_all_at_once(
    store: Store, proxy: PostgresProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No reset, no answer: a renewal must not wait for as long as a ttl, nor find each dead connection by itself."""
    longest_wait = timedelta(seconds=2 * connections.SHORT_TIMEOUT_S)
    assert longest_wait <= timing.longest_heartbeat(timing.DEFAULT_TTL)
    lease = await store.running()
    await store.set_clock(5000)
    database = await Database.connect(proxy.url)
    renewal = {"session_ids": [lease.session.session_id], "epochs": [lease.session.epoch]}
    # All of the vital connections are open.
    await asyncio.gather(*(database.fetch("renew", **renewal) for _ in range(2 * connections.VITAL_CONNECTIONS)))
    # And some of each other kind.
    await asyncio.gather(*(each for _ in range(3) for each in every_other_way(database)))
    proxy.freeze()
    with monkeypatch.context() as patch:
        patch.setattr(connections, "SHORT_TIMEOUT_S", 0.2)
        with pytest.raises(DatabaseUnavailable):
            await database.fetch("renew", **renewal)
    rows = await database.fetch("renew", **renewal)
    assert [row["id"] for row in rows] == [lease.session.session_id], "the next one does not meet a dead connection"
    async with asyncio.timeout(30):
        await asyncio.gather(*(each for _ in range(3) for each in every_other_way(database)))
    proxy.go_away()
    await database.close()


def every_other_way(database: Database) -> list[Coroutine[Any, Any, object]]:
    """Statements on each of the pools that keep no lease alive: a Hello among them must not wait for a minute."""

    async def transaction() -> None:
        async with database.transaction() as transaction:
            await transaction.fetch("read_leader")

    async def read() -> None:
        async with database.read() as connection:
            await connection.execute(sqlalchemy.text("SELECT 1"))

    return [database.query("SELECT 1"), database.look("SELECT 1"), transaction(), read()]


async def test_a_server_stopped_while_it_moves_the_lease_numbers_holds_nothing(
    store: Store, proxy: PostgresProxy
) -> None:
    """What moves them locks the row of the leader; a process that is stopped halfway must not keep it locked."""
    tomorrow = at("2100-01-01T00:00:00+00:00")
    database = await Database.connect(proxy.url)
    async with database.pool.acquire() as connection:
        # In a transaction of several statements, this would be the second one.
        proxy.expect("lease_number", Fate.HOLD)
        moving = asyncio.create_task(roll_lease_numbers(connection, tomorrow))
        await proxy.happened.wait()
        async with asyncio.timeout(5):
            await store.lead("another")
        proxy.release()
        await moving
    first, _ = lease_bounds((tomorrow - at("1970-01-01T00:00:00+00:00")).days)
    assert await store.value("SELECT last_value FROM lease_number") == first
    await database.close()


async def test_numbers_moved_by_two_at_once_are_moved_once(store: Store) -> None:
    tomorrow = at("2100-01-01T00:00:00+00:00")
    async with store.database.pool.acquire() as one, store.database.pool.acquire() as two:
        await asyncio.gather(roll_lease_numbers(one, tomorrow), roll_lease_numbers(two, tomorrow))
        before = await store.value("SELECT nextval('lease_number')")
        await roll_lease_numbers(one, tomorrow)
        assert await store.value("SELECT nextval('lease_number')") == before + 1
