"""Users: they submit jobs, repeat what was not answered, and cancel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from lessor.v1 import job_pb2
from tests.simulation.host import LONGEST_S, Execution, Workload
from tests.simulation.replica import Replica
from tests.simulation.scheduler import SECOND_NS, Scheduler, Violation

TTL = timedelta(seconds=10)


@dataclass(eq=False)
class Request:
    """What one user wants."""

    request_id: str
    specs: Sequence[job_pb2.JobSpec]
    numbers: list[int] | None = None
    """Job numbers, once the submit was answered."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of job."""

    run_s: tuple[float, float]
    fails: float = 0.0
    stubborn: float = 0.4


KINDS = {
    "instant": Kind((0.0, 0.1)),
    "short": Kind((0.1, 2.0)),
    "medium": Kind((3.0, 12.0)),
    "long": Kind((12.0, 30.0)),
    "failing": Kind((0.1, 3.0), fails=0.7),
    "stubborn": Kind((8.0, 30.0), stubborn=1.0),
    "endless": Kind((LONGEST_S, LONGEST_S)),
}


_MIXTURE = (
    "instant", "short", "medium", "medium", "long", "long", "long", "failing", "stubborn", "stubborn",
    "endless", "endless",
)  # fmt: skip
"""Mostly such as run when an agent is cut off, and end before it is back."""


class Users:
    """All that is submitted in a run, and what was promised about it."""

    def __init__(self, scheduler: Scheduler, replicas: Sequence[Replica], agents: Sequence[str], jobs: int,
                 until_s: float) -> None:  # fmt: skip
        self._scheduler = scheduler
        self._replicas = replicas
        self._agents = agents
        self.requests: list[Request] = []
        self.cancelled: set[int] = set()
        """Job numbers whose cancel was answered."""
        self._kinds: dict[str, Kind] = {}
        self.on_promise: Callable[[], None] = lambda: None
        random = scheduler.random
        made = 0
        while made < jobs:
            count = min(jobs - made, random.choice((1, 1, 1, 2, 3)))
            request = Request(f"request-{len(self.requests)}", [self._spec(made + n) for n in range(count)])
            made += count
            self.requests.append(request)
            at_ns = int(random.random() ** 2 * until_s * SECOND_NS)
            scheduler.at(at_ns, "", _bound(self._submit, request))
            if random.random() < 0.2:
                # An impatient user: the same again, perhaps to another replica and at the same time.
                scheduler.at(at_ns + scheduler.spread_ns(0.02, 5.0, 0.5), "", _bound(self._submit, request))
            if random.random() < 0.2:
                scheduler.at(at_ns + scheduler.between_ns(0.0, 15.0), "", _bound(self._cancel, request))

    def _spec(self, number: int) -> job_pb2.JobSpec:
        random = self._scheduler.random
        name = f"job-{number}"
        kind = random.choice(_MIXTURE)
        self._kinds[name] = KINDS[kind]
        spec = job_pb2.JobSpec(name=name, command=job_pb2.Command(argv=["/simulated", kind]))
        spec.lease.ttl.FromTimedelta(TTL)
        spec.lease.grace.FromTimedelta(timedelta(seconds=random.choice((0.2, 1.0, 2.0))))
        spec.lease.on_lost = random.choice((job_pb2.ON_LEASE_LOST_FREEZE, job_pb2.ON_LEASE_LOST_STOP))
        spec.retry.max_failures = random.choice((1, 2, 3))
        spec.retry.max_losses = 1000
        spec.retry.backoff_initial.FromTimedelta(timedelta(seconds=random.choice((0.5, 2.0))))
        spec.priority = random.choice((0, 0, 5))
        if random.random() < 0.6:
            spec.resources.gpu_count = random.choice((1, 1, 2))
        if random.random() < 0.4:
            # It waits for this agent, whatever becomes of it.
            selector = spec.selectors.add(key="agent", operator=job_pb2.SELECTOR_OPERATOR_IN)
            selector.values.append(random.choice(self._agents))
        return spec

    def workload(self, execution: Execution) -> Workload:
        """Returns what an attempt of a job does."""
        random, kind = self._scheduler.random, self._kinds[execution.name]
        return Workload(
            run_s=random.uniform(*kind.run_s),
            exit_code=1 if random.random() < kind.fails else 0,
            stubborn=random.random() < kind.stubborn,
            stdout_bytes=random.choice((0, 40, 300)),
            stderr_bytes=random.choice((0, 0, 60)),
            checkpoints=random.random() < 0.3,
        )

    @property
    def all_answered(self) -> bool:
        """Every submit was answered."""
        return all(request.numbers is not None for request in self.requests)

    def _replica(self) -> Replica | None:
        replica = self._scheduler.random.choice(self._replicas)
        return replica if replica.process.alive and replica.process.paused_until_ns <= self._scheduler.now_ns else None

    def _submit(self, request: Request) -> None:
        scheduler = self._scheduler
        replica = self._replica()
        again_ns = scheduler.between_ns(0.2, 2.0)
        if replica is None:
            scheduler.after(again_ns, "", _bound(self._submit, request))
            return
        life, answered = replica.process.life, False

        def then(numbers: list[int] | None) -> None:
            nonlocal answered
            answered = True
            if numbers is None:
                scheduler.after(again_ns, "", _bound(self._submit, request))
            else:
                self._answered(request, numbers)

        def look() -> None:
            if not answered and replica.process.life != life:
                self._submit(request)
            elif not answered:
                scheduler.after(again_ns, "", look)

        scheduler.note(f"submit {request.request_id} at {replica.process.name}")
        scheduler.after(again_ns, "", look)
        replica.submit(request.request_id, request.specs, then)

    def _answered(self, request: Request, numbers: list[int]) -> None:
        self._scheduler.note(f"{request.request_id} is answered: {numbers}")
        if request.numbers is not None and request.numbers != numbers:
            raise Violation(f"{request.request_id} made jobs {request.numbers} and then {numbers}")
        request.numbers = list(numbers)
        self.on_promise()

    def _cancel(self, request: Request) -> None:
        scheduler = self._scheduler
        replica = self._replica()
        if replica is None or request.numbers is None:
            scheduler.after(scheduler.between_ns(0.5, 2.0), "", _bound(self._cancel, request))
            return
        numbers, life, answered = request.numbers, replica.process.life, False

        def then(results: list[int] | None) -> None:
            nonlocal answered
            answered = True
            if results is None:
                scheduler.after(SECOND_NS, "", _bound(self._cancel, request))
            else:
                scheduler.note(f"cancel of {request.request_id} is answered: {results}")
                self.cancelled.update(numbers)

        def look() -> None:
            if not answered and replica.process.life != life:
                self._cancel(request)
            elif not answered:
                scheduler.after(SECOND_NS, "", look)

        scheduler.note(f"cancel {request.request_id} at {replica.process.name}")
        scheduler.after(SECOND_NS, "", look)
        replica.cancel(numbers, then)

    def give_up_the_endless(self) -> None:
        """Has the jobs cancelled that would never end."""
        for request in self.requests:
            if any(self._kinds[spec.name].run_s[0] >= LONGEST_S for spec in request.specs):
                self._cancel(request)


def _bound(act: Callable[[Request], None], request: Request) -> Callable[[], None]:
    return lambda: act(request)
