"""What a planning cycle costs by itself: the planner's own function on a fleet and waiting jobs in memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from itertools import count

from benchmarks.report import Cell, median
from lessor_server.domain.shape import Shape
from lessor_server.planner.cycle import plan_on
from lessor_server.planner.model import Agent, Candidate, Group, Policy, Queue
from lessor_server.planner.placement import Ground

AGENTS = 64
_QUEUE_ID = 1
_POLICY = Policy()
_REPEATS = 5


def rows(shapes: Sequence[int], jobs: Sequence[int]) -> list[dict[str, Cell]]:
    """Times a cycle for so many shapes and waiting jobs.

    The groups are as the server's planner gets them: of each shape the first jobs, at most as many as a cycle may
    grant, and the number of all. On a free fleet a cycle grants as many as it may; on a full one it looks at every
    shape and grants nothing.
    """
    found: list[dict[str, Cell]] = []
    for shape_count in shapes:
        for job_count in jobs:
            groups = _groups(shape_count, job_count)
            free, granted = _cycle_ms(groups, busy=False)
            full, _ = _cycle_ms(groups, busy=True)
            found.append(
                {
                    "shapes": shape_count,
                    "jobs waiting": job_count,
                    "free fleet: granted": granted,
                    "ms": free,
                    "µs per grant": 1000 * free / max(1, granted),
                    "full fleet: ms": full,
                    "µs per shape": 1000 * full / len(groups),
                }
            )
    return found


def _cycle_ms(groups: Sequence[Group], *, busy: bool) -> tuple[float, int]:
    """Returns the median time of a cycle, and what it granted. Rankings are known, as they are from cycle to cycle."""
    queues = {_QUEUE_ID: Queue(_QUEUE_ID, "bench")}
    took = []
    granted = 0
    for _ in range(_REPEATS):
        ground = Ground(_fleet(busy=busy), _POLICY.max_offers)
        for group in groups:
            ground.ranking(group.shape_id, group.shape)
        gc.collect()
        began = time.perf_counter()
        granted = len(plan_on(ground, groups, queues, _POLICY).grants)
        took.append(1000 * (time.perf_counter() - began))
    return median(took), granted


def _fleet(*, busy: bool) -> list[Agent]:
    return [
        Agent(
            agent_id=f"agent-{number:03d}", name=f"agent-{number:03d}", session_id=number, epoch=1, labels={},
            runtimes=frozenset({"process"}), can_set_user=frozenset(), heartbeat_ms=5000, cpu_millis=10_000_000,
            memory_bytes=10_000 << 30, gpus=(), fresh=True, drained=False, cpu_millis_used=10_000_000 * busy,
        )
        for number in range(1, AGENTS + 1)
    ]  # fmt: skip


def _groups(shapes: int, jobs: int) -> list[Group]:
    """Jobs of the shapes in turn: all shapes have the same share, and each shape's jobs are of every age."""
    numbers = count(1)
    candidates: list[list[Candidate]] = [[] for _ in range(min(shapes, jobs))]
    waiting = [jobs // shapes + (shape < jobs % shapes) for shape in range(len(candidates))]
    for round_number in range(min(_POLICY.max_grants, max(waiting))):
        for line, total in zip(candidates, waiting, strict=True):
            if round_number < total:
                number = next(numbers)
                line.append(Candidate(number, 0, number))
    return [
        Group(_QUEUE_ID, shape_id, _shape(shape_id), tuple(line), total)
        for shape_id, (line, total) in enumerate(zip(candidates, waiting, strict=True), start=1)
    ]


def _shape(number: int) -> Shape:
    return Shape(
        cpu_millis=1000, memory_bytes=number << 10, gpu_count=0, gpu_model="", gpu_memory_bytes=0, selectors=(),
        runtime="process", max_heartbeat_ms=15_000, needs_user=False,
    )  # fmt: skip
