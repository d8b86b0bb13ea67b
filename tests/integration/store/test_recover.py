"""A database that lost commits: what it would hand out again, and what a recovery leaves of that."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from lessor.lifecycle import LeasePhase
from lessor_server.domain.errors import DatabaseUnavailable, SchemaMismatch
from lessor_server.maintenance.leadership import Leadership
from lessor_server.store import recover as recovery
from lessor_server.store.database import SESSION_SETTINGS
from lessor_server.store.hello import Answer, Held, take_standing
from lessor_server.store.partitions import day_of_lease, ensure_partitions, lease_bounds, lease_number_at
from lessor_server.store.recover import RecoveryRefused, recover
from lessor_server.store.reports import Phase, Verdict
from tests.support.races import wait_until_blocked
from tests.support.store import Leased, Store, succeeded

SEQUENCES = ("lease_number", "job_number", "session_id_seq")


async def no_pause(seconds: float) -> None:
    """Does not wait."""


def meanwhile(act: Callable[[], Awaitable[object]]) -> Callable[[float], Awaitable[None]]:
    """A pause in which something happens."""

    async def pause(seconds: float) -> None:
        assert timedelta(seconds=seconds) == recovery.WATCH
        await act()

    return pause


async def snapshot(store: Store) -> dict[str, int]:
    return {name: await store.value(f"SELECT last_value FROM {name}") for name in SEQUENCES}


async def rewind(store: Store, numbers: dict[str, int]) -> None:
    """What a standby that was behind does to sequences."""
    for name, value in numbers.items():
        await store.database.pool.execute(f"SELECT setval('{name}', $1)", value)


async def lose(store: Store, job: int) -> None:
    """Has the database forget that a job was ever leased: it waits again, as at its submit."""
    await store.database.pool.execute(
        "INSERT INTO ready (job_id, queue_id, shape_id, priority, attempts, failures, losses) "
        "SELECT job_id, queue_id, shape_id, priority, 0, 0, 0 FROM lease WHERE job_id = $1",
        job,
    )
    await store.database.pool.execute("DELETE FROM lease WHERE job_id = $1", job)


async def test_without_a_recovery_a_forgotten_lease_number_is_handed_out_again(store: Store) -> None:
    """What all of this is for."""
    numbers = await snapshot(store)
    session = await store.hello()
    (job,) = await store.submit()
    (forgotten,) = await store.claim([job], session)
    await lose(store, job)
    await rewind(store, numbers)
    (again,) = await store.claim([job], session)
    assert again.lease_id == forgotten.lease_id


async def test_what_was_forgotten_is_never_handed_out_again(store: Store) -> None:
    numbers = await snapshot(store)
    first = await store.hello("agent-one")
    (job,) = await store.submit()
    (forgotten,) = await store.claim([job], first)
    old_term = store.epoch
    await lose(store, job)
    await rewind(store, numbers)
    done = await recover(store.database.url, pause=no_pause)
    assert done.lease_number > forgotten.lease_id
    assert done.term > old_term
    # A leader of old, and an agent that speaks in the name of its old session, find nothing.
    assert await store.claim([job], first, epoch=old_term) == []
    assert await store.renew(first) == set()
    await store.lead()
    assert store.epoch > done.term
    second = await store.hello("agent-two")
    assert second.session_id > done.session_number
    (again,) = await store.claim([job], second, agent_id="agent-two")
    assert again.lease_id > done.lease_number
    # The agent comes back with what the database forgot: it is to stop, and its word changes nothing.
    resumed = await store.hello("agent-one", session_id=first.session_id)
    assert not resumed.resumed
    held = [Held(job, forgotten.lease_id, LeasePhase.RUNNING)]
    standing = await take_standing(store.database, "agent-one", resumed, held)
    assert [answer.decision for answer in standing.answers] == [Answer.STALE]
    late = Leased(job, forgotten.lease_id, resumed, "agent-one")
    assert await store.report(late, succeeded()) == [Verdict.STALE]
    assert await store.report(again, succeeded()) == [Verdict.RECORDED]


async def test_a_lease_that_stands_goes_on_in_a_new_session_with_its_full_time(store: Store) -> None:
    lease = await store.running()
    await store.set_clock(50_000)
    done = await recover(store.database.url, pause=no_pause)
    assert (done.leases, done.sessions) == (1, 1)
    await store.lead()
    await store.set_clock(50_000 + 62_200)
    assert await store.expire() == []
    session = await store.hello(session_id=lease.session.session_id)
    assert session.session_id > lease.session.session_id
    held = [Held(lease.job, lease.lease_id, LeasePhase.RUNNING)]
    standing = await take_standing(store.database, "agent-one", session, held)
    assert [answer.decision for answer in standing.answers] == [Answer.KEEP]
    moved = Leased(lease.job, lease.lease_id, session, "agent-one")
    assert await store.report(moved, succeeded()) == [Verdict.RECORDED]


async def test_an_agent_that_never_comes_back_loses_its_leases_and_gets_no_offer(store: Store) -> None:
    lease = await store.running()
    await recover(store.database.url, pause=no_pause)
    fresh = await store.value(
        "SELECT l.clock - s.renewed_at <= 2 * s.heartbeat_ms FROM agent AS a JOIN session AS s ON s.id = a.session_id "
        "CROSS JOIN leader AS l"
    )
    assert fresh is False
    await store.lead()
    await store.set_clock(62_201)
    assert [row["lease_id"] for row in await store.expire()] == [lease.lease_id]


async def test_an_agent_that_is_drained_stays_so_in_the_session_it_is_given(store: Store) -> None:
    for name in ("agent-one", "agent-two"):
        await store.hello(name)
    await store.database.pool.execute("UPDATE agent SET drained = true WHERE id = 'agent-one'")
    await recover(store.database.url, pause=no_pause)
    rows = await store.database.pool.fetch(
        "SELECT a.id, s.drained FROM agent AS a JOIN session AS s ON s.id = a.session_id ORDER BY 1"
    )
    assert [tuple(row) for row in rows] == [("agent-one", True), ("agent-two", False)]


async def test_a_second_loss_forgets_the_first_recovery_and_is_above_it_all_the_same(store: Store) -> None:
    numbers = await snapshot(store)
    noon = datetime.now(UTC)
    first = await recover(store.database.url, now=noon, pause=no_pause)
    await store.lead()
    session = await store.hello()
    jobs = await store.submit(100)
    leases = await store.claim(jobs, session)
    assert len(leases) == 100
    term = store.epoch
    await rewind(store, numbers)
    await store.database.pool.execute("UPDATE leader SET epoch = 1")
    second = await recover(store.database.url, now=noon + timedelta(seconds=10), pause=no_pause)
    assert second.lease_number_before < first.lease_number
    assert second.lease_number > max(lease.lease_id for lease in leases)
    assert second.session_number > session.session_id
    assert second.term > term


async def test_twice_is_harmless(store: Store) -> None:
    lease = await store.running()
    now = datetime.now(UTC)
    first = await recover(store.database.url, now=now, pause=no_pause)
    before = await snapshot(store)
    second = await recover(store.database.url, now=now, pause=no_pause)
    assert second.lease_number == first.lease_number
    assert second.term == first.term + 1
    assert (await snapshot(store))["lease_number"] == before["lease_number"]
    assert (await snapshot(store))["job_number"] != before["job_number"]
    assert await store.where(lease.job) == "lease"


async def test_a_clock_that_was_a_little_behind_gives_no_job_number_twice(store: Store) -> None:
    at = datetime.now(UTC)
    numbers = await snapshot(store)
    jobs = [await store.value("SELECT next_job_id($1)", at) for _ in range(100)]
    await rewind(store, numbers)
    for _ in range(5):
        await recover(store.database.url, pause=no_pause)
        again = [await store.value("SELECT next_job_id($1)", at) for _ in range(100)]
        assert not set(jobs) & set(again)
        jobs += again


@pytest.mark.parametrize("hour", [0, 12, 22, 23])
def test_lease_numbers_of_a_busy_day_stay_below_the_line(hour: int) -> None:
    at = datetime(2026, 5, 4, hour, 30, tzinfo=UTC)
    first, end = lease_bounds(day_of_lease(lease_number_at(at)))
    since_midnight_s = hour * 3600 + 1800
    assert first + 49_710 * since_midnight_s <= lease_number_at(at) < end


async def test_just_before_midnight_it_moves_into_the_next_day_and_logs_have_a_place(store: Store) -> None:
    late = datetime.now(UTC).replace(hour=23, minute=40)
    done = await recover(store.database.url, now=late, pause=no_pause)
    assert day_of_lease(done.lease_number) == day_of_lease(lease_number_at(late)) + 1
    await store.lead()
    lease = await store.running()
    await store.database.pool.execute("INSERT INTO log_head VALUES ($1, 0, 0, 0)", lease.lease_id)
    # The next day finds its range begun and moves nothing back.
    async with store.database.pool.acquire() as connection:
        await ensure_partitions(connection, late + timedelta(hours=1))
    assert await store.value("SELECT last_value FROM lease_number") == lease.lease_id


async def test_it_refuses_while_a_server_leads(store: Store) -> None:
    await store.database.fetch("resign", epoch=store.epoch)
    leader = Leadership(store.database, "busy-replica", lambda: 0.0)
    await leader.step()
    before = await snapshot(store)
    with pytest.raises(RecoveryRefused, match=r"a server is alive: busy-replica .* stop every server"):
        await recover(store.database.url, pause=meanwhile(leader.step))
    assert await snapshot(store) == before
    assert await store.value("SELECT epoch FROM leader") == leader.epoch


async def test_it_refuses_when_a_server_takes_over_or_leaves_while_it_watches(store: Store) -> None:
    follower = Leadership(store.database, "follower", iter((0.0, 10.0, 11.0)).__next__)
    await follower.step()
    with pytest.raises(RecoveryRefused, match="a server is alive: follower"):
        await recover(store.database.url, pause=meanwhile(follower.step))
    with pytest.raises(RecoveryRefused, match="a server is alive: one that has just stopped"):
        await recover(store.database.url, pause=meanwhile(follower.resign))


async def test_a_server_that_starts_meanwhile_waits_and_then_leads_in_the_new_term(store: Store) -> None:
    """Its look at the row is older than the recovery: it must look again."""
    (seen,) = await store.database.fetch("read_leader")
    term = (await recover(store.database.url, pause=no_pause)).term
    assert not await store.database.fetch("take_over", holder="late", seen_epoch=seen["epoch"], seen_beat=seen["beat"])
    assert await store.lead("late") == term + 1


async def test_it_refuses_when_somebody_holds_the_leader_row(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "SESSION_SETTINGS", {**SESSION_SETTINGS, "lock_timeout": "10ms"})
    holder = await asyncpg.connect(store.database.url)
    try:
        transaction = holder.transaction()

        async def hold() -> None:
            await transaction.start()
            await holder.execute("SELECT FROM leader FOR SHARE")

        with pytest.raises(RecoveryRefused, match="holds the row of the leader"):
            await recover(store.database.url, pause=meanwhile(hold))
    finally:
        await holder.close()


async def test_cut_off_in_the_middle_it_is_run_again(store: Store) -> None:
    lease = await store.running()
    blocker = await asyncpg.connect(store.database.url)
    try:
        async with blocker.transaction():
            await blocker.execute("LOCK TABLE session")
            task = asyncio.create_task(recover(store.database.url, pause=no_pause))
            assert await wait_until_blocked(store, task)
            await store.value(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            with pytest.raises(DatabaseUnavailable):
                await task
    finally:
        await blocker.close()
    assert await store.value("SELECT epoch FROM session WHERE id = $1", lease.session.session_id) == 1
    done = await recover(store.database.url, pause=no_pause)
    assert done.leases == 1


async def test_a_clock_that_was_set_back_is_named(store: Store) -> None:
    await store.submit()
    past = datetime.now(UTC) - timedelta(days=1)
    with pytest.raises(RecoveryRefused, match="set the clock of the database's host right"):
        await recover(store.database.url, now=past, pause=no_pause)


async def test_no_schema_is_refused(empty_database_url: str) -> None:
    with pytest.raises(SchemaMismatch, match="lessor server migrate"):
        await recover(empty_database_url, pause=no_pause)


async def test_no_database_is_named() -> None:
    with pytest.raises(DatabaseUnavailable):
        await recover("postgresql://nobody@127.0.0.1:9/lessor", pause=no_pause)


async def test_events_of_a_lease_that_stands_are_still_taken(store: Store) -> None:
    """The agent says again, in its new session, what the old one's servers never acked."""
    session = await store.hello()
    (job,) = await store.submit()
    (lease,) = await store.claim([job], session)
    await recover(store.database.url, pause=no_pause)
    await store.lead()
    resumed = await store.hello(session_id=session.session_id)
    held = [Held(job, lease.lease_id, LeasePhase.ACCEPTED)]
    await take_standing(store.database, "agent-one", resumed, held)
    said = Leased(job, lease.lease_id, resumed, "agent-one")
    phases = (Phase(LeasePhase.ACCEPTED), Phase(LeasePhase.RUNNING))
    assert await store.report(said, *phases) == [Verdict.RECORDED] * 2
