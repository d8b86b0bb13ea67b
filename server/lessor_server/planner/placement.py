"""Room on agents during one planning cycle, and the best place for each shape.

Room only shrinks within a cycle. So an agent that cannot take a shape is never
looked at again for it, and a shape that no agent can take is closed for good.
Each shape keeps a heap of the agents with room for it, best fit first; an agent
whose room changed is scored again when the shape next has its turn, so a job
costs what changed since the last job of its shape, not the size of the fleet.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable

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


class Room:
    """What is free on one agent that takes jobs."""

    __slots__ = (
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
        self, agent: Agent, number: int, max_offers: int, make: int, kind_of: Callable[[str, int], int]
    ) -> None:
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
            ((kind_of(gpu.model, gpu.memory_bytes), gpu) for gpu in agent.gpus if gpu.uuid not in agent.gpus_used),
            key=lambda item: (item[1].memory_bytes, item[1].index, item[1].uuid),
        )
        """(kind, GPU), smallest memory first, then by index."""
        self.gpu_kinds: dict[int, int] = {}
        """kind → free GPUs of it."""
        for kind, _ in self.free_gpus:
            self.gpu_kinds[kind] = self.gpu_kinds.get(kind, 0) + 1

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


class Ranking:
    """Agents with room for one shape, best fit first."""

    __slots__ = ("_capable", "_ground", "_heap", "_mismatched", "_seen", "kinds", "shape")

    def __init__(self, ground: Ground, shape: Shape) -> None:
        self.shape = shape
        self.kinds = ground.kinds_for(shape)
        self._ground = ground
        self._capable: dict[int, bool] = {}
        """make → whether its runtimes and hardware do."""
        self._mismatched = ground.mismatched(shape)
        self._seen = len(ground.changes)
        self._heap: list[_Entry] = [entry for room in ground.rooms if (entry := self._entry(room)) is not None]
        heapq.heapify(self._heap)

    def best(self) -> Room | None:
        """Returns the room to take; None: no agent has room, nor will in this cycle."""
        rooms, changes = self._ground.rooms, self._ground.changes
        if self._seen < len(changes):
            for number in set(changes[self._seen :]):
                entry = self._entry(rooms[number])
                if entry is not None:
                    heapq.heappush(self._heap, entry)
            self._seen = len(changes)
        while self._heap:
            *_, number, version = self._heap[0]
            if rooms[number].version == version:
                return rooms[number]
            heapq.heappop(self._heap)
        return None

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
    """The room of all agents that take jobs."""

    def __init__(self, fleet: Iterable[Agent], max_offers: int) -> None:
        self._kinds: dict[tuple[str, int], int] = {}
        """(model, memory in bytes) → kind of GPU."""
        self._makes: dict[object, int] = {}
        self._mismatches: dict[tuple[Selector, ...], frozenset[int]] = {}
        self._rankings: dict[int, Ranking] = {}
        self.changes: list[int] = []
        """Numbers of the rooms that changed, in order."""
        connected = [agent for agent in fleet if agent.fresh]
        self._connected = bool(connected)
        self._runtimes: frozenset[str] = frozenset().union(*(agent.runtimes for agent in connected))
        """Runtimes of all connected agents, those drained included."""
        takers = sorted((agent for agent in connected if not agent.drained), key=lambda agent: agent.agent_id)
        self.rooms = [
            Room(agent, number, max_offers, self._make_of(agent), self._kind_of) for number, agent in enumerate(takers)
        ]

    def ranking(self, shape_id: int, shape: Shape) -> Ranking:
        """Returns the ranking for a shape, made on first use."""
        ranking = self._rankings.get(shape_id)
        if ranking is None:
            ranking = self._rankings[shape_id] = Ranking(self, shape)
        return ranking

    def take(self, room: Room, ranking: Ranking) -> tuple[str, ...]:
        """Takes room for one job, and returns the UUIDs of its GPUs."""
        self.changes.append(room.number)
        return room.take(ranking.shape, ranking.kinds)

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
        if any(ranking.capable(room) for room in self.rooms):
            return PendingReason.FITS_BUT_BUSY
        return PendingReason.NO_AGENT_FITS_EVER

    def _kind_of(self, model: str, memory_bytes: int) -> int:
        return self._kinds.setdefault((model, memory_bytes), len(self._kinds))

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
