"""One chaos run: a world, its load, the faults of a seed, and the verdict."""

from __future__ import annotations

import asyncio
import random
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lessor.lifecycle import Outcome
from tests.chaos.checker import Kind, Violation, check
from tests.chaos.evidence import collect, jobs_that_run, unfinished
from tests.chaos.faults import UNREACHABLE, suffer
from tests.chaos.history import Fault, History
from tests.chaos.load import Load
from tests.chaos.schedule import Planned, draw_schedule
from tests.chaos.world import Shape, World, running_world

WAITING = 8
"""Jobs that wait for room, so that none is left empty."""
DRAIN_S = 120.0
"""Once nothing is broken, all jobs end within this, or never will."""
_LOOK_S = 0.25


@dataclass
class Verdict:
    """What came of a run."""

    seed: int
    history: History
    violations: Sequence[Violation]
    died: Sequence[str] = ()
    """Programs that ended by themselves and were started again."""
    refused: int = 0
    broken: Sequence[str] = field(default_factory=list)
    """What went wrong in the harness itself."""

    def figures(self) -> list[str]:
        """Returns the run in numbers, line by line."""
        history, kinds = self.history, Counter(violation.kind for violation in self.violations)
        outcomes = Counter(row.outcome for row in history.attempts)
        faults = Counter(fault.what for fault in history.faults)
        ended = sum(row.final_state is not None for row in history.attempts)
        truncated = sum(row.logs_truncated_at is not None for row in history.attempts)
        return [
            f"seed:       {self.seed}",
            f"jobs:       {len(history.submitted)} accepted, {ended} ended, {len(history.executions)} executions",
            "attempts:   " + ", ".join(f"{outcomes[one]} {one.name}" for one in Outcome if outcomes[one]),
            f"faults:     {faults.total()}: " + ", ".join(f"{count} {what}" for what, count in sorted(faults.items())),
            f"calls:      {self.refused} failed after all retries and were made again",
            f"logs:       {sum(len(log.stdout) for log in history.logs.values())} bytes, {truncated} attempts say cut",
            f"overlaps:   {kinds[Kind.OVERLAP]}",
            f"lost:       {kinds[Kind.LOST_JOB]}",
            f"re-runs:    {kinds[Kind.RE_RUN]}",
            f"leaked:     {kinds[Kind.LEAKED] + kinds[Kind.SHARED]}",
            f"violations: {len(self.violations)}",
            *(f"  {violation}" for violation in self.violations[:40]),
            *(f"died by itself: {name} {times} times" for name, times in sorted(Counter(self.died).items())),
            *(f"harness: {text}" for text in self.broken),
        ]


Tell = Callable[[str], None]


async def chaos(
    seconds: float, seed: int, shape: Shape, tell: Tell, keep: Path | None = None, certain: Sequence[Planned] = ()
) -> Verdict:
    """Runs chaos.

    Args:
        seconds: How long faults are injected; the world needs some more to begin and to come to rest.
        seed: Draws faults and jobs.
        shape: How large the world is.
        tell: Takes the fault log, line by line.
        keep: An empty directory for everything that is left; None: a temporary one.
        certain: Faults that are injected whatever the seed is.
    """
    if keep is not None:
        return await _chaos(seconds, seed, shape, tell, keep, certain)
    with tempfile.TemporaryDirectory(prefix="lessor-chaos-", ignore_cleanup_errors=True) as directory:
        return await _chaos(seconds, seed, shape, tell, Path(directory), certain)


async def _chaos(
    seconds: float, seed: int, shape: Shape, tell: Tell, directory: Path, certain: Sequence[Planned]
) -> Verdict:
    schedule = draw_schedule(seed, seconds, agents=shape.agents, replicas=shape.replicas, certain=certain)
    tell(f"chaos: seed {seed}, {seconds:g} s, {len(schedule)} faults planned")
    async with running_world(directory, shape, seed) as world, world.client() as client:
        load = Load(world, client, random.Random(f"load {seed}"))
        broken: list[str] = []
        supervising = asyncio.create_task(world.supervise())
        submitting = asyncio.create_task(load.run(WAITING, max(8.0, seconds / 3)))
        faults = await _suffer_all(world, schedule, seed, tell, broken)
        submitting.cancel()
        with suppress(asyncio.CancelledError):
            await submitting
        await asyncio.wait_for(load.settle(), DRAIN_S)
        await come_to_rest(world)
        history = await collect(world, load.submitted.values(), faults)
        supervising.cancel()
        return Verdict(seed, history, check(history), world.died, load.refused, broken)


async def _suffer_all(
    world: World, schedule: Sequence[Planned], seed: int, tell: Tell, broken: list[str]
) -> list[Fault]:
    """Does all faults at their time. Returns those that hit something."""
    loop = asyncio.get_running_loop()
    begin_s = loop.time()
    suffered: list[Fault] = []

    async def one(planned: Planned) -> None:
        await asyncio.sleep(max(0.0, begin_s + planned.at_s - loop.time()))
        tell(f"{loop.time() - begin_s:8.2f} s  {planned.kind:18} {planned.whom:10} for {planned.lasts_s:.2f} s")
        try:
            fault = await suffer(world, planned, seed)
        except Exception:
            # Said with the verdict: a fault that could not be done, or healed, spoils the run.
            broken.append(f"{planned}: {traceback.format_exc()}")
            return
        if fault is not None:
            suffered.append(fault)

    await asyncio.gather(*(one(planned) for planned in schedule))
    return sorted(suffered, key=lambda fault: fault.from_ns)


async def come_to_rest(world: World, within_s: float = DRAIN_S) -> None:
    """Returns once all jobs have ended and nothing of them runs, or ``within_s`` have passed."""
    with suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            while await _busy(world):  # noqa: ASYNC110 - other processes end: there is no event
                await asyncio.sleep(_LOOK_S)


async def _busy(world: World) -> bool:
    try:
        async with world.database() as connection:
            if await unfinished(connection):
                return True
    except UNREACHABLE:
        return True
    return bool(await asyncio.to_thread(jobs_that_run, world))
