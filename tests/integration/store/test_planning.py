"""What the leader knows between two reads of the database, against the database itself."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import asyncpg
import pytest

from lessor.lifecycle import LeasePhase, Outcome
from lessor.v1 import job_pb2
from lessor_server.domain.errors import DatabaseUnavailable
from lessor_server.maintenance.leadership import Leadership
from lessor_server.maintenance.reaper import Reaper
from lessor_server.planner.cycle import plan, plan_on
from lessor_server.planner.model import Grant, Plan, Policy
from lessor_server.services import lines as lines_module
from lessor_server.services.lines import Arrival
from lessor_server.services.picture import Picture
from lessor_server.services.planning import Planning
from lessor_server.services.settling import SETTLE_S
from lessor_server.sessions.delivery import Delivery
from lessor_server.sessions.stream import Streams
from lessor_server.store import claims
from lessor_server.store.fleet_queries import load_fleet, load_groups, load_queues
from lessor_server.store.reports import End, Phase, Verdict
from tests.support.store import Leased, Store

POLICY = Policy()


@pytest.fixture
async def jobs(store: Store) -> Store:
    """The store, its group commits running."""
    store.jobs.start()
    return store


class Leader:
    """A planning leader in the test's hands."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.picture = Picture(store.database, store.bells, POLICY)
        self.leadership = Leadership(store.database, "test", lambda: 0.0)
        self.leadership.epoch = store.epoch
        self.streams = Streams()
        self.planning = Planning(
            store.database,
            self.leadership,
            self.picture,
            store.lines,
            Delivery(store.database, self.streams, store.bells),
            store.bells,
            policy=POLICY,
        )

    async def settle(self) -> None:
        """Plans until nothing more can be placed at once."""
        while await self.planning.step() == 0:
            pass

    async def plan_anew(self) -> Plan:
        """Returns the plan of what the database holds."""
        store = self.store
        return plan(
            await load_fleet(store.database),
            await load_groups(store.database, store.catalog, 1000),
            await load_queues(store.database),
            POLICY,
        )

    async def plan_known(self) -> Plan:
        """Returns the plan of what the leader knows; it takes the room, so it is asked last."""
        assert self.picture.ground is not None
        groups = await self.store.lines.groups(1000)
        return plan_on(self.picture.ground, groups, self.picture.queues, POLICY)


async def leases(store: Store) -> list[asyncpg.Record]:
    rows: list[asyncpg.Record] = await store.database.query("SELECT * FROM lease ORDER BY job_id")
    return rows


def during(module_function: Any, happening: Callable[[], Coroutine[Any, Any, None]]) -> Any:
    """Returns the function with something that happens between its read and its return."""

    async def call(*arguments: Any) -> Any:
        found = await module_function(*arguments)
        await happening()
        return found

    return call


async def test_a_submitted_job_is_placed_without_a_read(jobs: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    await jobs.hello()
    leader = Leader(jobs)
    await leader.settle()
    reads = 0

    async def counted(*arguments: Any) -> Any:
        nonlocal reads
        reads += 1
        return await load_groups(*arguments)

    monkeypatch.setattr(lines_module, "load_groups", counted)
    numbers = await jobs.submit(3)
    await leader.settle()
    assert [row["job_id"] for row in await leases(jobs)] == numbers
    assert reads == 0


async def test_a_job_submitted_during_a_read_is_not_missed(jobs: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    await jobs.hello()
    leader = Leader(jobs)
    submitted: list[int] = []

    async def submit_meanwhile() -> None:
        if not submitted:
            submitted.extend(await jobs.submit(2))

    monkeypatch.setattr(lines_module, "load_groups", during(load_groups, submit_meanwhile))
    await leader.settle()
    assert [row["job_id"] for row in await leases(jobs)] == submitted


async def test_a_job_that_was_read_and_then_told_of_is_claimed_once(jobs: Store) -> None:
    await jobs.hello()
    (number,) = await jobs.submit()
    leader = Leader(jobs)
    await jobs.lines.read()
    row = (await jobs.database.query("SELECT queue_id, shape_id FROM job"))[0]
    for _ in range(2):
        jobs.lines.arrived([Arrival(number, row["queue_id"], row["shape_id"], 0)])
    await leader.settle()
    assert len(await leases(jobs)) == 1
    jobs.lines.arrived([Arrival(number, row["queue_id"], row["shape_id"], 0)])
    await leader.settle()
    assert len(await leases(jobs)) == 1


async def test_priorities_and_ages_hold_among_jobs_read_and_jobs_told_of(jobs: Store) -> None:
    first = await jobs.submit(2, priority=1)
    leader = Leader(jobs)
    await jobs.lines.read()
    urgent = await jobs.submit(1, priority=5)
    late = await jobs.submit(2, priority=1)
    low = await jobs.submit(1)
    (group,) = await jobs.lines.groups(100)
    assert [c.job_id for c in group.candidates] == [*urgent, *first, *late, *low]
    assert (await leader.plan_anew()).grants == ()


async def test_a_long_line_is_cut_and_read_again(jobs: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_module, "_LONGEST_LINE", 4)
    await jobs.hello()
    leader = Leader(jobs)
    await leader.settle()
    numbers = await jobs.submit(9)
    (group,) = await jobs.lines.groups(100)
    assert len(group.candidates) < 9 <= len(numbers)
    assert group.waiting == len(group.candidates) + 1
    while len(await leases(jobs)) < 9:
        await leader.planning.step()


async def test_ends_give_room_back_at_once(jobs: Store) -> None:
    session = await jobs.hello(cpu_millis=1000)
    leader = Leader(jobs)
    await leader.settle()
    one, two = await jobs.submit(2)
    await leader.settle()
    (lease,) = await leases(jobs)
    assert lease["job_id"] == one
    mark = leader.picture.mark()
    leased = Leased(one, lease["lease_id"], session, "agent-one")
    await jobs.report(leased, End(Outcome.SUCCEEDED, exit_code=0))
    leader.picture.answered(mark, [leased.lease_id])
    leader.picture.ended(mark, [leased.lease_id])
    await leader.settle()
    assert [row["job_id"] for row in await leases(jobs)] == [two]


async def test_an_end_during_a_read_is_not_counted_twice(jobs: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    session = await jobs.hello(cpu_millis=1000)
    leader = Leader(jobs)
    await leader.settle()
    await jobs.submit(1)
    await leader.settle()
    (lease,) = await leases(jobs)
    leased = Leased(lease["job_id"], lease["lease_id"], session, "agent-one")
    mark = leader.picture.mark()
    await jobs.report(leased, End(Outcome.SUCCEEDED, exit_code=0))
    # The read finds the room free; told of the end afterwards, the picture must not give it back again.
    await leader.picture.read()
    leader.picture.ended(mark, [leased.lease_id])
    await jobs.submit(2)
    await leader.settle()
    assert len(await leases(jobs)) == 1


async def test_a_pause_holds_from_the_moment_it_is_answered(jobs: Store) -> None:
    await jobs.hello()
    leader = Leader(jobs)
    await leader.settle()
    await jobs.database.query("UPDATE queue SET paused = true WHERE name = 'default'")
    jobs.bells.changed(orders=True)
    await jobs.submit(1)
    await leader.settle()
    assert await leases(jobs) == []


async def test_a_queue_made_since_the_last_read_is_found(jobs: Store) -> None:
    await jobs.hello()
    leader = Leader(jobs)
    await leader.settle()
    await jobs.database.query("INSERT INTO queue (name) VALUES ('new')")
    await jobs.submit(1, queue="new")
    await leader.settle()
    assert len(await leases(jobs)) == 1


async def test_a_claim_of_unknown_outcome_has_everything_read_anew(
    jobs: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await jobs.hello(cpu_millis=2000)
    leader = Leader(jobs)
    await leader.settle()
    await jobs.submit(3)

    async def committed_but_not_told(*arguments: Any) -> Any:
        await claims.claim(*arguments)
        raise DatabaseUnavailable("connection lost")

    with monkeypatch.context() as patch:
        patch.setattr("lessor_server.services.planning.claim", committed_but_not_told)
        with pytest.raises(DatabaseUnavailable):
            await leader.planning.step()
    before = leader.leadership.epoch
    await leader.settle()
    assert leader.leadership.epoch == (before or 0) + 1
    assert len(await leases(jobs)) == 2


async def test_an_agent_that_has_moved_on_is_not_planned_for_again_and_again(jobs: Store) -> None:
    await jobs.hello()
    leader = Leader(jobs)
    await leader.settle()
    # Nothing rings: as if another replica had heard it, and its word were late.
    await jobs.hello()
    await jobs.submit(1)
    assert leader.picture.due_in_s(blocked=False) > 0.5
    await leader.planning.step()
    assert await leases(jobs) == []
    assert leader.picture.due_in_s(blocked=False) < 0.5
    async with asyncio.timeout(60):
        while not await leases(jobs):
            await leader.planning.step()


async def test_after_a_silence_of_all_nothing_is_run_again_before_they_have_told(jobs: Store) -> None:
    sessions = {name: await jobs.hello(name, cpu_millis=1000) for name in ("one", "two")}
    leader = Leader(jobs)
    done, other = await jobs.submit(2)
    await leader.settle()
    held = {row["job_id"]: row for row in await leases(jobs)}
    holder = held[done]["agent_id"]
    leased = Leased(done, held[done]["lease_id"], sessions[holder], holder)
    await jobs.report(leased, Phase(LeasePhase.ACCEPTED), Phase(LeasePhase.RUNNING))
    # Nobody is heard, and all leases expire.
    await jobs.set_clock(1_000_000)
    reaper = Reaper(jobs.database, leader.leadership, jobs.bells)
    await reaper.step()
    assert await leases(jobs) == []
    await leader.settle()
    # The first that is back has room. The second is about to tell that its job has ended.
    (first,) = sessions.keys() - {holder}
    await jobs.hello(first, cpu_millis=1000)
    jobs.bells.changed(fleet=True)
    assert 0 < await until_looked(leader) <= SETTLE_S
    assert await leases(jobs) == []
    await jobs.hello(holder, cpu_millis=1000)
    assert await jobs.report(leased, End(Outcome.SUCCEEDED, exit_code=0)) == [Verdict.RECORDED]
    jobs.bells.changed(fleet=True)
    async with asyncio.timeout(60):
        while not await leases(jobs):
            await leader.planning.step()
    assert [row["job_id"] for row in await leases(jobs)] == [other]


async def until_looked(leader: Leader) -> float:
    """Returns what a step says that has read the fleet."""
    async with asyncio.timeout(60):
        while True:
            rest_s = await leader.planning.step()
            if leader.picture.settled_in_s() > 0:
                return rest_s


async def test_another_leader_begins_with_what_is_so(jobs: Store) -> None:
    await jobs.hello(cpu_millis=2000)
    old = Leader(jobs)
    await old.settle()
    await jobs.submit(1)
    await old.settle()
    await jobs.lead("another")
    new = Leader(jobs)
    await jobs.submit(3)
    # What the old one plans finds no row.
    await old.planning.step()
    jobs.lines.drop()
    await new.settle()
    assert len(await leases(jobs)) == 2


@pytest.mark.parametrize("seed", range(3))
async def test_what_the_leader_knows_is_what_the_database_says(jobs: Store, seed: int) -> None:
    """A random life of jobs, with reads at random times: nothing is ever thought free that is not."""
    chance = random.Random(seed)
    sessions = {
        name: await jobs.hello(name, gpus=chance.randint(0, 4), cpu_millis=4000) for name in ("agent-one", "agent-two")
    }
    leader = Leader(jobs)
    await leader.settle()
    for _ in range(12):
        needs = job_pb2.Resources(cpu_millis=1000, gpu_count=chance.randint(0, 2))
        await jobs.submit(chance.randint(1, 3), resources=needs, priority=chance.randint(0, 1))
        await leader.settle()
        for row in await leases(jobs):
            leased = Leased(row["job_id"], row["lease_id"], sessions[row["agent_id"]], row["agent_id"])
            mark = leader.picture.mark()
            if chance.random() < 0.3:
                await leader.picture.read()
            if chance.random() < 0.5:
                await jobs.report(leased, Phase(LeasePhase.RUNNING))
                leader.picture.answered(mark, [leased.lease_id])
            else:
                await jobs.report(leased, End(Outcome.SUCCEEDED, exit_code=0))
                leader.picture.answered(mark, [leased.lease_id])
                leader.picture.ended(mark, [leased.lease_id])
    anew, known = await leader.plan_anew(), await leader.plan_known()
    gpus = [uuid for grant in known.grants for uuid in grant.gpu_uuids]
    held = {row["gpu_uuid"] for row in await jobs.database.query("SELECT gpu_uuid FROM lease_gpu")}
    assert not held & set(gpus)
    assert {grant.job_id for grant in known.grants} <= {grant.job_id for grant in anew.grants}
    # And once it has read, it knows all of it.
    await leader.picture.read()
    await jobs.lines.read()
    assert _placed((await leader.plan_known()).grants) == _placed(anew.grants)


def _placed(grants: tuple[Grant, ...]) -> set[tuple[int, str]]:
    return {(grant.job_id, grant.agent_id) for grant in grants}


async def test_planning_runs_on_bells(jobs: Store) -> None:
    await jobs.hello()
    leader = Leader(jobs)
    leader.leadership.gained.set()
    task = asyncio.create_task(leader.planning.run())
    seen = jobs.bells.events.count
    await jobs.submit(1)
    async with asyncio.timeout(60):
        while not await leases(jobs):
            seen = await jobs.bells.events.wait(seen, 5)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
