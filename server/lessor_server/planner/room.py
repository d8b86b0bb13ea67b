"""What is free on one agent."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Mapping

from lessor_server.domain.shape import Shape
from lessor_server.planner.model import Agent, Gpu


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

    def gpus_of(self, kinds: frozenset[int]) -> int:
        """Returns how many GPUs of these kinds are free."""
        free = 0
        for kind, count in self.gpu_kinds.items():
            if kind in kinds:
                free += count
        return free

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
