"""The planning cycle.

``plan`` is a pure function of a snapshot: the same input gives the same plan,
in whatever order the agents and groups are listed. ``plan_on`` is the same on a
ground that lives on from cycle to cycle.

Order is strict: priority, then age, over all queues. A job that does not fit now
does not keep back those behind it. Work is done per shape: when one job of a
shape finds no room, all jobs of the shape are done with, and when a queue keeps
one job of a shape back, all of that queue and shape are.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lessor_server.planner.fit import queue_reason
from lessor_server.planner.model import Agent, Candidate, Grant, Group, Plan, Policy, Queue, Unplaced
from lessor_server.planner.placement import Ground
from lessor_server.planner.reasons import PendingReason


@dataclass(frozen=True, slots=True)
class Closure:
    """No further job of a group can be placed in this cycle."""

    queue_id: int
    shape_id: int
    reason: PendingReason


class Cycle:
    """One pass over the waiting jobs, step by step. Used once.

    Raises:
        KeyError: A group's queue is not among ``queues``.
    """

    def __init__(self, ground: Ground, groups: Sequence[Group], queues: Mapping[int, Queue]) -> None:
        self.ground = ground
        """What is free; the cycle takes from it."""
        self.queues = {group.queue_id: queues[group.queue_id] for group in groups}
        self.running = {queue_id: queue.running for queue_id, queue in self.queues.items()}
        """queue_id → its leases, those of this cycle included."""
        self.gpus = {queue_id: queue.gpus for queue_id, queue in self.queues.items()}
        """queue_id → the GPUs it holds, those of this cycle included."""
        self._groups = groups
        self._shape_reasons: dict[int, PendingReason] = {}
        """shape_id → why it cannot be placed any more."""
        self._turns = [
            (group.candidates[0].order, number, 0) for number, group in enumerate(groups) if group.candidates
        ]
        heapq.heapify(self._turns)

    def steps(self) -> Iterator[Grant | Closure]:
        """Yields what is decided, in order: a grant per job placed, a closure per group that can go no further.

        Raises:
            ValueError: A group's candidates are out of order.
        """
        while self._turns:
            _, number, position = self._turns[0]
            group = self._groups[number]
            decision = self._decide(group, group.candidates[position])
            if isinstance(decision, Grant) and position + 1 < len(group.candidates):
                following = group.candidates[position + 1]
                if following.order <= group.candidates[position].order:
                    raise ValueError(
                        f"job {following.job_id} of queue {group.queue_id}, shape {group.shape_id} is out of order"
                    )
                heapq.heapreplace(self._turns, (following.order, number, position + 1))
            else:
                heapq.heappop(self._turns)
            yield decision

    def _decide(self, group: Group, candidate: Candidate) -> Grant | Closure:
        queue_id, shape_id, shape = group.queue_id, group.shape_id, group.shape
        held_back = queue_reason(self.queues[queue_id], self.running[queue_id], self.gpus[queue_id], shape)
        if held_back is not None:
            return Closure(queue_id, shape_id, held_back)
        if shape_id in self._shape_reasons:
            return Closure(queue_id, shape_id, self._shape_reasons[shape_id])
        ranking = self.ground.ranking(shape_id, shape)
        room = ranking.best()
        if room is None:
            reason = self._shape_reasons[shape_id] = self.ground.unplaceable_reason(ranking)
            return Closure(queue_id, shape_id, reason)
        gpu_uuids = self.ground.take(room, ranking)
        self.running[queue_id] += 1
        self.gpus[queue_id] += shape.gpu_count
        agent = room.agent
        return Grant(candidate.job_id, queue_id, shape_id, agent.agent_id, agent.session_id, agent.epoch, gpu_uuids)


def plan(fleet: Iterable[Agent], groups: Sequence[Group], queues: Mapping[int, Queue], policy: Policy) -> Plan:
    """Returns which waiting jobs to grant to which agents.

    Guarantees: no GPU is given twice, no agent gets more than it has free, no
    queue exceeds its limits, agents that are drained or not connected get
    nothing, and of two jobs of one shape and queue the first in order goes first.

    Args:
        fleet: All known agents.
        groups: The waiting jobs, one group per queue and shape.
        queues: queue_id → queue, at least those of the groups.
        policy: Bounds.

    Raises:
        KeyError: A group's queue is missing.
        ValueError: A group's candidates are out of order.
    """
    return plan_on(Ground(fleet, policy.max_offers), groups, queues, policy)


def plan_on(ground: Ground, groups: Sequence[Group], queues: Mapping[int, Queue], policy: Policy) -> Plan:
    """Plans as :func:`plan` does, and takes what it grants from ``ground``."""
    cycle = Cycle(ground, groups, queues)
    grants: list[Grant] = []
    granted: dict[tuple[int, int], int] = {}
    reasons: dict[tuple[int, int], PendingReason] = {}
    # With no grants allowed nothing is asked of the cycle, which would take room for one.
    steps = cycle.steps() if policy.max_grants > 0 else iter(())
    for step in steps:
        key = (step.queue_id, step.shape_id)
        if isinstance(step, Closure):
            reasons[key] = step.reason
            continue
        grants.append(step)
        granted[key] = granted.get(key, 0) + 1
        if len(grants) >= policy.max_grants:
            break
    left = {
        (group.queue_id, group.shape_id): group.waiting - granted.get((group.queue_id, group.shape_id), 0)
        for group in groups
    }
    return Plan(
        grants=tuple(grants),
        unplaced=tuple(Unplaced(*key, reason, left[key]) for key, reason in sorted(reasons.items())),
        complete=all(key in reasons for key, count in left.items() if count > 0),
    )
