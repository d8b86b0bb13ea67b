"""Plans of worlds small enough to check by eye, and the cost of large ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lessor_server.domain.shape import Selector, SelectorOperator, Shape
from lessor_server.planner import placement
from lessor_server.planner.cycle import plan
from lessor_server.planner.model import Agent, Candidate, Gpu, Group, Plan, Policy, Queue
from lessor_server.planner.order import Order
from lessor_server.planner.reasons import PendingReason
from lessor_server.planner.room import Room
from tests.unit.server.planner.worlds import A100, GIB, H200, make_agent, make_gpus, make_group, make_shape

QUEUE = Queue(1, "default")


def planned(fleet: list[Agent], *groups: Group, queue: Queue = QUEUE, policy: Policy | None = None) -> Plan:
    queues = {1: queue, 2: Queue(2, "other")}
    return plan(fleet, groups, queues, policy or Policy())


def places(result: Plan) -> list[tuple[int, str]]:
    return [(grant.job_id, grant.agent_id.removeprefix("agent-")) for grant in result.grants]


def reasons(result: Plan) -> list[tuple[int, int, PendingReason, int]]:
    return [(item.queue_id, item.shape_id, item.reason, item.waiting) for item in result.unplaced]


def test_nothing_waits() -> None:
    assert planned([make_agent("a1")]) == Plan((), (), True)


def test_a_grant_names_the_session_and_the_gpus() -> None:
    [grant] = planned([make_agent("a1", 4)], make_group(make_shape(2), 7)).grants
    assert (grant.job_id, grant.agent_id, grant.session_id, grant.epoch) == (7, "agent-a1", 11, 3)
    assert grant.gpu_uuids == ("GPU-a1-0", "GPU-a1-1")


def test_the_tightest_fit_is_taken_and_large_agents_stay_free() -> None:
    fleet = [make_agent("large", 8), make_agent("small", 2), make_agent("cpu")]
    groups = [
        make_group(make_shape(), 1, shape_id=1),
        make_group(make_shape(1), 2, 3, shape_id=2),
        make_group(make_shape(8), 4, shape_id=3),
    ]
    assert places(planned(fleet, *groups)) == [(1, "cpu"), (2, "small"), (3, "small"), (4, "large")]


def test_jobs_of_one_shape_fill_one_agent_before_the_next() -> None:
    fleet = [make_agent("a1", 2), make_agent("a2", 2)]
    assert places(planned(fleet, make_group(make_shape(1), 1, 2, 3, 4))) == [(1, "a1"), (2, "a1"), (3, "a2"), (4, "a2")]


def test_a_fit_made_tighter_by_another_shape_is_seen() -> None:
    # The two-GPU job leaves one GPU free on a2, so the second one-GPU job must move there from a1.
    fleet = [make_agent("a1", 3), make_agent("a2", 4, cpu_millis=32_000)]
    one, two = make_shape(1), make_shape(3, gpu_memory_bytes=1, cpu_millis=20_000)
    groups = [make_group(one, 1, 3, shape_id=1), make_group(two, 2, shape_id=2)]
    assert places(planned(fleet, *groups)) == [(1, "a1"), (2, "a2"), (3, "a2")]


def test_the_smallest_sufficient_gpus_are_taken_lowest_index_first() -> None:
    gpus = (
        Gpu("big-0", 0, H200, 141 * GIB),
        Gpu("small-3", 3, A100, 40 * GIB),
        Gpu("small-1", 1, A100, 40 * GIB),
        Gpu("mid-2", 2, A100, 80 * GIB),
    )
    group = make_group(make_shape(1), 1, 2, 3, 4)
    assert [grant.gpu_uuids for grant in planned([make_agent("a1", gpus)], group).grants] == [
        ("small-1",),
        ("small-3",),
        ("mid-2",),
        ("big-0",),
    ]
    [grant] = planned([make_agent("a1", gpus)], make_group(make_shape(2, gpu_memory_bytes=80 * GIB), 1)).grants
    assert grant.gpu_uuids == ("big-0", "mid-2")


def test_priority_goes_before_age_and_age_over_queues() -> None:
    groups = [
        Group(1, 1, make_shape(1), (Candidate(9, 5, 9), Candidate(2, 0, 2), Candidate(3, 0, 3)), 3),
        Group(2, 1, make_shape(1), (Candidate(8, 5, 8), Candidate(1, 0, 1)), 2),
    ]
    result = planned([make_agent("a1", 4)], *groups)
    assert [grant.job_id for grant in result.grants] == [8, 9, 1, 2]
    assert reasons(result) == [(1, 1, PendingReason.FITS_BUT_BUSY, 1)]


def test_a_job_too_large_for_now_does_not_block_a_smaller_one() -> None:
    fleet = [make_agent("a1", 8, gpus_used=frozenset({"GPU-a1-0"}))]
    result = planned(fleet, make_group(make_shape(8), 1, shape_id=1), make_group(make_shape(1), 2, shape_id=2))
    assert places(result) == [(2, "a1")]
    assert reasons(result) == [(1, 1, PendingReason.FITS_BUT_BUSY, 1)]


@pytest.mark.parametrize(
    ("queue", "placed", "reason"),
    [
        (Queue(1, "q", paused=True), 0, PendingReason.QUEUE_PAUSED),
        (Queue(1, "q", max_running=0), 0, PendingReason.QUEUE_LIMIT),
        (Queue(1, "q", max_running=3, running=1), 2, PendingReason.QUEUE_LIMIT),
        (Queue(1, "q", max_running=3, running=7), 0, PendingReason.QUEUE_LIMIT),
        (Queue(1, "q", max_gpus=4), 2, PendingReason.QUEUE_LIMIT),
        (Queue(1, "q", max_gpus=5, gpus=2), 1, PendingReason.QUEUE_LIMIT),
    ],
)
def test_queue_limits(queue: Queue, placed: int, reason: PendingReason) -> None:
    result = planned([make_agent("a1", 8)], make_group(make_shape(2), 1, 2, 3), queue=queue)
    assert len(result.grants) == placed
    assert reasons(result) == [(1, 1, reason, 3 - placed)]


def test_a_queue_at_its_gpus_still_starts_jobs_without_gpus() -> None:
    groups = [make_group(make_shape(1), 1, shape_id=1), make_group(make_shape(), 2, shape_id=2)]
    result = planned([make_agent("a1", 8)], *groups, queue=Queue(1, "q", max_gpus=2, gpus=3))
    assert places(result) == [(2, "a1")]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fresh": False}, PendingReason.NO_AGENT_CONNECTED),
        ({"drained": True}, PendingReason.NO_AGENT_FITS_EVER),
        ({"runtimes": frozenset({"docker"})}, PendingReason.NO_AGENT_WITH_RUNTIME),
        ({"runtimes": frozenset({"docker"}), "drained": True}, PendingReason.NO_AGENT_WITH_RUNTIME),
        ({"can_set_user": frozenset({"docker"})}, PendingReason.NO_AGENT_FITS_EVER),
        ({"heartbeat_ms": 15_001}, PendingReason.NO_AGENT_FITS_EVER),
        ({"labels": {"zone": "b"}}, PendingReason.NO_AGENT_FITS_EVER),
        ({"cpu_millis": 999}, PendingReason.NO_AGENT_FITS_EVER),
        ({"memory_bytes": GIB - 1}, PendingReason.NO_AGENT_FITS_EVER),
        ({"gpus": make_gpus("a1", 1)}, PendingReason.NO_AGENT_FITS_EVER),
        ({"gpus": make_gpus("a1", 2, A100, 141)}, PendingReason.NO_AGENT_FITS_EVER),
        ({"gpus": make_gpus("a1", 2, H200, 79)}, PendingReason.NO_AGENT_FITS_EVER),
        ({"cpu_millis_used": 15_001}, PendingReason.FITS_BUT_BUSY),
        ({"memory_bytes_used": 63 * GIB + 1}, PendingReason.FITS_BUT_BUSY),
        ({"gpus_used": frozenset({"GPU-a1-1"})}, PendingReason.FITS_BUT_BUSY),
        ({"offers": 64}, PendingReason.FITS_BUT_BUSY),
        ({}, None),
        ({"heartbeat_ms": 15_000, "offers": 63}, None),
        ({"cpu_millis_used": 15_000, "memory_bytes_used": 63 * GIB}, None),
        ({"gpus_used": frozenset({"GPU-elsewhere"})}, None),
    ],
)
def test_each_filter_on_both_sides_of_its_bound(change: dict[str, object], reason: PendingReason | None) -> None:
    shape = make_shape(
        2,
        gpu_model="H200",
        gpu_memory_bytes=80 * GIB,
        memory_bytes=GIB,
        needs_user=True,
        selectors=(Selector("zone", SelectorOperator.IN, ("a",)),),
    )
    agent = replace(make_agent("a1", 2), **change)  # type: ignore[arg-type]
    result = planned([agent], make_group(shape, 1))
    assert bool(result.grants) == (reason is None)
    assert reasons(result) == ([] if reason is None else [(1, 1, reason, 1)])


def test_what_needs_nothing_of_a_resource_fits_where_too_much_is_in_use() -> None:
    agent = make_agent("a1", memory_bytes_used=65 * GIB)
    assert places(planned([agent], make_group(make_shape(), 1))) == [(1, "a1")]


def test_an_agent_gets_no_more_offers_than_it_may_have() -> None:
    result = planned([make_agent("a1", offers=1)], make_group(make_shape(), 1, 2, 3), policy=Policy(max_offers=3))
    assert places(result) == [(1, "a1"), (2, "a1")]
    assert reasons(result) == [(1, 1, PendingReason.FITS_BUT_BUSY, 1)]


def test_a_cycle_bounds_its_grants_and_says_that_there_is_more() -> None:
    group = make_group(make_shape(), 1, 2, 3)
    cut = planned([make_agent("a1")], group, policy=Policy(max_grants=2))
    assert (len(cut.grants), cut.complete, cut.unplaced) == (2, False, ())
    exact = planned([make_agent("a1")], group, policy=Policy(max_grants=3))
    assert (len(exact.grants), exact.complete) == (3, True)
    none = planned([make_agent("a1")], group, policy=Policy(max_grants=0))
    assert (none.grants, none.complete) == ((), False)


def test_jobs_beyond_the_candidates_are_counted() -> None:
    group = replace(make_group(make_shape(), 1, 2), waiting=500)
    more = planned([make_agent("a1")], group)
    assert (len(more.grants), more.complete, more.unplaced) == (2, False, ())
    full = planned([make_agent("a1", cpu_millis=1000)], group)
    assert full.complete
    assert reasons(full) == [(1, 1, PendingReason.FITS_BUT_BUSY, 499)]


def test_broken_input_crashes_loudly() -> None:
    with pytest.raises(ValueError, match="job 1 of queue 1, shape 1 is out of order"):
        planned([make_agent("a1")], make_group(make_shape(), 2, 1))
    with pytest.raises(KeyError):
        planned([make_agent("a1")], make_group(make_shape(), 1, queue_id=3))
    with pytest.raises(ValueError, match="agent-a1 lists a GPU twice"):
        make_agent("a1", make_gpus("x", 1) * 2)


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names the place of each look at a room, by an order or by a shape's own heap, as it is taken."""
    looks: list[str] = []
    for name, place in (("order", Order), ("heap", placement.Ranking)):
        entry = place._entry  # noqa: SLF001 - to count the work is what for

        def counted(self: Any, room: Room, name: str = name, entry: Any = entry) -> Any:
            looks.append(name)
            return entry(self, room)

        monkeypatch.setattr(place, "_entry", counted)
    return looks


def test_a_cycle_costs_by_change_not_by_job_nor_by_shape(looked_at: list[str]) -> None:
    fleet = [make_agent(f"a{number:03}", 8, cpu_millis=200_000) for number in range(100)]
    groups = [
        make_group(make_shape(1, memory_bytes=shape_id), *range(shape_id, 10_001, 100), shape_id=shape_id)
        for shape_id in range(1, 101)
    ]
    result = planned(fleet, *groups)
    assert len(result.grants) == 800
    assert sum(unplaced.waiting for unplaced in result.unplaced) == 9200
    # The fleet is sorted once for all shapes, then each grant moves one room. To
    # look at the fleet for each job would be a million, for each shape 10,000.
    assert len(looked_at) <= 100 + 800


def test_a_shape_that_looks_in_vain_gets_a_heap_of_its_own(
    looked_at: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # All but ten have many CPUs left and little memory: they come first in the order, each with CPUs of its own.
    fleet = [make_agent(f"a{number:03}", cpu_millis=20_000 + number, memory_bytes=GIB) for number in range(990)]
    fleet += [make_agent(f"b{number:03}", cpu_millis=900_000, memory_bytes=64 * GIB) for number in range(10)]
    in_vain = 0
    first_fit = Order.first_fit

    def counted(self: Order, shape: Shape) -> tuple[Room | None, int]:
        nonlocal in_vain
        room, vain = first_fit(self, shape)
        in_vain += vain
        return room, vain

    monkeypatch.setattr(Order, "first_fit", counted)
    result = planned(fleet, make_group(make_shape(memory_bytes=2 * GIB), *range(1, 301)))
    assert len(result.grants) == 300
    assert in_vain <= 2 * 1000
    assert looked_at.count("heap") <= 1000 + 300
    assert looked_at.count("order") <= 1000 + 300
