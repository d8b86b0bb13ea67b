"""What the agent asks about GPUs, whoever answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, as it is leased."""

    uuid: str
    """As the driver prints it ("GPU-…"); what CUDA_VISIBLE_DEVICES takes."""
    index: int
    """Its number on this host, which may change at the next boot."""
    model: str
    """Model name; empty when the driver does not tell."""
    memory_bytes: int
    """Total memory; 0: the driver does not tell."""


@dataclass(frozen=True, slots=True)
class GpuReading:
    """What one GPU does right now."""

    uuid: str
    utilization_percent: int
    """0 … 100; 0 too where the GPU does not tell."""
    memory_used_bytes: int
    """0 too where the GPU does not tell."""


class GpuInventory(Protocol):
    """Where GPUs come from.

    All methods are plain and blocking: a driver that is unwell may keep a call for
    many seconds. The agent calls them in a thread of their own, never on its event
    loop, so that no GPU can hold up a heartbeat. They never raise on account of the
    driver or a GPU, and may be called from any thread.
    """

    def discover(self) -> list[Gpu]:
        """Returns the GPUs that can be leased, by index. Asks anew at each call; [] when there are none."""
        ...

    def read(self) -> list[GpuReading]:
        """Returns a reading of each GPU of the last :meth:`discover` that answers."""
        ...

    def close(self) -> None:
        """Lets go of the driver. Afterwards :meth:`read` returns [] until the next :meth:`discover`."""
        ...
