"""The filters: what an agent or a queue lacks for a shape.

Planning and explaining ask the same functions, so that a job cannot start
against its explanation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from lessor_server.domain.shape import Selector, Shape
from lessor_server.planner.model import Agent, Queue
from lessor_server.planner.reasons import PendingReason


class Filter(StrEnum):
    """What an agent can lack, in the order it is told."""

    RUNTIME = "runtime"
    SELECTOR = "selector"
    GPUS = "gpus"
    """Too few GPUs, of whatever kind."""
    GPU_MODEL = "gpu_model"
    """Enough GPUs, too few of the model."""
    GPU_MEMORY = "gpu_memory"
    """Enough GPUs of the model, too few with the memory."""
    CPU = "cpu"
    MEMORY = "memory"
    USER = "user"
    """Its runtime cannot run a job as another user."""
    HEARTBEAT = "heartbeat"
    """It renews too rarely for the job's ttl."""
    DRAINED = "drained"
    OFFERS = "offers"
    """It has as many unaccepted offers as it may."""


@dataclass(frozen=True, slots=True)
class Shortfall:
    """One thing an agent lacks for a shape."""

    filter: Filter
    needed: int = 0
    """In the filter's unit: GPUs, milli-CPUs, bytes, ms."""
    available: int = 0
    """What the agent has of it, in the same unit; with GPU filters: GPUs that match in full."""
    selector: Selector | None = None
    """The selector that does not match."""
    gpus: int = 0
    """With GPU_MODEL and GPU_MEMORY: GPUs that would do without that condition, at most ``needed``; 0: not told."""
    gpu_memory_bytes: int | None = None
    """With GPU_MODEL and GPU_MEMORY: memory that ``gpus`` of them have; None: no less need be asked for."""


def runtime_shortfalls(agent: Agent, shape: Shape) -> Iterator[Shortfall]:
    """Yields what the agent's software lacks: runtime, user switching, frequent renewals."""
    if shape.runtime not in agent.runtimes:
        yield Shortfall(Filter.RUNTIME)
    elif shape.needs_user and shape.runtime not in agent.can_set_user:
        yield Shortfall(Filter.USER)
    if agent.heartbeat_ms > shape.max_heartbeat_ms:
        yield Shortfall(Filter.HEARTBEAT, shape.max_heartbeat_ms, agent.heartbeat_ms)


def selector_shortfalls(agent: Agent, shape: Shape) -> Iterator[Shortfall]:
    """Yields each selector that the agent's labels do not match."""
    for selector in shape.selectors:
        if not selector.matches(agent.labels):
            yield Shortfall(Filter.SELECTOR, selector=selector)


def hardware_shortfalls(agent: Agent, shape: Shape) -> Iterator[Shortfall]:
    """Yields what the agent's hardware lacks even when idle."""
    if shape.cpu_millis > agent.cpu_millis:
        yield Shortfall(Filter.CPU, shape.cpu_millis, max(agent.cpu_millis, 0))
    if shape.memory_bytes > agent.memory_bytes:
        yield Shortfall(Filter.MEMORY, shape.memory_bytes, max(agent.memory_bytes, 0))
    if shape.gpu_count:
        matching = sum(shape.takes_gpu(gpu.model, gpu.memory_bytes) for gpu in agent.gpus)
        if matching < shape.gpu_count:
            yield _gpu_shortfall(agent, shape, matching)


def _gpu_shortfall(agent: Agent, shape: Shape, matching: int) -> Shortfall:
    """Returns which GPU condition is the one to change, when only ``matching`` GPUs (too few) meet them all."""
    needed = shape.gpu_count
    memories = sorted((gpu.memory_bytes for gpu in agent.gpus), reverse=True)
    of_model = sorted((gpu.memory_bytes for gpu in agent.gpus if shape.gpu_model in gpu.model.casefold()), reverse=True)
    with_memory = sum(memory >= shape.gpu_memory_bytes for memory in memories)
    if not memories or (matching and len(memories) < needed):
        return Shortfall(Filter.GPUS, needed, matching)
    if matching:
        if len(of_model) < needed:
            return Shortfall(Filter.GPU_MODEL, needed, matching, gpus=needed if with_memory >= needed else 0)
        return Shortfall(Filter.GPU_MEMORY, needed, matching, gpus=needed, gpu_memory_bytes=of_model[needed - 1])
    # Not one GPU matches, so a smaller count is no help: the kind must change.
    if of_model:
        usable = min(needed, len(of_model))
        return Shortfall(Filter.GPU_MEMORY, needed, 0, gpus=usable, gpu_memory_bytes=of_model[usable - 1])
    if with_memory:
        return Shortfall(Filter.GPU_MODEL, needed, 0, gpus=min(needed, with_memory))
    usable = min(needed, len(memories))
    return Shortfall(Filter.GPU_MODEL, needed, 0, gpus=usable, gpu_memory_bytes=memories[usable - 1])


def idle_shortfalls(agent: Agent, shape: Shape) -> list[Shortfall]:
    """Returns everything the agent lacks for ``shape`` were it connected and idle, a drain included.

    In the order of :class:`Filter`.
    """
    found = [
        *runtime_shortfalls(agent, shape),
        *selector_shortfalls(agent, shape),
        *hardware_shortfalls(agent, shape),
    ]
    if agent.drained:
        found.append(Shortfall(Filter.DRAINED))
    order = list(Filter)
    return sorted(found, key=lambda shortfall: order.index(shortfall.filter))


def without(shortfalls: Iterable[Shortfall]) -> bool:
    """Returns whether there are none, looking no further than the first."""
    return next(iter(shortfalls), None) is None


def at_running_limit(queue: Queue, running: int) -> bool:
    """Returns whether a queue with ``running`` leases may have no other."""
    return queue.max_running is not None and running >= queue.max_running


def at_gpu_limit(queue: Queue, gpus: int, shape: Shape) -> bool:
    """Returns whether a queue that holds ``gpus`` may not hold those of ``shape`` as well.

    A job without GPUs is never kept back by it.
    """
    return queue.max_gpus is not None and shape.gpu_count > 0 and gpus + shape.gpu_count > queue.max_gpus


def queue_reason(queue: Queue, running: int, gpus: int, shape: Shape) -> PendingReason | None:
    """Returns why the queue keeps a job of ``shape`` back; None: it does not.

    Args:
        queue: The queue.
        running: Its leases, those of this cycle included.
        gpus: The GPUs it holds, those of this cycle included.
        shape: The job's.
    """
    if queue.paused:
        return PendingReason.QUEUE_PAUSED
    if at_running_limit(queue, running) or at_gpu_limit(queue, gpus, shape):
        return PendingReason.QUEUE_LIMIT
    return None
