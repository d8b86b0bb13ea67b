"""The fleet as the leader knows it: agents, queues and what is free, between two reads of the database.

What this replica grants and what ends on it changes the picture at once; a
Hello, an operator's order, an expiry or another replica's word has it read anew,
and age does. It only ever errs towards less room: an end whose commit overlaps a
read may be in what was read, so its room is not counted twice but left to the
next read. What a wrong picture could still do, the claim refuses: a GPU that is
held, a session that has moved on, a job that is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from lessor_server.bells import Bells
from lessor_server.domain.shape import Shape
from lessor_server.planner.model import Grant, Policy, Queue
from lessor_server.planner.placement import Ground
from lessor_server.services.reading import Reading
from lessor_server.services.settling import Settling
from lessor_server.store.database import Database
from lessor_server.store.fleet_queries import load_fleet, load_queues

_SMALL_S = 0.02
"""A fleet that is read in less is small."""
_REST = 20
_SHORT_REST = 2
"""A read is followed by a rest of so many times what it took; a short one while jobs find no room or claims fail,
none once an operator has changed something."""


class _Held(NamedTuple):
    """What a lease holds."""

    agent_id: str
    queue_id: int
    shape: Shape
    gpu_uuids: tuple[str, ...]


class Picture:
    """Agents and queues. Used by the planning task, but for :meth:`mark`, :meth:`answered` and :meth:`ended`."""

    def __init__(self, database: Database, bells: Bells, policy: Policy) -> None:
        self._database = database
        self._bells = bells
        self._policy = policy
        self.ground: Ground | None = None
        """Agents and what is free on them; None: nothing is known."""
        self.queues: dict[int, Queue] = {}
        self._held: dict[int, _Held] = {}
        """lease_id → what it holds, of leases granted while this picture lives."""
        self._offers: dict[int, str] = {}
        """lease_id → agent, of those the agent has said nothing of."""
        self._reads = 0
        self._reading = False
        self._suspect = False
        """Room may be free that is not known of."""
        self._refuted = False
        """A claim did not give what was planned: an agent may have gone that is planned for again and again."""
        self._fleet_seen = self._orders_seen = 0
        self._last_read = Reading()
        self._settling = Settling()

    @property
    def is_small(self) -> bool:
        """The fleet is read in no time."""
        return self._last_read.took_s < _SMALL_S

    def drop(self) -> None:
        """Forgets everything: another replica led meanwhile, or a claim has an unknown outcome."""
        if self.ground is not None:
            self.ground.retire()
        self.ground = None
        self._held.clear()
        self._offers.clear()
        self._settling = Settling()
        # What is under way now belongs to the old picture.
        self._reads += 1

    def settled_in_s(self) -> float:
        """Returns for how many seconds at most nothing is to be granted, see :mod:`.settling`; 0: it may be."""
        return self._settling.left_s(asyncio.get_running_loop().time())

    def due_in_s(self, *, blocked: bool) -> float:
        """Returns in how many seconds it is to be read anew; 0: now.

        Args:
            blocked: Jobs found no room: room that is not known of matters.
        """
        if self.ground is None or self._orders_seen != self._bells.orders.count:
            return 0.0
        stale = self._refuted or self._fleet_seen != self._bells.fleet.count or (blocked and self._suspect)
        rest = _SHORT_REST if stale and (blocked or self._refuted) else _REST
        return self._last_read.due_in_s(stale=stale, rest=rest)

    async def read(self) -> None:
        """Reads agents and queues.

        Raises:
            DatabaseUnavailable: The picture stays as it was.
        """
        self._reads += 1
        self._reading = True
        self._suspect = self._refuted = False
        fleet_seen, orders_seen = self._bells.fleet.count, self._bells.orders.count
        expiries_seen = self._bells.expiries.count
        try:
            with self._last_read.timed():
                queues = await load_queues(self._database)
                fleet = await load_fleet(self._database)
        finally:
            self._reading = False
        self.queues = queues
        if self.ground is not None:
            self.ground.retire()
        self.ground = Ground(fleet, self._policy.max_offers)
        self._fleet_seen, self._orders_seen = fleet_seen, orders_seen
        heard = frozenset(agent.agent_id for agent in fleet if agent.fresh)
        self._settling.look(heard, expiries_seen, asyncio.get_running_loop().time())
        if len(self._held) > 1000 + 2 * sum(queue.running for queue in queues.values()):
            # Of leases that ended on other replicas nothing is heard here.
            self._held.clear()
            self._offers.clear()

    def granted(self, grants: Sequence[Grant], lease_ids: Mapping[int, int], shapes: Mapping[int, Shape]) -> None:
        """Takes what the claim made of a plan; the plan has taken the room already.

        Args:
            grants: As planned.
            lease_ids: job_id → lease_id of those that were claimed; the others' room is free again.
            shapes: shape_id → shape.
        """
        assert self.ground is not None
        running: dict[int, list[int]] = {}
        for grant in grants:
            shape = shapes[grant.shape_id]
            lease_id = lease_ids.get(grant.job_id)
            if lease_id is None:
                self._refuted = True
                self.ground.give_back(grant.agent_id, shape, grant.gpu_uuids)
                self.ground.answered(grant.agent_id)
                continue
            self._held[lease_id] = _Held(grant.agent_id, grant.queue_id, shape, grant.gpu_uuids)
            self._offers[lease_id] = grant.agent_id
            counted = running.setdefault(grant.queue_id, [0, 0])
            counted[0] += 1
            counted[1] += len(grant.gpu_uuids)
        self._count(running)

    def mark(self) -> int:
        """Returns what :meth:`answered` and :meth:`ended` need: call it before the commit they tell of begins."""
        return -1 if self._reading else self._reads

    def answered(self, mark: int, lease_ids: Iterable[int]) -> None:
        """Agents have said something of these leases: they are no longer offers."""
        if self.ground is None:
            return
        sure = mark == self._reads
        for lease_id in lease_ids:
            agent_id = self._offers.pop(lease_id, None)
            if agent_id is not None:
                if sure:
                    self.ground.answered(agent_id)
                else:
                    self._suspect = True

    def ended(self, mark: int, lease_ids: Iterable[int]) -> None:
        """These leases hold nothing any more."""
        if self.ground is None:
            return
        sure = mark == self._reads
        ended: dict[int, list[int]] = {}
        for lease_id in lease_ids:
            held = self._held.pop(lease_id, None)
            if held is None or not sure:
                self._suspect = True
                continue
            self.ground.give_back(held.agent_id, held.shape, held.gpu_uuids)
            counted = ended.setdefault(held.queue_id, [0, 0])
            counted[0] -= 1
            counted[1] -= len(held.gpu_uuids)
        self._count(ended)

    def _count(self, changes: Mapping[int, Sequence[int]]) -> None:
        for queue_id, (running, gpus) in changes.items():
            queue = self.queues.get(queue_id)
            if queue is not None:
                self.queues[queue_id] = replace(queue, running=queue.running + running, gpus=queue.gpus + gpus)
