"""Agents by what is free on them, in one order for all shapes that ask for the same kind of agent.

What a job leaves over on an agent is what is free there less what the job
needs, so the best fit of every size comes from one and the same order: it is
the first from the job's needs on that has enough of everything. A fleet is
sorted once for thousands of shapes, and a change of a room moves one entry.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence, Set
from typing import NamedTuple, Protocol

from lessor_server.domain.shape import Selector, Shape
from lessor_server.planner.fit import runtime_shortfalls, without
from lessor_server.planner.model import Agent
from lessor_server.planner.room import Room

_Entry = tuple[int, int, int, int]
"""Free GPUs, milli-CPUs and bytes; number of the room."""

_ANY = -(1 << 63)
"""Less than is free on any agent, even one that has less than is used of it."""


class Wanted(NamedTuple):
    """The kind of agent that shapes ask for, whatever their size."""

    runtime: str
    needs_user: bool
    max_heartbeat_ms: int
    selectors: tuple[Selector, ...]
    gpu_kinds: frozenset[int] | None
    """Kinds of GPU that would do; None: no GPU is asked for."""


class Rooms(Protocol):
    """The rooms of a fleet and their changes."""

    @property
    def rooms(self) -> Sequence[Room]:
        """All of them; none comes or goes."""

    @property
    def changed(self) -> int:
        """How many changes of rooms there were."""

    def changes_since(self, count: int) -> Set[int] | Sequence[int] | None:
        """Returns the numbers of the rooms that changed since :attr:`changed` was ``count``; None: too long ago."""


class Order:
    """The rooms of one kind of agent that could take an offer, the fewest free GPUs first, then CPUs, then memory."""

    __slots__ = ("_eligible", "_entries", "_gpu_kinds", "_placed", "_rooms", "_seen", "makes")

    def __init__(self, rooms: Rooms, gpu_kinds: frozenset[int] | None, shape: Shape, mismatched: Set[int]) -> None:
        """
        Args:
            rooms: Those of the fleet.
            gpu_kinds: As of :class:`Wanted`.
            shape: Any that wants this kind of agent.
            mismatched: Numbers of the rooms whose agent's labels do not match.
        """
        self._rooms = rooms
        self._gpu_kinds = gpu_kinds
        runs: dict[int, bool] = {}
        self._eligible = bytearray(len(rooms.rooms))
        self.makes: dict[int, Agent] = {}
        """The makes of these agents, each with one of them."""
        for room in rooms.rooms:
            if room.make not in runs:
                runs[room.make] = without(runtime_shortfalls(room.agent, shape))
            if runs[room.make] and room.number not in mismatched:
                self._eligible[room.number] = 1
                self.makes.setdefault(room.make, room.agent)
        self._entries: list[_Entry] = []
        self._placed: list[_Entry | None] = []
        """Room → its entry."""
        self._seen = 0
        self._sort()

    def holds(self, room: Room) -> bool:
        """Returns whether the room's agent is of this kind."""
        return bool(self._eligible[room.number])

    def first_fit(self, shape: Shape) -> tuple[Room | None, int]:
        """Returns the room that ``shape`` fits best, None if it fits in none, and how many were looked at in vain."""
        self._catch_up()
        entries = self._entries
        gpus_needed, cpu_needed = shape.gpu_count, shape.cpu_millis or _ANY
        memory_needed = shape.memory_bytes or _ANY
        position = bisect_left(entries, (gpus_needed, cpu_needed, memory_needed))
        in_vain = 0
        while position < len(entries):
            gpus, cpu, memory, number = entries[position]
            if cpu < cpu_needed:
                # The last ones had more GPUs than needed: those of as many GPUs begin anew with few CPUs.
                position = bisect_left(entries, (gpus, cpu_needed, memory_needed), position + 1)
            elif memory < memory_needed:
                position = bisect_left(entries, (gpus, cpu, memory_needed), position + 1)
            else:
                return self._rooms.rooms[number], in_vain
            in_vain += 1
        return None, in_vain

    def _catch_up(self) -> None:
        if self._seen == self._rooms.changed:
            return
        changes = self._rooms.changes_since(self._seen)
        # To move an entry costs as much as to sort in a few.
        if changes is None or 4 * len(changes) > len(self._placed) + 64:
            self._sort()
            return
        self._move(changes)
        self._seen = self._rooms.changed

    def _sort(self) -> None:
        self._placed = [self._entry(room) for room in self._rooms.rooms]
        self._entries = sorted(entry for entry in self._placed if entry is not None)
        self._seen = self._rooms.changed

    def _move(self, numbers: Iterable[int]) -> None:
        rooms, entries, placed = self._rooms.rooms, self._entries, self._placed
        for number in numbers:
            old, new = placed[number], self._entry(rooms[number])
            if old == new:
                continue
            if old is not None:
                del entries[bisect_left(entries, old)]
            if new is not None:
                insort(entries, new)
            placed[number] = new

    def _entry(self, room: Room) -> _Entry | None:
        if room.offers_left <= 0 or not self._eligible[room.number]:
            return None
        gpus = len(room.free_gpus) if self._gpu_kinds is None else room.gpus_of(self._gpu_kinds)
        return (gpus, room.cpu_free, room.memory_free, room.number)
