"""The fleet and the queues: what is shown, what is changed, and what the planner is given."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from lessor.ids import encode_job_id
from lessor.v1 import fleet_service_pb2 as pb
from lessor.v1 import job_pb2, job_service_pb2
from lessor_server.bells import Bells
from lessor_server.domain.errors import AgentNotFound, InvalidField, JobNotFound, QueueExists, QueueNotFound
from lessor_server.planner.cycle import plan
from lessor_server.planner.model import Candidate, Policy
from lessor_server.services.explanation import Explainer
from lessor_server.services.fleet import Fleet
from lessor_server.store.catalog import Catalog
from lessor_server.store.database import Database
from lessor_server.store.fleet_queries import load_fleet, load_groups, load_queues
from tests.support.rows import GPU_SHAPE, SHAPE, Rows

A, B = "agent-aaaaa", "agent-bbbbb"


@pytest.fixture
def fleet(database: Database, bells: Bells) -> Fleet:
    return Fleet(database, bells)


async def set_clock(pool: asyncpg.Pool, clock_ms: int) -> None:
    await pool.execute("UPDATE leader SET clock = $1", clock_ms)


async def test_an_agent_shows_what_it_has_and_what_is_used(rows: Rows, fleet: Fleet) -> None:
    session = await rows.agent(A, name="host-a", gpus=["GPU-0", "GPU-1"], labels={"zone": "x"})
    for phase, gpus in ((1, ["GPU-0"]), (3, []), (4, [])):
        number = await rows.job(shape=GPU_SHAPE if gpus else SHAPE)
        await rows.lease(number, session, A, phase=phase, gpus=gpus, outcome=1 if phase == 4 else None)
    (agent,) = await fleet.agents()
    assert (agent.id, agent.name, agent.state, dict(agent.labels)) == (
        A,
        "host-a",
        pb.AGENT_STATE_ACTIVE,
        {"zone": "x"},
    )
    # The draining lease has given back what it held.
    assert (agent.cpu_millis, agent.cpu_millis_used, agent.memory_bytes_used) == (8000, 3000, 1 << 30)
    assert (agent.gpu_count, agent.gpu_count_used, agent.lease_count) == (2, 1, 3)
    assert (list(agent.runtimes), agent.version, agent.heartbeat_interval.seconds) == (["process"], "1.0", 5)


async def test_the_state_of_an_agent_follows_lease_time(rows: Rows, fleet: Fleet, pool: asyncpg.Pool) -> None:
    await rows.agent(A, renewed_at=1_000)
    # Two heartbeat intervals of 5 s after the renewal it is still there; a millisecond later it is not.
    for clock, state in ((11_000, pb.AGENT_STATE_ACTIVE), (11_001, pb.AGENT_STATE_DISCONNECTED)):
        await set_clock(pool, clock)
        assert (await fleet.agent(A)).state == state


async def test_an_agent_is_found_by_id_or_by_name(rows: Rows, fleet: Fleet) -> None:
    now = datetime.now(UTC)
    await rows.agent(A, name="twin", connected_at=now - timedelta(hours=1))
    await rows.agent(B, name="twin", connected_at=now)
    # An id wins over a name, even over one that connected later.
    await rows.agent("agent-ccccc", name=A, connected_at=now + timedelta(hours=1))
    assert (await fleet.agent("twin")).id == B
    assert (await fleet.agent(A)).id == A
    with pytest.raises(AgentNotFound):
        await fleet.agent("nobody")
    assert [agent.name for agent in await fleet.agents()] == [A, "twin", "twin"]


async def test_drain_and_undrain_ring_for_the_planner(rows: Rows, fleet: Fleet, bells: Bells) -> None:
    await rows.agent(A, name="host-a")
    agent = await fleet.drain("host-a", True)
    assert (agent.state, agent.drained, bells.planning.count) == (pb.AGENT_STATE_DRAINING, True, 1)
    agent = await fleet.drain(A, False)
    assert (agent.state, agent.drained, bells.planning.count) == (pb.AGENT_STATE_ACTIVE, False, 2)
    with pytest.raises(AgentNotFound):
        await fleet.drain("nobody", True)


async def test_gpus_show_who_holds_them(rows: Rows, fleet: Fleet) -> None:
    session = await rows.agent(A, name="host-a", gpus=["GPU-0", "GPU-1"])
    await rows.agent(B, name="host-b", gpus=["GPU-9"])
    number = await rows.job(shape=GPU_SHAPE)
    lease_id = await rows.lease(number, session, A, gpus=["GPU-1"])
    gpus = await fleet.gpus("")
    assert [(g.uuid, g.agent, g.index, g.lease_id, g.job_id) for g in gpus] == [
        ("GPU-0", "host-a", 0, 0, ""),
        ("GPU-1", "host-a", 1, lease_id, encode_job_id(number)),
        ("GPU-9", "host-b", 0, 0, ""),
    ]
    assert [g.uuid for g in await fleet.gpus("host-b")] == ["GPU-9"]
    with pytest.raises(AgentNotFound):
        await fleet.gpus("nobody")


async def test_leases_come_page_by_page_with_their_time_left(rows: Rows, fleet: Fleet, pool: asyncpg.Pool) -> None:
    session = await rows.agent(A, name="host-a", renewed_at=5_000)
    other = await rows.agent(B, name="host-b", renewed_at=0)
    await set_clock(pool, 8_000)
    mine = [await rows.lease(await rows.job(), session, A, phase=1 + n % 3) for n in range(5)]
    late = await rows.lease(await rows.job(), other, B)
    await pool.execute("UPDATE lease SET ttl_ms = 1000 WHERE lease_id = $1", late)
    told: list[pb.LeaseStatus] = []
    request = pb.ListLeasesRequest(page_size=2)
    while True:
        page = await fleet.leases(request)
        assert len(page.leases) <= 2
        told += page.leases
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert [lease.lease_id for lease in told] == [*mine, late]
    # ttl 60 s, margin 2.2 s, 3 s since the renewal.
    assert told[0].time_left.ToTimedelta() == timedelta(seconds=59.2)
    assert told[0].phase == job_pb2.LEASE_PHASE_OFFERED
    assert told[-1].time_left.ToTimedelta() == timedelta(seconds=1 + 1.02 - 8)
    only = await fleet.leases(pb.ListLeasesRequest(agent="host-b"))
    assert [lease.lease_id for lease in only.leases] == [late]
    for bad in (pb.ListLeasesRequest(page_token="?"), pb.ListLeasesRequest(page_token="AAAA")):
        with pytest.raises(InvalidField, match="page_token"):
            await fleet.leases(bad)


async def test_queues_are_made_changed_and_counted(rows: Rows, fleet: Fleet, bells: Bells) -> None:
    made = await fleet.create_queue(pb.Queue(name="gpu", max_running=3, queued=99))
    assert (made.name, made.paused, made.max_running, made.HasField("max_gpus"), made.queued) == (
        "gpu",
        False,
        3,
        False,
        0,
    )
    with pytest.raises(QueueExists):
        await fleet.create_queue(pb.Queue(name="gpu"))
    changed = await fleet.update_queue(pb.UpdateQueueRequest(name="gpu", paused=True, max_running=-1, max_gpus=0))
    assert (changed.paused, changed.HasField("max_running"), changed.max_gpus) == (True, False, 0)
    assert bells.planning.count == 1
    unchanged = await fleet.update_queue(pb.UpdateQueueRequest(name="gpu"))
    assert unchanged == changed
    for call in (
        fleet.queue("no"),
        fleet.update_queue(pb.UpdateQueueRequest(name="no", paused=True)),
        fleet.update_queue(pb.UpdateQueueRequest(name="no")),
    ):
        with pytest.raises(QueueNotFound):
            await call

    session = await rows.agent(A, gpus=["GPU-0"])
    await rows.ready(await rows.job(queue="gpu"))
    await rows.delayed(await rows.job(queue="gpu"), datetime.now(UTC), attempts=1, failures=1)
    await rows.lease(await rows.job(queue="gpu", shape=GPU_SHAPE), session, A, gpus=["GPU-0"])
    await rows.lease(await rows.job(queue="gpu"), session, A, phase=4, outcome=1, gpus=["GPU-0"])
    default, gpu = await fleet.queues()
    assert (default.name, default.queued, default.running, default.gpus) == ("default", 0, 0, 0)
    assert (gpu.name, gpu.queued, gpu.running, gpu.gpus) == ("gpu", 2, 1, 1)


# ---------------------------------------------------------------- what the planner is given


async def test_the_planner_gets_the_fleet_as_it_is(rows: Rows, database: Database, pool: asyncpg.Pool) -> None:
    session = await rows.agent(A, name="host-a", gpus=["GPU-0", "GPU-1"], renewed_at=100_000, drained=True)
    await rows.agent(B, name="host-b", renewed_at=0)
    await set_clock(pool, 100_000)
    await rows.lease(await rows.job(shape=GPU_SHAPE), session, A, gpus=["GPU-1"], phase=2)
    await rows.lease(await rows.job(), session, A, phase=1)
    one, two = await load_fleet(database)
    assert (one.agent_id, one.session_id, one.epoch, one.fresh, one.drained) == (A, session, 1, True, True)
    assert (one.offers, one.cpu_millis_used, one.memory_bytes_used) == (1, 3000, 1 << 30)
    assert ([g.uuid for g in one.gpus], one.gpus_used) == (["GPU-0", "GPU-1"], frozenset({"GPU-1"}))
    assert (one.runtimes, one.can_set_user) == (frozenset({"process"}), frozenset())
    assert (two.agent_id, two.fresh, two.gpus, two.cpu_millis_used) == (B, False, (), 0)


async def test_a_host_proven_gone_is_not_fresh(rows: Rows, database: Database, pool: asyncpg.Pool) -> None:
    await rows.agent(A)
    await pool.execute("UPDATE session SET host_gone = true")
    (agent,) = await load_fleet(database)
    assert not agent.fresh


async def test_the_planner_gets_the_first_of_each_queue_and_shape(
    rows: Rows, database: Database, catalog: Catalog
) -> None:
    await rows.queue("other")
    expected: dict[tuple[str, bool], list[Candidate]] = {}
    for index in range(24):
        queue, gpu, priority = ("default", "other")[index % 2], index % 3 == 0, index % 4
        number = await rows.job(queue=queue, shape=GPU_SHAPE if gpu else SHAPE, priority=priority)
        await rows.ready(number)
        expected.setdefault((queue, gpu), []).append(Candidate(number, priority, number))
    ids = {"default": await rows.queue_id("default"), "other": await rows.queue_id("other")}
    groups = {(g.queue_id, g.shape == GPU_SHAPE): g for g in await load_groups(database, catalog, 3)}
    assert len(groups) == 4
    for (queue, gpu), candidates in expected.items():
        group = groups[ids[queue], gpu]
        assert group.candidates == tuple(sorted(candidates, key=lambda c: c.order)[:3])
        assert group.waiting == 4
        assert await load_groups(database, catalog, 500)


async def test_nothing_waits_nothing_is_loaded(rows: Rows, database: Database, catalog: Catalog) -> None:
    assert await load_groups(database, catalog, 10) == []
    assert await load_fleet(database) == []


async def test_what_is_loaded_can_be_planned(rows: Rows, database: Database, catalog: Catalog) -> None:
    await rows.agent(A, gpus=["GPU-0", "GPU-1"])
    numbers = [await rows.job(shape=GPU_SHAPE) for _ in range(3)]
    for number in numbers:
        await rows.ready(number)
    queues = await load_queues(database)
    groups = await load_groups(database, catalog, 10)
    decided = plan(await load_fleet(database), groups, queues, Policy())
    assert {(g.job_id, g.gpu_uuids) for g in decided.grants} == {(numbers[0], ("GPU-0",)), (numbers[1], ("GPU-1",))}


# ---------------------------------------------------------------- explanations


@pytest.fixture
def explainer(database: Database, catalog: Catalog) -> Explainer:
    return Explainer(database, catalog)


async def reasons(explainer: Explainer, number: int) -> list[int]:
    answer = await explainer.explain(number)
    assert all(explanation.message for explanation in answer.explanations)
    return [explanation.reason for explanation in answer.explanations]


async def test_each_reason_is_explained_from_what_is_stored(rows: Rows, explainer: Explainer, fleet: Fleet) -> None:
    number = await rows.job(shape=GPU_SHAPE)
    await rows.ready(number)
    assert await reasons(explainer, number) == [job_service_pb2.PENDING_REASON_NO_AGENT_CONNECTED]
    session = await rows.agent(A, name="host-a")
    assert await reasons(explainer, number) == [job_service_pb2.PENDING_REASON_NO_AGENT_FITS_EVER]
    session_b = await rows.agent(B, name="host-b", gpus=["GPU-0"])
    assert await reasons(explainer, number) == [job_service_pb2.PENDING_REASON_STARTING]
    holder = await rows.job(shape=GPU_SHAPE)
    await rows.lease(holder, session_b, B, gpus=["GPU-0"])
    assert await reasons(explainer, number) == [job_service_pb2.PENDING_REASON_FITS_BUT_BUSY]
    await fleet.update_queue(pb.UpdateQueueRequest(name="default", paused=True))
    assert (await reasons(explainer, number))[0] == job_service_pb2.PENDING_REASON_QUEUE_PAUSED
    leased = await rows.job()
    await rows.lease(leased, session, A, phase=1)
    answer = await explainer.explain(leased)
    assert (answer.state, answer.explanations[0].reason) == (2, job_service_pb2.PENDING_REASON_LEASED)
    assert "host-a" in answer.explanations[0].message
    assert await reasons(explainer, holder) == [job_service_pb2.PENDING_REASON_NOT_PENDING]
    with pytest.raises(JobNotFound):
        await explainer.explain(5)


async def test_a_backoff_tells_when_and_after_what(rows: Rows, explainer: Explainer) -> None:
    await rows.agent(A)
    number = await rows.job()
    error = job_pb2.JobError(type="EXIT_CODE", message="it ended\nwith 3")
    last = await rows.attempt(number, outcome=2, failures=1, error=error)
    await rows.delayed(number, datetime.now(UTC) + timedelta(minutes=5), attempts=1, failures=1, last=last)
    answer = await explainer.explain(number)
    (explanation,) = answer.explanations
    assert explanation.reason == job_service_pb2.PENDING_REASON_BACKOFF
    assert "it ended with 3" in explanation.message
    assert explanation.numbers["failures"] == 1
    assert 0 < explanation.numbers["backoff_left_ms"] <= 300_000


async def test_a_job_in_line_is_told_how_many_go_first(rows: Rows, explainer: Explainer) -> None:
    session = await rows.agent(A)
    for _ in range(8):
        await rows.lease(await rows.job(), session, A)
    await rows.queue("paused", paused=True)
    await rows.ready(await rows.job(queue="paused", priority=9))
    first = await rows.job()
    await rows.ready(first)
    number = await rows.job()
    await rows.ready(number)
    await rows.ready(await rows.job(priority=5))
    await rows.ready(await rows.job())
    (explanation,) = (await explainer.explain(number)).explanations
    assert explanation.reason == job_service_pb2.PENDING_REASON_FITS_BUT_BUSY
    assert 2 in explanation.numbers.values()
