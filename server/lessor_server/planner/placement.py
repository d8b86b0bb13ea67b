"""The best place for each shape.

Shapes share the orders of :mod:`.order`. A shape for which most of its order
turns out too small gets a heap of its own, of the agents with room for it, best
fit first; there an agent whose room changed is scored again when the shape next
has its turn. Either way a job costs what changed since the last one, not the
size of the fleet. Within a cycle room only shrinks: a shape that no agent can
take is done with. Between cycles it is given back.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence, Set

from lessor_server.domain.shape import Selector, Shape
from lessor_server.planner.fit import (
    Filter,
    Shortfall,
    hardware_shortfalls,
    selector_shortfalls,
    without,
)
from lessor_server.planner.model import Agent
from lessor_server.planner.order import Order, Wanted
from lessor_server.planner.reasons import PendingReason
from lessor_server.planner.room import Room

_Entry = tuple[int, int, int, int, int]
"""GPUs, milli-CPUs and bytes left over; number of the agent; version of its room. Smaller is a better fit."""

_CHANGES_KEPT = 1000
"""At least so many changes of rooms are remembered, and as many as there are rooms; a shape that has missed more is
ranked anew."""
_LOOKS_IN_VAIN = 1
"""So many times the fleet is looked at in vain before a shape gets a heap of its own, which costs one more look."""
_RANKINGS_KEPT = 20_000
_ENTRIES_KEPT = 2_000_000
"""Of all orders together."""


class Ranking:
    """Agents with room for one shape, best fit first."""

    __slots__ = ("_fits_idle", "_ground", "_heap", "_in_vain", "_seen", "_wanted", "kinds", "shape")

    def __init__(self, ground: Ground, shape: Shape) -> None:
        self.shape = shape
        self.kinds = ground.kinds_for(shape)
        self._ground = ground
        self._wanted = ground.wanted(shape, self.kinds)
        self._fits_idle: dict[int, bool] = {}
        """make → whether its hardware does."""
        self._in_vain = 0
        self._heap: list[_Entry] | None = None
        """Its own, while looking along the order is in vain too often."""
        self._seen = 0

    def best(self) -> Room | None:
        """Returns the room to take; None: no agent has room."""
        if self._heap is not None and self._catch_up():
            return self._top(self._heap)
        room, in_vain = self._order.first_fit(self.shape)
        self._in_vain += in_vain
        if self._in_vain > _LOOKS_IN_VAIN * len(self._ground.rooms):
            self._score_all()
        return room

    @property
    def _order(self) -> Order:
        return self._ground.order(self._wanted, self.shape)

    def _score_all(self) -> None:
        self._seen = self._ground.changed
        self._heap = [entry for room in self._ground.rooms if (entry := self._entry(room)) is not None]
        heapq.heapify(self._heap)

    def _catch_up(self) -> bool:
        """Scores the rooms that changed; returns False if there are so many that the heap is given up."""
        assert self._heap is not None
        ground = self._ground
        if self._seen == ground.changed:
            return True
        changes = ground.changes_since(self._seen)
        if changes is None or len(self._heap) > 4 * len(ground.rooms) + 64:
            self._heap, self._in_vain = None, 0
            return False
        for number in changes:
            entry = self._entry(ground.rooms[number])
            if entry is not None:
                heapq.heappush(self._heap, entry)
        self._seen = ground.changed
        return True

    def _top(self, heap: list[_Entry]) -> Room | None:
        rooms = self._ground.rooms
        while heap:
            best = heap[0]
            if rooms[best[3]].version == best[4]:
                return rooms[best[3]]
            heapq.heappop(heap)
        return None

    def took(self, room: Room) -> None:
        """Scores the room that :meth:`best` gave again, after a job of this very shape was placed there."""
        heap, changed = self._heap, self._ground.changed
        if not heap or self._seen != changed - 1 or heap[0][3] != room.number:
            return
        entry = self._entry(room)
        if entry is None:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, entry)
        self._seen = changed

    def fits_somewhere(self) -> bool:
        """Returns whether some agent that takes jobs would have room when idle."""
        return any(self._does_idle(make, agent) for make, agent in self._order.makes.items())

    def shortfalls(self, room: Room) -> list[Shortfall]:
        """Returns what the room lacks now, of an agent that fits when idle."""
        shape, found = self.shape, []
        gpus_free = room.gpus_of(self.kinds)
        if gpus_free < shape.gpu_count:
            found.append(Shortfall(Filter.GPUS, shape.gpu_count, gpus_free))
        if shape.cpu_millis and room.cpu_free < shape.cpu_millis:
            found.append(Shortfall(Filter.CPU, shape.cpu_millis, max(room.cpu_free, 0)))
        if shape.memory_bytes and room.memory_free < shape.memory_bytes:
            found.append(Shortfall(Filter.MEMORY, shape.memory_bytes, max(room.memory_free, 0)))
        if room.offers_left <= 0:
            found.append(Shortfall(Filter.OFFERS))
        return found

    def capable(self, room: Room) -> bool:
        """Returns whether the room's agent fits when idle."""
        return self._order.holds(room) and self._does_idle(room.make, room.agent)

    def _does_idle(self, make: int, agent: Agent) -> bool:
        does = self._fits_idle.get(make)
        if does is None:
            does = self._fits_idle[make] = without(hardware_shortfalls(agent, self.shape))
        return does

    def _entry(self, room: Room) -> _Entry | None:
        """Returns the room's place in the heap; None: it cannot take the shape.

        The same tests as :meth:`shortfalls`, without building what to tell: this runs for every agent.
        """
        shape = self.shape
        if room.offers_left <= 0:
            return None
        if shape.gpu_count:
            gpus_left = room.gpus_of(self.kinds) - shape.gpu_count
            if gpus_left < 0:
                return None
        else:
            gpus_left = len(room.free_gpus)
        # What needs none of a resource fits even where the use exceeds what is
        # there, as after a restart of the agent with less.
        if shape.cpu_millis and room.cpu_free < shape.cpu_millis:
            return None
        if shape.memory_bytes and room.memory_free < shape.memory_bytes:
            return None
        if not self._order.holds(room):
            return None
        cpu_left, memory_left = room.cpu_free - shape.cpu_millis, room.memory_free - shape.memory_bytes
        return (gpus_left, cpu_left, memory_left, room.number, room.version)


class Ground:
    """The room of all agents that take jobs.

    What it knows of the agents themselves is as of its making; what is free on
    them follows :meth:`take`, :meth:`give_back` and :meth:`answered`.
    """

    def __init__(self, fleet: Iterable[Agent], max_offers: int) -> None:
        self._kinds: dict[tuple[str, int], int] = {}
        """(model, memory in bytes) → kind of GPU."""
        self._makes: dict[object, int] = {}
        self._mismatches: dict[tuple[Selector, ...], frozenset[int]] = {}
        self._rankings: dict[int, Ranking] = {}
        self._wanted: dict[Wanted, int] = {}
        """Kind of agent → its number."""
        self._orders: dict[int, Order] = {}
        self._changes: list[int] = []
        """Numbers of the rooms that changed, in order; the oldest may be left out."""
        self._forgotten = 0
        connected = [agent for agent in fleet if agent.fresh]
        self._connected = bool(connected)
        self._runtimes: frozenset[str] = frozenset().union(*(agent.runtimes for agent in connected))
        """Runtimes of all connected agents, those drained included."""
        takers = sorted((agent for agent in connected if not agent.drained), key=lambda agent: agent.agent_id)
        for agent in takers:
            for gpu in agent.gpus:
                self._kinds.setdefault((gpu.model, gpu.memory_bytes), len(self._kinds))
        # Rooms do not know their ground: a fleet in a cycle is garbage that only the collector finds.
        self.rooms = [
            Room(agent, number, max_offers, self._make_of(agent), self._kinds) for number, agent in enumerate(takers)
        ]
        self._by_agent = {room.agent.agent_id: room for room in self.rooms}

    def ranking(self, shape_id: int, shape: Shape) -> Ranking:
        """Returns the ranking for a shape, made on first use."""
        ranking = self._rankings.get(shape_id)
        if ranking is None:
            if len(self._rankings) >= _RANKINGS_KEPT:
                # The one made first; a shape that is asked for again is ranked again.
                del self._rankings[next(iter(self._rankings))]
            ranking = self._rankings[shape_id] = Ranking(self, shape)
        return ranking

    def wanted(self, shape: Shape, gpu_kinds: frozenset[int]) -> int:
        """Returns the number of the kind of agent that ``shape`` asks for."""
        wanted = Wanted(
            shape.runtime,
            shape.needs_user,
            shape.max_heartbeat_ms,
            shape.selectors,
            gpu_kinds if shape.gpu_count else None,
        )
        return self._wanted.setdefault(wanted, len(self._wanted))

    def order(self, wanted: int, shape: Shape) -> Order:
        """Returns the order of the agents that ``shape``, and all that wants the same kind, may be placed on."""
        order = self._orders.get(wanted)
        if order is None:
            if self._orders and len(self._orders) * len(self.rooms) >= _ENTRIES_KEPT:
                del self._orders[next(iter(self._orders))]
            gpu_kinds = self.kinds_for(shape) if shape.gpu_count else None
            order = self._orders[wanted] = Order(self, gpu_kinds, shape, self.mismatched(shape))
        return order

    def retire(self) -> None:
        """Lets go of what knows its ground: without it that is freed as soon as nobody uses it."""
        self._rankings.clear()
        self._orders.clear()

    @property
    def changed(self) -> int:
        """How many changes of rooms there were."""
        return self._forgotten + len(self._changes)

    def changes_since(self, count: int) -> Set[int] | Sequence[int] | None:
        """Returns the numbers of the rooms that changed since :attr:`changed` was ``count``; None: too long ago."""
        if count < self._forgotten:
            return None
        if self.changed - count == 1:
            return self._changes[-1:]
        return set(self._changes[count - self._forgotten :])

    def take(self, room: Room, ranking: Ranking) -> tuple[str, ...]:
        """Takes room for one job, and returns the UUIDs of its GPUs."""
        gpu_uuids = room.take(ranking.shape, ranking.kinds)
        self._note(room)
        ranking.took(room)
        return gpu_uuids

    def give_back(self, agent_id: str, shape: Shape, gpu_uuids: Iterable[str]) -> None:
        """Gives back what a job had taken on an agent; nothing happens where the agent takes no jobs."""
        room = self._by_agent.get(agent_id)
        if room is not None:
            room.give_back(shape, gpu_uuids)
            self._note(room)

    def answered(self, agent_id: str) -> None:
        """Counts one offer less that waits for this agent's word."""
        room = self._by_agent.get(agent_id)
        if room is not None:
            room.answered()
            self._note(room)

    def _note(self, room: Room) -> None:
        self._changes.append(room.number)
        keep = max(_CHANGES_KEPT, len(self.rooms))
        if len(self._changes) > 2 * keep:
            self._forgotten += len(self._changes) - keep
            del self._changes[:-keep]

    def kinds_for(self, shape: Shape) -> frozenset[int]:
        """Returns the kinds of GPU that would do for ``shape``."""
        return frozenset(kind for (model, memory), kind in self._kinds.items() if shape.takes_gpu(model, memory))

    def mismatched(self, shape: Shape) -> frozenset[int]:
        """Returns the numbers of the rooms whose agent's labels do not match the shape's selectors."""
        numbers = self._mismatches.get(shape.selectors)
        if numbers is None:
            numbers = frozenset(
                room.number for room in self.rooms if not without(selector_shortfalls(room.agent, shape))
            )
            self._mismatches[shape.selectors] = numbers
        return numbers

    def unplaceable_reason(self, ranking: Ranking) -> PendingReason:
        """Returns why the shape of ``ranking``, for which no agent has room, cannot be placed."""
        if not self._connected:
            return PendingReason.NO_AGENT_CONNECTED
        if ranking.shape.runtime not in self._runtimes:
            return PendingReason.NO_AGENT_WITH_RUNTIME
        if ranking.fits_somewhere():
            return PendingReason.FITS_BUT_BUSY
        return PendingReason.NO_AGENT_FITS_EVER

    def _make_of(self, agent: Agent) -> int:
        gpus = tuple((gpu.model, gpu.memory_bytes) for gpu in agent.gpus)
        make = (
            agent.runtimes,
            agent.can_set_user,
            agent.heartbeat_ms,
            agent.cpu_millis,
            agent.memory_bytes,
            tuple(sorted(gpus)),
        )
        return self._makes.setdefault(make, len(self._makes))
