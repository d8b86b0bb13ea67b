"""GPUs that are not there: for trying Lessor, and its scheduling, on a host that has none."""

from __future__ import annotations

import uuid

from lessor_agent.gpus.inventory import Gpu, GpuReading

FAKE_MODEL = "Fake GPU"
FAKE_MEMORY_BYTES = 80 * 2**30
MAX_FAKE_GPUS = 1024

_NAMESPACE = uuid.UUID("6a3d1c5e-0f0b-5b1e-9c57-9d1f7a2f6b10")


class FakeGpus:
    """A number of pretended, always idle GPUs. A :class:`GpuInventory`.

    Their UUIDs are made from the agent's id: the same after a restart, and no two
    agents have one in common. No CUDA program finds a device under them.
    """

    def __init__(
        self, count: int, *, agent_id: str, model: str = FAKE_MODEL, memory_bytes: int = FAKE_MEMORY_BYTES
    ) -> None:
        """Makes ``count`` GPUs, 0 … 1024.

        Raises:
            ValueError: The count or the memory is out of range.
        """
        if not 0 <= count <= MAX_FAKE_GPUS:
            raise ValueError(f"{count} fake GPUs: give a number from 0 to {MAX_FAKE_GPUS}")
        if memory_bytes <= 0:
            raise ValueError(f"fake GPUs with {memory_bytes} bytes of memory: give a positive number")
        self._gpus = [
            Gpu(f"GPU-{uuid.uuid5(_NAMESPACE, f'{agent_id}/{index}')}", index, model, memory_bytes)
            for index in range(count)
        ]
        self._found: list[Gpu] = []

    def discover(self) -> list[Gpu]:
        """Returns all of them, by index."""
        self._found = self._gpus
        return list(self._gpus)

    def read(self) -> list[GpuReading]:
        """Returns that all of them are idle."""
        return [GpuReading(gpu.uuid, 0, 0) for gpu in self._found]

    def close(self) -> None:
        """Forgets that they were found."""
        self._found = []
