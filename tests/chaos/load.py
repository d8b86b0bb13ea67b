"""The jobs of a chaos run: drawn from a seed, submitted as fast as the world takes them, some cancelled."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import asyncpg

import lessor
from lessor.ids import decode_job_id
from tests.chaos import workload
from tests.chaos.history import Submitted
from tests.chaos.world import World

Policy = Literal["freeze", "stop", "continue"]

GRACE_S = 1.0
_MAX_LOSSES = 100
"""A job of a chaos run is unlucky often, and never for its own fault."""
_BATCH = 12
_LOOK_S = 0.2


@dataclass(frozen=True, slots=True)
class Plan:
    """What a job does, and what is asked of Lessor for it."""

    seconds: float
    lines: int = 3
    exits: tuple[int, ...] = (0,)
    children: int = 0
    linger_s: float = 0.0
    stubborn: bool = False
    gpus: int = 0
    ttl_s: int = 10
    cancel_after_s: float | None = None
    selectors: tuple[str, ...] = ()
    gate: str = ""
    """A file without which it does not end; empty: none."""
    on_lease_lost: Policy = "freeze"
    """What its keeper does once its lease has run out."""

    def argv(self, diaries: Path) -> list[str]:
        """Returns the command that writes its diary into a directory."""
        plan: dict[str, Any] = {
            "seconds": self.seconds,
            "lines": self.lines,
            "exits": self.exits,
            "children": self.children,
            "linger": self.linger_s,
            "stubborn": self.stubborn,
            "gate": self.gate,
        }
        return [sys.executable, "-I", "-S", workload.__file__, str(diaries), json.dumps(plan)]

    def spec(self, name: str, diaries: Path) -> lessor.JobSpec:
        """Returns the job."""
        return lessor.JobSpec.of(
            self.argv(diaries),
            name=name,
            gpus=self.gpus,
            cpu=1,
            ttl=self.ttl_s,
            grace=GRACE_S,
            max_failures=len(self.exits),
            max_losses=_MAX_LOSSES,
            backoff="100ms",
            selectors=list(self.selectors),
            on_lease_lost=self.on_lease_lost,
        )


def draw_plan(rng: random.Random, longest_s: float = 40.0) -> Plan:
    """Draws a job of at most ``longest_s``: most are short, and each kind of trouble is among them."""
    kind = rng.random()
    if kind < 0.62:
        plan = Plan(rng.uniform(0.02, 0.4), lines=rng.randrange(6))
    elif kind < 0.84:
        plan = Plan(rng.uniform(0.5, 3.0), lines=rng.randrange(60))
    elif kind < 0.93:
        # As long as a lease, so that faults find it at work.
        plan = Plan(rng.uniform(6.0, 16.0), lines=rng.randrange(100), children=rng.randrange(3))
    elif kind < 0.97:
        plan = Plan(rng.uniform(0.1, 2.0), children=2, linger_s=rng.uniform(0.1, 3.0))
    else:
        plan = Plan(rng.uniform(15.0, 40.0), lines=50, ttl_s=30)
    plan = replace(plan, seconds=min(plan.seconds, longest_s))
    if rng.random() < 0.15:
        plan = replace(plan, exits=rng.choice(((3, 0), (1, 2, 0), (5,), (4, 6))))
    if rng.random() < 0.08:
        plan = replace(plan, cancel_after_s=rng.uniform(0.0, 4.0))
    policies: tuple[Policy, ...] = ("freeze", "freeze", "stop", "stop", "continue")
    gpus, policy = rng.choice((0, 0, 0, 1, 2)), rng.choice(policies)
    if policy == "continue":
        # What runs on without a lease uses what may be another's by then: that is its user's choice, and not for GPUs.
        gpus = 0
    return replace(plan, stubborn=rng.random() < 0.2, gpus=gpus, on_lease_lost=policy)


class Load:
    """Submits jobs through a client and remembers what was accepted."""

    def __init__(self, world: World, client: lessor.AsyncClient, rng: random.Random) -> None:
        self._world = world
        self._client = client
        self._rng = rng
        self._cancels: set[asyncio.Task[None]] = set()
        self._number = 0
        self.submitted: dict[str, Submitted] = {}
        """Name → the job."""
        self.refused = 0
        """Calls that failed after all their retries; they are made again under the same request id."""

    async def run(self, waiting: int, longest_s: float) -> None:
        """Submits jobs of at most ``longest_s`` until cancelled, such that about ``waiting`` wait for room."""
        while True:
            if await self._waiting() < waiting:
                await self.submit([draw_plan(self._rng, longest_s) for _ in range(self._rng.randint(1, _BATCH))])
            await asyncio.sleep(_LOOK_S)

    async def submit(self, plans: list[Plan]) -> list[Submitted]:
        """Submits jobs in one call, repeated until it is answered with OK."""
        names = [f"chaos-{self._number + index}" for index in range(len(plans))]
        self._number += len(plans)
        specs = [plan.spec(name, self._world.diaries) for name, plan in zip(names, plans, strict=True)]
        while True:
            try:
                answers = await self._client.submit_many(specs, request_id=names[0])
                break
            except lessor.LessorError:
                self.refused += 1
        accepted = []
        for name, plan, answer in zip(names, plans, answers, strict=True):
            continues = plan.on_lease_lost == "continue"
            number = decode_job_id(answer.id)
            job = Submitted(name, number, plan.lines, plan.exits, grace_s=GRACE_S, continues=continues)
            self.submitted[name] = job
            accepted.append(job)
            if plan.cancel_after_s is not None:
                task = asyncio.create_task(self._cancel_later(name, answer.id, plan.cancel_after_s))
                self._cancels.add(task)
        return accepted

    async def cancel(self, name: str, job_id: str) -> None:
        """Cancels a job, until that is answered with OK."""
        # From the first try on: one that failed may have been committed.
        self.submitted[name] = replace(self.submitted[name], cancelled_ns=workload.now_ns())
        while True:
            try:
                await self._client.cancel(job_id)
                break
            except lessor.LessorError:
                self.refused += 1
        self.submitted[name] = replace(self.submitted[name], cancelled_ns=workload.now_ns())

    async def settle(self) -> None:
        """Returns once every cancel that was drawn is answered."""
        await asyncio.gather(*self._cancels)

    async def _cancel_later(self, name: str, job_id: str, after_s: float) -> None:
        await asyncio.sleep(after_s)
        await self.cancel(name, job_id)

    async def _waiting(self) -> int:
        try:
            async with self._world.database() as connection:
                return int(await connection.fetchval("SELECT count(*) FROM ready"))
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
            # It is down, by our own hand: submits are to meet that too.
            return 0
