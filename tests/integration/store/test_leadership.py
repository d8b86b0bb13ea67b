"""Leadership and lease time, on a clock the test turns."""

from __future__ import annotations

import pytest

from lessor import timing
from lessor_server.maintenance.leadership import Leadership
from lessor_server.store.database import Database
from tests.support.store import Store


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


async def fresh(store: Store, name: str, clock: Clock) -> Leadership:
    return Leadership(store.database, name, clock)


async def resigned(store: Store) -> None:
    await store.database.fetch("resign", epoch=store.epoch)


async def test_a_vacant_place_is_taken_at_once(store: Store) -> None:
    await resigned(store)
    one = await fresh(store, "one", Clock())
    await one.step()
    assert one.epoch is not None
    assert one.gained.is_set()


async def test_a_silent_leader_is_replaced_after_1500_ms_and_finds_out(store: Store) -> None:
    await resigned(store)
    clock = Clock()
    one, two = await fresh(store, "one", clock), await fresh(store, "two", clock)
    await one.step()
    await two.step()
    clock.now_s += 1.499
    await two.step()
    assert two.epoch is None
    clock.now_s += 0.001
    await two.step()
    assert two.epoch is not None
    await one.step()
    assert one.epoch is None
    assert not one.gained.is_set()


async def test_a_leader_that_ticks_is_not_replaced(store: Store) -> None:
    await resigned(store)
    clock = Clock()
    one, two = await fresh(store, "one", clock), await fresh(store, "two", clock)
    for _ in range(40):
        await one.step()
        await two.step()
        clock.now_s += 0.25
    assert (one.epoch is not None, two.epoch) == (True, None)


async def test_lease_time_is_what_passed_while_somebody_led_a_second_a_tick_at_most(store: Store) -> None:
    await resigned(store)
    clock = Clock()
    one = await fresh(store, "one", clock)
    await one.step()
    assert one.clock_ms == 0
    clock.now_s += 0.25
    await one.step()
    assert one.clock_ms == 250
    clock.now_s += 3600
    await one.step()
    assert one.clock_ms == 1250
    clock.now_s += 3600
    two = await fresh(store, "two", clock)
    await two.step()
    clock.now_s += 2
    await two.step()
    assert two.clock_ms == 1250, "the first tick of a term adds nothing"


async def test_time_of_a_failed_tick_is_not_counted(store: Store) -> None:
    await resigned(store)
    clock = Clock()
    database = await Database.connect(store.database.url)
    one = Leadership(database, "one", clock)
    await one.step()
    await database.close()
    clock.now_s += 0.9
    await one.step()
    assert one.clock_ms == 0
    assert one.epoch is not None, "an outage of the database is not a loss of the lead"


async def test_a_new_term_shuts_out_a_claim_of_the_old(store: Store) -> None:
    await resigned(store)
    one = await fresh(store, "one", Clock())
    await one.step()
    old = one.epoch
    assert old is not None
    await one.renew_term()
    assert one.epoch == old + 1
    session = await store.hello()
    (job,) = await store.submit()
    assert await store.claim([job], session, epoch=old) == []
    assert len(await store.claim([job], session, epoch=one.epoch)) == 1


async def test_a_leader_that_resigns_is_followed_at_once(store: Store) -> None:
    await resigned(store)
    clock = Clock()
    one, two = await fresh(store, "one", clock), await fresh(store, "two", clock)
    await one.step()
    await two.step()
    await one.resign()
    await two.step()
    assert two.epoch is not None


async def test_a_follower_looks_sooner_when_the_leaders_time_is_nearly_up(store: Store) -> None:
    """Or a take-over would take up to a tick longer than it must."""
    clock = Clock()
    candidate = await fresh(store, "candidate", clock)
    tick_s = timing.LEADER_TICK.total_seconds()
    assert candidate.rest_s() == tick_s
    await candidate.step()
    assert candidate.rest_s() == tick_s
    clock.now_s += timing.LEADER_TAKEOVER.total_seconds() - 0.1
    assert candidate.rest_s() == pytest.approx(0.1)
    clock.now_s += 0.0995
    assert candidate.rest_s() == pytest.approx(0.01)
    # What has not succeeded yet, because the database is away, is tried at the usual pace.
    clock.now_s += 10
    assert candidate.rest_s() == tick_s
    await candidate.step()
    assert candidate.rest_s() == tick_s
