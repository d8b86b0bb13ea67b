"""One run: a world of replicas, agents, users and faults, from a seed to its end."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from tests.simulation.agent import Agent
from tests.simulation.cluster import Cluster
from tests.simulation.faults import Faults
from tests.simulation.invariants import Invariants
from tests.simulation.mutants import Mutant
from tests.simulation.network import Network
from tests.simulation.postgres import SimulatedPostgres
from tests.simulation.replica import Replica
from tests.simulation.scheduler import SECOND_NS, Scheduler, Violation
from tests.simulation.users import Users

AGENTS = 3
REPLICAS = 2
JOBS = 10
FAULTS_S = (12.0, 28.0)
"""How long things go wrong."""
QUIET_S = 150.0
"""All must be done so long after everything was mended."""
MAX_STEPS = 50_000


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a run."""

    seed: int
    steps: int
    digest: str
    """Of all steps: the same for the same seed."""
    virtual_s: float
    executions: int
    violation: str | None
    """What was broken; None: nothing."""
    trace: Sequence[str]
    happened: Mapping[str, int]
    """What happened how often, by name."""


class World:
    """Everything in one run."""

    def __init__(self, cluster: Cluster, seed: int, mutant: Mutant | None, *, keeps_trace: bool) -> None:
        self.scheduler = scheduler = Scheduler(seed, keeps_trace=keeps_trace)
        self._postgres = SimulatedPostgres(cluster, scheduler, dict(mutant.statements) if mutant is not None else {})
        self._network = Network(scheduler)
        self.replicas = [Replica(name, scheduler, self._postgres) for name in "AB"[:REPLICAS]]
        for replica in self.replicas:
            replica.urgent = self._is_urgent
            replica.others = [other for other in self.replicas if other is not replica]
        self.agents = [Agent(f"agent-{n}", scheduler, self._network, self.replicas, gpus=2) for n in range(AGENTS)]
        faults_end_ns = scheduler.between_ns(*FAULTS_S)
        names = [agent.process.name for agent in self.agents]
        self._users = Users(scheduler, self.replicas, names, JOBS, faults_end_ns / SECOND_NS * 0.8)
        self.invariants = Invariants(cluster, scheduler, self.agents, self._users)
        self._postgres.on_change = self._changed
        self._network.on_told = self.invariants.told
        self._network.on_said = self.invariants.said
        for agent in self.agents:
            agent.host.workload_of = self._users.workload
            agent.host.on_begin = self.invariants.began
            agent.host.on_thaw = self.invariants.thawed
        self._faults = Faults(scheduler, self._network, self._postgres, self.agents, self.replicas, faults_end_ns)

    def _is_urgent(self) -> bool:
        return any(agent.host.is_near_a_deadline() for agent in self.agents)

    @property
    def _processes(self) -> Sequence[Agent | Replica]:
        return (*self.replicas, *self.agents)

    def _changed(self, name: str, rows: Sequence[Any]) -> None:
        self.invariants.is_dirty = True
        if name == "expire":
            self.invariants.expired(rows)

    def run(self) -> None:
        """Runs it to its end.

        Raises:
            Violation: The system broke a promise.
        """
        scheduler = self.scheduler
        for each in self._processes:
            scheduler.after(scheduler.between_ns(0, 0.3), "", each.start)
        self._run_until(lambda: scheduler.now_ns >= self._faults.until_ns)
        self._faults.mend()
        self._users.give_up_the_endless()
        end_ns, looked_ns, left = scheduler.now_ns + int(QUIET_S * SECOND_NS), 0, "everything"

        def quiet() -> bool:
            nonlocal looked_ns, left
            if scheduler.now_ns - looked_ns < SECOND_NS:
                return False
            looked_ns = scheduler.now_ns
            left = self.invariants.unfinished()
            return not left or looked_ns > end_ns

        self._run_until(quiet)
        if left:
            raise Violation(f"liveness: {QUIET_S:g} s after all was mended, {left}")
        self.invariants.is_dirty = True
        self.invariants.check()
        self.invariants.check_logs()

    def _run_until(self, done: Callable[[], bool]) -> None:
        scheduler, invariants = self.scheduler, self.invariants
        while not done():
            if not scheduler.step():
                raise Violation("nothing will ever happen again")
            invariants.check()
            if scheduler.steps > MAX_STEPS:
                raise Violation(f"more than {MAX_STEPS} steps")

    @property
    def executions(self) -> int:
        """How many executions began."""
        return sum(len(agent.host.history) for agent in self.agents)

    def wind_up(self) -> None:
        """Ends what is left of it."""
        self._postgres.close()
        for each in self._processes:
            each.process.end_life()
            for loop in each.loops:
                loop.wind_up()


def run(cluster: Cluster, seed: int, mutant: Mutant | None = None, *, keeps_trace: bool = False) -> Result:
    """Runs one seed on an emptied database."""
    cluster.empty()
    with _harness(seed, mutant):
        world = World(cluster, seed, mutant, keeps_trace=keeps_trace)
        violation = None
        try:
            world.run()
        except Violation as broken:
            violation = str(broken)
        finally:
            world.wind_up()
    scheduler = world.scheduler
    return Result(
        seed=seed,
        steps=scheduler.steps,
        digest=scheduler.digest,
        virtual_s=scheduler.now_ns / SECOND_NS,
        executions=world.executions,
        violation=violation,
        trace=scheduler.trace,
        happened=scheduler.happened,
    )


@contextmanager
def _harness(seed: int, mutant: Mutant | None) -> Iterator[None]:
    """Takes real time, real chance and the log away from production code, and plants the bug."""
    clock = SimpleNamespace(monotonic=lambda: asyncio.get_running_loop().time())
    disabled = logging.root.manager.disable
    state = random.getstate()
    logging.disable(logging.CRITICAL)
    random.seed(seed)
    with ExitStack() as stack:
        stack.enter_context(patch("lessor_server.services.reading.time", clock))
        # Polls are the safety net behind the bells. Seldomer ones make it no safer, and save most of the steps.
        stack.enter_context(patch("lessor_server.services.reading._MAX_AGE_S", 3.0))
        stack.enter_context(patch("lessor_server.services.planning._POLL_S", 3.0))
        stack.enter_context(patch("lessor_server.sessions.delivery._POLL_S", 2.5))
        if mutant is not None:
            mutant.plant(stack)
        try:
            yield
        finally:
            random.setstate(state)
            logging.disable(disabled)
