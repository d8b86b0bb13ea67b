"""Room on agents, and the best place for each shape.

Each shape keeps a heap of the agents with room for it, best fit first; an agent
whose room changed is scored again when the shape next has its turn, so a job
costs what changed since the last job of its shape, not the size of the fleet.
Within a cycle room only shrinks: a shape that no agent can take is done with.
Between cycles it is given back.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterable, Mapping

from lessor_server.domain.shape import Selector, Shape
from lessor_server.planner.fit import (
    Filter,
    Shortfall,
    hardware_shortfalls,
    runtime_shortfalls,
    selector_shortfalls,
    without,
)
from lessor_server.planner.model import Agent, Gpu
from lessor_server.planner.reasons import PendingReason

_Entry = tuple[int, int, int, int, int]
"""GPUs, milli-CPUs and bytes left over; number of the agent; version of its room. Smaller is a better fit."""

_CHANGES_KEPT = 1000
"""At least so many changes of rooms are remembered, and as many as there are rooms; a shape that has missed more is
ranked anew."""
_RANKINGS_KEPT = 20_000


class Room:
    """What is free on one agent that takes jobs."""

    __slots__ = (
        "_kinds",
        "agent",
        "cpu_free",
        "free_gpus",
        "gpu_kinds",
        "make",
        "memory_free",
        "number",
        "offers_left",
        "version",
    )

    def __init__(
        self, agent: Agent, number: int, max_offers: int, make: int, kinds: Mapping[tuple[str, int], int]
    ) -> None:
        """``kinds`` is (model, memory in bytes) → kind, of all GPUs of the agent."""
        self.agent = agent
        self.number = number
        """Position in the fleet, by id: what breaks ties."""
        self.make = make
        """Agents of one make differ in nothing but id, labels and use."""
        self.version = 0
        """Grows with each change."""
        self.cpu_free = agent.cpu_millis - agent.cpu_millis_used
        self.memory_free = agent.memory_bytes - agent.memory_bytes_used
        self.offers_left = max_offers - agent.offers
        self.free_gpus: list[tuple[int, Gpu]] = sorted(
            ((kinds[gpu.model, gpu.memory_bytes], gpu) for gpu in agent.gpus if gpu.uuid not in agent.gpus_used),
            key=_smallest_first,
        )
        """(kind, GPU), smallest memory first, then by index."""
        self.gpu_kinds: dict[int, int] = {}
        """kind → free GPUs of it."""
        for kind, _ in self.free_gpus:
            self.gpu_kinds[kind] = self.gpu_kinds.get(kind, 0) + 1
        self._kinds = kinds

    def take(self, shape: Shape, kinds: frozenset[int]) -> tuple[str, ...]:
        """Takes what ``shape`` needs, and returns the UUIDs of its GPUs by index on the host.

        GPUs come from the smallest that do, then by lowest index. The room must suffice.
        """
        self.version += 1
        self.offers_left -= 1
        self.cpu_free -= shape.cpu_millis
        self.memory_free -= shape.memory_bytes
        if not shape.gpu_count:
            return ()
        taken: list[Gpu] = []
        kept: list[tuple[int, Gpu]] = []
        for item in self.free_gpus:
            kind, gpu = item
            if len(taken) < shape.gpu_count and kind in kinds:
                taken.append(gpu)
                self.gpu_kinds[kind] -= 1
            else:
                kept.append(item)
        self.free_gpus = kept
        return tuple(gpu.uuid for gpu in sorted(taken, key=lambda gpu: (gpu.index, gpu.uuid)))

    def give_back(self, shape: Shape, gpu_uuids: Iterable[str]) -> None:
        """Gives back what :meth:`take` took, but for the offer."""
        self.version += 1
        self.cpu_free += shape.cpu_millis
        self.memory_free += shape.memory_bytes
        returned = frozenset(gpu_uuids)
        if not returned:
            return
        free = {gpu.uuid for _, gpu in self.free_gpus}
        for gpu in self.agent.gpus:
            if gpu.uuid in returned and gpu.uuid not in free:
                kind = self._kinds[gpu.model, gpu.memory_bytes]
                insort(self.free_gpus, (kind, gpu), key=_smallest_first)
                self.gpu_kinds[kind] = self.gpu_kinds.get(kind, 0) + 1

    def answered(self) -> None:
        """Counts one offer less that waits for the agent's word."""
        self.version += 1
        self.offers_left += 1


def _smallest_first(item: tuple[int, Gpu]) -> tuple[int, int, str]:
    _, gpu = item
    return gpu.memory_bytes, gpu.index, gpu.uuid


class Ranking:
    """Agents with room for one shape, best fit first."""

    __slots__ = ("_capable", "_fits_somewhere", "_ground", "_heap", "_mismatched", "_seen", "kinds", "shape")

    def __init__(self, ground: Ground, shape: Shape) -> None:
        self.shape = shape
        self.kinds = ground.kinds_for(shape)
        self._ground = ground
        self._capable: dict[int, bool] = {}
        """make → whether its runtimes and hardware do."""
        self._mismatched = ground.mismatched(shape)
        self._fits_somewhere: bool | None = None
        self._seen = 0
        self._heap: list[_Entry] = []
        self._score_all()

    def _score_all(self) -> None:
        self._seen = self._ground.changed
        self._heap = [entry for room in self._ground.rooms if (entry := self._entry(room)) is not None]
        heapq.heapify(self._heap)

    def best(self) -> Room | None:
        """Returns the room to take; None: no agent has room."""
        ground = self._ground
        rooms = ground.rooms
        if self._seen != ground.changed:
            changes = ground.changes_since(self._seen)
            if changes is None or len(self._heap) > 4 * len(rooms) + 64:
                self._score_all()
            else:
                for number in changes:
                    entry = self._entry(rooms[number])
                    if entry is not None:
                        heapq.heappush(self._heap, entry)
                self._seen = ground.changed
        heap = self._heap
        while heap:
            best = heap[0]
            if rooms[best[3]].version == best[4]:
                return rooms[best[3]]
            heapq.heappop(heap)
        return None

    def took(self, room: Room) -> None:
        """Scores the room that :meth:`best` gave again, after a job of this very shape was placed there."""
        ground = self._ground
        if self._seen != ground.changed - 1 or not self._heap or self._heap[0][3] != room.number:
            return
        entry = self._entry(room)
        if entry is None:
            heapq.heappop(self._heap)
        else:
            heapq.heapreplace(self._heap, entry)
        self._seen = ground.changed

    def fits_somewhere(self) -> bool:
        """Returns whether some agent that takes jobs would have room when idle."""
        if self._fits_somewhere is None:
            self._fits_somewhere = any(self.capable(room) for room in self._ground.rooms)
        return self._fits_somewhere

    def shortfalls(self, room: Room) -> list[Shortfall]:
        """Returns what the room lacks now, of an agent that fits when idle."""
        shape, found = self.shape, []
        if self._gpus_free(room) < shape.gpu_count:
            found.append(Shortfall(Filter.GPUS, shape.gpu_count, self._gpus_free(room)))
        if shape.cpu_millis and room.cpu_free < shape.cpu_millis:
            found.append(Shortfall(Filter.CPU, shape.cpu_millis, max(room.cpu_free, 0)))
        if shape.memory_bytes and room.memory_free < shape.memory_bytes:
            found.append(Shortfall(Filter.MEMORY, shape.memory_bytes, max(room.memory_free, 0)))
        if room.offers_left <= 0:
            found.append(Shortfall(Filter.OFFERS))
        return found

    def capable(self, room: Room) -> bool:
        """Returns whether the room's agent fits when idle."""
        capable = self._capable.get(room.make)
        if capable is None:
            capable = without(runtime_shortfalls(room.agent, self.shape)) and without(
                hardware_shortfalls(room.agent, self.shape)
            )
            self._capable[room.make] = capable
        return capable and room.number not in self._mismatched

    def _gpus_free(self, room: Room) -> int:
        free = 0
        for kind, count in room.gpu_kinds.items():
            if kind in self.kinds:
                free += count
        return free

    def _entry(self, room: Room) -> _Entry | None:
        """Returns the room's place in the heap; None: it cannot take the shape.

        The same tests as :meth:`shortfalls`, without building what to tell: this runs for every agent.
        """
        shape = self.shape
        if room.offers_left <= 0:
            return None
        if shape.gpu_count:
            gpus_left = self._gpus_free(room) - shape.gpu_count
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
        if not self.capable(room):
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

    def retire(self) -> None:
        """Lets go of the rankings, which know their ground: without them it is freed as soon as nobody uses it."""
        self._rankings.clear()

    @property
    def changed(self) -> int:
        """How many changes of rooms there were."""
        return self._forgotten + len(self._changes)

    def changes_since(self, count: int) -> Iterable[int] | None:
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
