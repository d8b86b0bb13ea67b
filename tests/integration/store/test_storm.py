"""A fleet that falls silent: lease time stands still before the first lease is lost, and not for ever."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta

import pytest
from google.protobuf.duration_pb2 import Duration

from lessor import timing
from lessor.lifecycle import LeasePhase
from lessor.v1 import job_pb2
from lessor_server.bells import Bells
from lessor_server.maintenance.leadership import Leadership
from lessor_server.maintenance.reaper import Reaper
from lessor_server.maintenance.storm_brake import StormBrake
from lessor_server.store.database import Database
from lessor_server.store.hello import SessionGrant
from lessor_server.store.reports import Phase, Verdict
from tests.support.store import Leased, Store, succeeded

TTL = timing.MIN_TTL
LOST_AFTER_S = (TTL + timing.margin(TTL)) / timedelta(seconds=1)
LIMIT_S = timing.STORM_BRAKE_MAX / timedelta(seconds=1)
STEP_S = 0.25


class Leader:
    """One replica's leadership and reaper, on a clock that the test turns."""

    def __init__(self, store: Store, name: str, clock: list[float], brake: StormBrake | None = None) -> None:
        self.clock = clock
        self.leadership = Leadership(store.database, name, lambda: clock[0], brake)
        self.reaper = Reaper(store.database, self.leadership, Bells())

    async def live(self, seconds: float) -> None:
        """Lives for so long: a tick and a look each quarter of a second."""
        for _ in range(int(seconds / STEP_S)):
            self.clock[0] += STEP_S
            await self.leadership.step()
            await self.reaper.step()


class Fleet:
    """Agents with one running job each, whose ttl is the shortest there is."""

    def __init__(self, store: Store, leases: list[Leased]) -> None:
        self.store = store
        self.leases = leases

    @property
    def sessions(self) -> list[SessionGrant]:
        """One per agent, in order."""
        return [lease.session for lease in self.leases]

    async def lost(self) -> int:
        """Returns how many leases have been lost."""
        return int(await self.store.value("SELECT count(*) FROM attempt WHERE outcome = 6"))

    async def standing(self) -> int:
        """Returns how many leases stand."""
        return int(await self.store.value("SELECT count(*) FROM lease"))

    async def live(self, leader: Leader, seconds: float, alive: Sequence[SessionGrant]) -> None:
        """Lives while ``alive`` renew once a second."""
        for _ in range(int(seconds)):
            await self.store.renew(*alive)
            await leader.live(1)


async def fleet_of(store: Store, agents: int) -> Fleet:
    ttl = Duration()
    ttl.FromTimedelta(TTL)
    jobs = await store.submit(agents, lease=job_pb2.LeasePolicy(ttl=ttl))
    leases = []
    for number, job in enumerate(jobs):
        session = await store.hello(f"agent-{number}")
        leases += await store.claim([job], session, agent_id=f"agent-{number}")
    phases = (Phase(LeasePhase.ACCEPTED), Phase(LeasePhase.RUNNING))
    await store.commit([store.said(lease, phase) for lease in leases for phase in phases])
    return Fleet(store, leases)


async def led(store: Store, brake: StormBrake | None = None, name: str = "one") -> Leader:
    await store.database.fetch("resign", epoch=store.epoch)
    leader = Leader(store, name, [100.0], brake)
    await leader.leadership.step()
    assert leader.leadership.epoch is not None
    return leader


async def lease_time_ms(store: Store) -> int:
    return int(await store.value("SELECT clock FROM leader"))


async def test_a_fleet_that_is_cut_off_for_a_while_loses_nothing(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = await fleet_of(store, 30)
    leader = await led(store)
    with caplog.at_level(logging.WARNING):
        await leader.live(3 * LOST_AFTER_S)
        assert await lease_time_ms(store) < TTL / timedelta(milliseconds=1) / 2, "it stands well before a lease is lost"
        assert (await fleet.lost(), await fleet.standing()) == (0, 30)
        assert await store.renew(*fleet.sessions) == {s.session_id for s in fleet.sessions}
        before = await lease_time_ms(store)
        await fleet.live(leader, 20, fleet.sessions)
        assert await lease_time_ms(store) - before >= 18_000, "it runs again"
    events = [record.__dict__["event"] for record in caplog.records]
    assert (events.count("storm_brake"), events.count("storm_over")) == (1, 1)
    ends = await store.commit([store.said(lease, succeeded()) for lease in fleet.leases])
    assert ends.verdicts == [Verdict.RECORDED] * 30
    assert await fleet.lost() == 0


async def test_a_fleet_that_is_gone_is_lost_when_the_brake_is_used_up(store: Store) -> None:
    fleet = await fleet_of(store, 30)
    leader = await led(store)
    await leader.live(LIMIT_S)
    assert await fleet.lost() == 0
    await leader.live(LOST_AFTER_S + 2)
    assert (await fleet.lost(), await fleet.standing()) == (30, 0)
    assert await store.value("SELECT count(*) FROM ready") == 30
    assert await store.value("SELECT stood_ms FROM leader") == 0, "the storm is over: nobody holds a lease"


async def test_more_than_half_is_a_storm_and_the_others_keep_theirs(store: Store) -> None:
    fleet = await fleet_of(store, 30)
    leader = await led(store)
    alive = fleet.sessions[16:]
    await fleet.live(leader, LIMIT_S, alive)
    assert await fleet.lost() == 0
    await fleet.live(leader, LOST_AFTER_S + 2, alive)
    assert (await fleet.lost(), await fleet.standing()) == (16, 14)


async def test_half_of_a_fleet_is_no_storm(store: Store) -> None:
    fleet = await fleet_of(store, 30)
    leader = await led(store)
    await fleet.live(leader, LOST_AFTER_S + 2, fleet.sessions[15:])
    assert (await fleet.lost(), await fleet.standing()) == (15, 15)


async def test_ten_are_no_storm(store: Store) -> None:
    fleet = await fleet_of(store, 10)
    leader = await led(store)
    await leader.live(LOST_AFTER_S + 2)
    assert await fleet.lost() == 10


async def test_sessions_without_leases_do_not_count(store: Store) -> None:
    for number in range(40):
        await store.hello(f"idle-{number}")
    fleet = await fleet_of(store, 10)
    leader = await led(store)
    await leader.live(LOST_AFTER_S + 2)
    assert await fleet.lost() == 10


async def test_hosts_that_are_proven_gone_do_not_count(store: Store) -> None:
    fleet = await fleet_of(store, 30)
    gone = [session.session_id for session in fleet.sessions[:20]]
    await store.database.pool.execute("UPDATE session SET host_gone = true WHERE id = ANY ($1)", gone)
    leader = await led(store)
    await fleet.live(leader, 4, fleet.sessions[20:])
    assert await fleet.lost() == 20


async def test_turned_off_it_never_stands_still(store: Store) -> None:
    fleet = await fleet_of(store, 30)
    leader = await led(store, StormBrake(timedelta(0)))
    await leader.live(LOST_AFTER_S + 2)
    assert await fleet.lost() == 30


async def test_leaders_that_follow_each_other_share_one_limit(store: Store) -> None:
    fleet = await fleet_of(store, 30)
    leader = await led(store)
    stood_s = 0.0
    for number in range(6):
        # Each dies in the middle of the storm, and the next one does not run lease time on before it has looked.
        before = await lease_time_ms(store)
        await leader.live(15)
        stood_s += 15
        if number:
            assert await lease_time_ms(store) == before or stood_s > LIMIT_S
        follower = Leader(store, f"number {number}", leader.clock)
        await follower.leadership.step()
        leader.clock[0] += timing.LEADER_TAKEOVER.total_seconds()
        await follower.leadership.step()
        assert follower.leadership.epoch is not None
        leader = follower
    assert await fleet.lost() == 30, "after 60 s of them all the silent are given up"


async def test_an_outage_of_the_database_does_not_use_up_the_limit(store: Store) -> None:
    fleet = await fleet_of(store, 30)
    leader = await led(store)
    await leader.live(10)
    stood_ms = leader.leadership.brake.stood_ms
    assert stood_ms > 0
    gone = await Database.connect(store.database.url)
    cut_off = Leadership(gone, "one", lambda: leader.clock[0], leader.leadership.brake)
    cut_off.epoch = leader.leadership.epoch
    await gone.close()
    for _ in range(600):
        leader.clock[0] += 1
        await cut_off.step()
    assert leader.leadership.brake.stood_ms == stood_ms
    assert await fleet.lost() == 0


async def test_what_was_due_when_the_storm_was_noticed_waits_as_well(store: Store) -> None:
    """The reaper was held up for so long that lease time ran past all deadlines before its next look."""
    fleet = await fleet_of(store, 30)
    leader = await led(store)
    await leader.live(1)
    for _ in range(80):
        leader.clock[0] += STEP_S
        await leader.leadership.step()
    assert await lease_time_ms(store) > LOST_AFTER_S * 1000
    await leader.reaper.step()
    assert await fleet.lost() == 0
    await store.renew(*fleet.sessions)
    await fleet.live(leader, 5, fleet.sessions)
    assert (await fleet.lost(), await fleet.standing()) == (0, 30)


async def test_another_storm_has_a_limit_of_its_own(store: Store) -> None:
    fleet = await fleet_of(store, 30)
    leader = await led(store)
    await leader.live(40)
    await fleet.live(leader, 5, fleet.sessions)
    assert await store.value("SELECT stood_ms FROM leader") == 0
    await leader.live(40)
    assert await fleet.lost() == 0
