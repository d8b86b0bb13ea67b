"""What holds for every plan of every world."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lessor_server.domain.shape import Shape
from lessor_server.planner import placement
from lessor_server.planner.cycle import plan, plan_on
from lessor_server.planner.explain import explain
from lessor_server.planner.model import Agent, Grant, Group, Plan, Policy
from lessor_server.planner.reasons import PendingReason
from tests.unit.server.planner.worlds import World, can_ever, matching_gpus, plain_plan, worlds

KEPT_BACK = {PendingReason.QUEUE_PAUSED, PendingReason.QUEUE_LIMIT}


def planned(world: World) -> Plan:
    return plan(world.fleet, world.groups, world.queues, world.policy)


def shape_groups(world: World) -> dict[tuple[int, int], Group]:
    return {(group.queue_id, group.shape_id): group for group in world.groups}


@pytest.mark.parametrize("in_vain", [-1, 0, 1])
@given(world=worlds())
@settings(max_examples=70)
def test_the_plan_is_the_one_the_rules_give(in_vain: int, world: World) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # From the first job on, soon, or late every shape has a heap of its own.
        patch.setattr(placement, "_LOOKS_IN_VAIN", in_vain)
        result = planned(world)
    assert list(result.grants) == plain_plan(world)
    assert result.complete


@given(worlds())
@settings(max_examples=40)
def test_nothing_is_given_twice_or_beyond_what_is_there(world: World) -> None:
    groups = shape_groups(world)
    agents = {agent.agent_id: agent for agent in world.fleet}
    cpu, memory, offers = Counter[str](), Counter[str](), Counter[str]()
    given_gpus: set[tuple[str, str]] = set()
    for grant in planned(world).grants:
        agent, shape = agents[grant.agent_id], groups[grant.queue_id, grant.shape_id].shape
        assert can_ever(agent, shape)
        assert (grant.session_id, grant.epoch) == (agent.session_id, agent.epoch)
        assert len(grant.gpu_uuids) == shape.gpu_count
        usable = {gpu.uuid for gpu in matching_gpus(agent.gpus, shape)} - agent.gpus_used
        assert set(grant.gpu_uuids) <= usable
        for uuid in grant.gpu_uuids:
            assert (agent.agent_id, uuid) not in given_gpus
            given_gpus.add((agent.agent_id, uuid))
        cpu[agent.agent_id] += shape.cpu_millis
        memory[agent.agent_id] += shape.memory_bytes
        offers[agent.agent_id] += 1
    for agent_id, agent in agents.items():
        assert not cpu[agent_id] or agent.cpu_millis_used + cpu[agent_id] <= agent.cpu_millis
        assert not memory[agent_id] or agent.memory_bytes_used + memory[agent_id] <= agent.memory_bytes
        assert not offers[agent_id] or agent.offers + offers[agent_id] <= world.policy.max_offers


@given(worlds())
@settings(max_examples=40)
def test_queue_limits_are_exact(world: World) -> None:
    result = planned(world)
    groups = shape_groups(world)
    for queue in world.queues.values():
        own = [grant for grant in result.grants if grant.queue_id == queue.queue_id]
        running = queue.running + len(own)
        gpus = queue.gpus + sum(len(grant.gpu_uuids) for grant in own)
        if queue.paused:
            assert not own
        if queue.max_running is not None and own:
            assert running <= queue.max_running
        if queue.max_gpus is not None and any(grant.gpu_uuids for grant in own):
            assert gpus <= queue.max_gpus
        for unplaced in result.unplaced:
            if unplaced.queue_id == queue.queue_id and unplaced.reason is PendingReason.QUEUE_LIMIT:
                needed = groups[unplaced.queue_id, unplaced.shape_id].shape.gpu_count
                at_running = queue.max_running is not None and running >= queue.max_running
                at_gpus = queue.max_gpus is not None and needed > 0 and gpus + needed > queue.max_gpus
                assert at_running or at_gpus


@given(worlds())
@settings(max_examples=40)
def test_of_one_shape_the_first_in_order_goes_first(world: World) -> None:
    result = planned(world)
    granted = {grant.job_id for grant in result.grants}
    reasons = {(unplaced.queue_id, unplaced.shape_id): unplaced.reason for unplaced in result.unplaced}
    last_granted: dict[int, tuple[int, int, int]] = {}
    for group in world.groups:
        flags = [job.job_id in granted for job in group.candidates]
        assert flags == sorted(flags, reverse=True)
        for job in group.candidates:
            if job.job_id in granted:
                last_granted[group.shape_id] = max(last_granted.get(group.shape_id, job.order), job.order)
    for group in world.groups:
        for job in group.candidates:
            if job.job_id not in granted and job.order < last_granted.get(group.shape_id, job.order):
                assert reasons[group.queue_id, group.shape_id] in KEPT_BACK


@given(worlds(), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_the_order_of_the_input_does_not_matter(world: World, random: Random) -> None:
    fleet, groups = list(world.fleet), list(world.groups)
    random.shuffle(fleet)
    random.shuffle(groups)
    turned = [replace(agent, gpus=agent.gpus[::-1], labels=dict(list(agent.labels.items())[::-1])) for agent in fleet]
    assert plan(turned, groups, world.queues, world.policy) == planned(world)


@given(worlds(), st.integers(0, 15))
@settings(max_examples=40)
def test_a_plan_cut_short_is_the_beginning_of_the_whole(world: World, max_grants: int) -> None:
    whole = planned(world)
    cut = plan(world.fleet, world.groups, world.queues, Policy(world.policy.max_offers, max_grants))
    assert cut.grants == whole.grants[:max_grants]
    assert set(cut.unplaced) <= {
        replace(unplaced, waiting=unplaced.waiting + missing)
        for unplaced in whole.unplaced
        for missing in range(len(whole.grants) + 1)
    }
    if cut.complete:
        assert cut == whole
    else:
        assert len(cut.grants) == max_grants


@given(worlds())
@settings(max_examples=40)
def test_every_waiting_job_is_granted_or_counted_with_a_reason(world: World) -> None:
    result = planned(world)
    granted = Counter((grant.queue_id, grant.shape_id) for grant in result.grants)
    left = {(unplaced.queue_id, unplaced.shape_id): unplaced.waiting for unplaced in result.unplaced}
    assert len(left) == len(result.unplaced)
    for key, group in shape_groups(world).items():
        assert granted[key] + left.get(key, 0) == group.waiting
    assert all(waiting > 0 for waiting in left.values())


@given(worlds(max_jobs=8))
@settings(max_examples=75)
def test_a_job_is_granted_exactly_when_it_is_explained_as_starting(world: World) -> None:
    result = planned(world)
    granted = {grant.job_id for grant in result.grants}
    reasons = {(unplaced.queue_id, unplaced.shape_id): unplaced.reason for unplaced in result.unplaced}
    for group in world.groups:
        for candidate in group.candidates:
            told = explain(world.subject(group, candidate), world.fleet, world.groups, world.queues, world.policy)
            if candidate.job_id in granted:
                assert [reason.reason for reason in told] == [PendingReason.STARTING]
            else:
                assert told[0].reason is reasons[group.queue_id, group.shape_id]
                assert PendingReason.STARTING not in {reason.reason for reason in told}
            assert len({(reason.reason, reason.message) for reason in told}) == len(told)
            assert all(reason.message for reason in told)


def alone(world: World, group: Group) -> list[Agent]:
    """Returns the agents on which the group's shape could start in this cycle were it the only one."""
    return [agent for agent in world.fleet if can_ever(agent, group.shape)]


@given(worlds())
@settings(max_examples=40)
def test_busy_means_that_an_agent_fits_and_never_means_that_none_does(world: World) -> None:
    groups = shape_groups(world)
    for unplaced in planned(world).unplaced:
        fitting = alone(world, groups[unplaced.queue_id, unplaced.shape_id])
        if unplaced.reason is PendingReason.FITS_BUT_BUSY:
            assert fitting
        elif unplaced.reason not in KEPT_BACK:
            assert not fitting


def in_use(fleet: Sequence[Agent], held: Mapping[int, tuple[Grant, Shape]], offered: set[int]) -> list[Agent]:
    """Returns the fleet with what the held grants use, as a read of the database would show it."""
    result = []
    for agent in fleet:
        own = [(job, grant, shape) for job, (grant, shape) in held.items() if grant.agent_id == agent.agent_id]
        result.append(
            replace(
                agent,
                offers=agent.offers + sum(job in offered for job, _, _ in own),
                cpu_millis_used=agent.cpu_millis_used + sum(shape.cpu_millis for _, _, shape in own),
                memory_bytes_used=agent.memory_bytes_used + sum(shape.memory_bytes for _, _, shape in own),
                gpus_used=agent.gpus_used | {uuid for _, grant, _ in own for uuid in grant.gpu_uuids},
            )
        )
    return result


@pytest.mark.parametrize("in_vain", [-1, 1])
@pytest.mark.parametrize("kept", [1, 1000])
@given(world=worlds(), data=st.data())
@settings(max_examples=40)
def test_a_ground_that_lives_on_plans_as_a_new_one(kept: int, in_vain: int, world: World, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "_LOOKS_IN_VAIN", in_vain)
        # Few remembered changes have the rankings made anew; many, brought up to date.
        patch.setattr(placement, "_CHANGES_KEPT", kept)
        ground = placement.Ground(world.fleet, world.policy.max_offers)
        shapes = {group.shape_id: group.shape for group in world.groups}
        held: dict[int, tuple[Grant, Shape]] = {}
        offered: set[int] = set()
        for _ in range(4):
            groups = [
                replace(group, candidates=candidates, waiting=len(candidates))
                for group in world.groups
                if (candidates := tuple(c for c in group.candidates if c.job_id not in held))
            ]
            expected = plan(in_use(world.fleet, held, offered), groups, world.queues, world.policy)
            found = plan_on(ground, groups, world.queues, world.policy)
            assert found == expected
            for grant in found.grants:
                held[grant.job_id] = (grant, shapes[grant.shape_id])
                offered.add(grant.job_id)
            for job in data.draw(st.lists(st.sampled_from(sorted(offered)), unique=True)) if offered else []:
                ground.answered(held[job][0].agent_id)
                offered.discard(job)
            answered = sorted(held.keys() - offered)
            for job in data.draw(st.lists(st.sampled_from(answered), unique=True)) if answered else []:
                grant, shape = held.pop(job)
                ground.give_back(grant.agent_id, shape, grant.gpu_uuids)
