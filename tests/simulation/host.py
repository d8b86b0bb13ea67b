"""A GPU host: executions under their keepers, which outlive the agent.

An execution is a fencing token and the spans of real time in which its workload
could run. The keeper's rule is the shipped one: at the deadline that the core
computed the workload stands still, and goes on if a renewal comes after all; or
it is asked to stop a grace before, and killed shortly before. A keeper is
scheduled up to a second late, as the protocol assumes.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from lessor_agent.keeper.verdict import KILL_SLACK_NS
from lessor_agent.protocol.lease import nanoseconds
from lessor_agent.runtimes.base import Exit, Handle, OnLost, StopCause
from tests.simulation.cluster import BEGINNING
from tests.simulation.scheduler import SECOND_NS, Clock, Event, Scheduler

RUNTIME = "process"
LONGEST_S = 1000.0
"""A workload that would run for longer never ends by itself."""
_KILL_TAKES_S = 0.02
_NEAR_NS = 2 * SECOND_NS


@dataclass(slots=True)
class Workload:
    """What a job does when it runs."""

    run_s: float
    """It ends by itself after so long."""
    exit_code: int = 0
    stubborn: bool = False
    """It does not mind SIGTERM."""
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    checkpoints: bool = False


@dataclass(eq=False)
class Execution:
    """One execution; times are real, but for the deadline."""

    lease_id: int
    job_id: str
    name: str
    """Of the job, as its submitter called it."""
    attempt: int
    gpu_uuids: tuple[str, ...]
    agent: str
    grace: timedelta
    on_lost: OnLost
    deadline_ns: int
    """On the host's clock."""
    began_ns: int | None = None
    gone_ns: int | None = None
    exit: Exit | None = None
    cause: StopCause | None = None
    workload: Workload | None = None
    stdout: int = 0
    stderr: int = 0
    kill: Event | None = None
    kill_at_ns: int = 0
    started_at: datetime | None = None
    frozen: bool = False
    held_up: list[Callable[[], None]] = field(default_factory=list)
    """What it would have done had it not been frozen."""
    plans: list[Event] = field(default_factory=list)

    @property
    def handle(self) -> Handle:
        """Finds it again."""
        return Handle(RUNTIME, 1, {"lease_id": self.lease_id})

    @property
    def lives(self) -> bool:
        """Its workload is there."""
        return self.began_ns is not None and self.gone_ns is None

    @property
    def runs(self) -> bool:
        """Its workload runs, or could."""
        return self.lives and not self.frozen

    @property
    def due_ns(self) -> int:
        """When its keeper acts if it is not renewed before, on the host's clock."""
        limit_ns = self.deadline_ns - KILL_SLACK_NS
        stops = self.on_lost is OnLost.STOP or self.began_ns is None
        return limit_ns - nanoseconds(self.grace) if stops else limit_ns

    def output(self, stream: int, offset: int, length: int) -> bytes:
        """Returns what it wrote."""
        return bytes((self.lease_id * 31 + stream * 7 + position) % 251 for position in range(offset, offset + length))


class Host:
    """A host and its executions."""

    def __init__(self, name: str, clock: Clock, scheduler: Scheduler) -> None:
        self.name = name
        self.boot_id = f"{name}-boot-1"
        self.clock = clock
        self._hurries = False
        self.keepers_late = 0.1
        """How often a keeper is scheduled late, by up to a second."""
        self._scheduler = scheduler
        self.executions: dict[int, Execution] = {}
        """lease_id → execution not forgotten."""
        self.history: list[Execution] = []
        """All that ever began."""
        self.workload_of: Callable[[Execution], Workload] = lambda execution: Workload(1.0)
        self.on_begin: Callable[[Execution], None] = lambda execution: None
        self.on_thaw: Callable[[Execution], None] = lambda execution: None
        self.on_news: Callable[[Execution], None] = lambda execution: None
        """Told when one has written or ended; the agent listens, while there is one."""

    def local_ns(self) -> int:
        """Returns CLOCK_BOOTTIME."""
        return self.clock.local_ns(self._scheduler.now_ns)

    def wall(self) -> datetime:
        """Returns the host's wall clock."""
        return BEGINNING + timedelta(microseconds=self._scheduler.now_ns // 1000)

    def prepare(self, execution: Execution) -> Execution:
        """Makes the keeper of an execution; a second one of a lease is the first."""
        standing = self.executions.setdefault(execution.lease_id, execution)
        if standing is execution:
            self._watch(execution)
        return standing

    def begin(self, execution: Execution) -> bool:
        """Lets the workload run. The keeper looks at the deadline before."""
        if execution.exit is not None:
            return False
        if execution.began_ns is not None:
            return True
        if self.local_ns() >= execution.deadline_ns - KILL_SLACK_NS:
            self.stop(execution, StopCause.LEASE_LOST)
            return False
        execution.began_ns = self._scheduler.now_ns
        execution.started_at = self.wall()
        execution.workload = workload = self.workload_of(execution)
        if self._hurries and workload.run_s < LONGEST_S:
            workload.run_s = min(workload.run_s, 1.0)
        self.history.append(execution)
        self.on_begin(execution)
        for part in (0.3, 0.7):
            self._plan(execution, int(workload.run_s * part * SECOND_NS), "", lambda: self._write(execution))
        self._plan(
            execution,
            int(workload.run_s * SECOND_NS),
            f"{self.name}: lease {execution.lease_id} exits {workload.exit_code}",
            lambda: self.exits(execution, workload.exit_code, 0),
        )
        return True

    def hurry(self) -> None:
        """Has everything that would end by itself end soon: nobody wants to watch it run."""
        self._hurries = True
        for execution in self.executions.values():
            workload = execution.workload
            if execution.lives and workload is not None and workload.run_s < LONGEST_S:
                code = workload.exit_code
                what = f"{self.name}: lease {execution.lease_id} exits {code}"
                self._plan(execution, self._scheduler.between_ns(0.0, 2.0), what, _exit(self, execution, code))

    def _plan(self, execution: Execution, delay_ns: int, what: str, act: Callable[[], None]) -> None:
        """Has the workload do something, unless it is gone by then; when it goes on if it stands still."""

        def do() -> None:
            if execution.frozen:
                execution.held_up.append(do)
            else:
                if what:
                    self._scheduler.note(what)
                act()

        execution.plans.append(self._scheduler.after(delay_ns, "", do))

    def _write(self, execution: Execution) -> None:
        if execution.lives and execution.workload is not None:
            workload, random = execution.workload, self._scheduler.random
            execution.stdout = max(execution.stdout, random.randint(0, workload.stdout_bytes))
            execution.stderr = max(execution.stderr, random.randint(0, workload.stderr_bytes))
            self.on_news(execution)

    def exits(self, execution: Execution, exit_code: int | None, signal_number: int) -> None:
        """The whole tree is gone."""
        if execution.exit is not None:
            return
        if exit_code == 0 and execution.workload is not None:
            execution.stdout = max(execution.stdout, execution.workload.stdout_bytes)
            execution.stderr = max(execution.stderr, execution.workload.stderr_bytes)
        execution.exit = Exit(exit_code, signal_number, execution.cause, None, execution.started_at, self.wall())
        execution.gone_ns = self._scheduler.now_ns
        for plan in execution.plans:
            plan.cancelled = True
        self.on_news(execution)

    def is_near_a_deadline(self) -> bool:
        """Returns whether a lease here was not renewed for long."""
        soon_ns = self.local_ns() + _NEAR_NS
        return any(
            each.exit is None and not each.frozen and each.deadline_ns < soon_ns for each in self.executions.values()
        )

    # ── the keeper ───────────────────────────────────────────────────────────

    def renew(self, execution: Execution, deadline_ns: int) -> None:
        """Writes the deadline where the keeper reads it; it never moves back."""
        execution.deadline_ns = max(execution.deadline_ns, deadline_ns)
        if execution.frozen:
            execution.plans.append(self._scheduler.after(self._late_ns(), "", lambda: self._look(execution)))

    def _late_ns(self) -> int:
        return self._scheduler.spread_ns(0.01, 1.0, self.keepers_late)

    def _watch(self, execution: Execution) -> None:
        """Looks again when the lease would be lost."""
        at_ns = max(self.clock.real_ns(execution.due_ns), self._scheduler.now_ns) + self._late_ns()
        execution.plans.append(self._scheduler.at(at_ns, "", lambda: self._look(execution)))

    def _look(self, execution: Execution) -> None:
        if execution.exit is not None:
            return
        stands = self.local_ns() < execution.due_ns
        if execution.frozen:
            if stands:
                self._thaw(execution)
        elif stands:
            self._watch(execution)
        elif execution.on_lost is OnLost.FREEZE and execution.began_ns is not None:
            if execution.kill is None:
                self._scheduler.note(f"{self.name}: the keeper of lease {execution.lease_id} freezes it")
                execution.frozen = True
        else:
            self._scheduler.note(f"{self.name}: the keeper of lease {execution.lease_id} stops it")
            self.stop(execution, StopCause.LEASE_LOST)

    def _thaw(self, execution: Execution) -> None:
        self._scheduler.note(f"{self.name}: the keeper of lease {execution.lease_id} has it go on")
        execution.frozen = False
        self.on_thaw(execution)
        held_up, execution.held_up = execution.held_up, []
        for act in held_up:
            self._plan(execution, self._scheduler.between_ns(0, 1.0), "", act)
        self._watch(execution)

    def stop(self, execution: Execution, cause: StopCause, grace: timedelta | None = None) -> None:
        """SIGTERM, and SIGKILL after the grace, which a second stop can only shorten; at once if it stands still."""
        if execution.exit is not None:
            return
        if execution.cause is None:
            execution.cause = cause
        if execution.began_ns is None:
            self.exits(execution, None, 0)
            return
        if execution.frozen:
            self._look(execution)
        if execution.frozen:
            # Asked to stop it would have to run to hear it.
            grace = timedelta()
        scheduler = self._scheduler
        limit_ns = self.clock.real_ns(execution.deadline_ns - KILL_SLACK_NS)
        grace_ns = nanoseconds(execution.grace if grace is None else grace)
        kill_at_ns = max(scheduler.now_ns, min(scheduler.now_ns + grace_ns, limit_ns))
        if execution.kill is not None and execution.kill_at_ns <= kill_at_ns:
            return
        workload = execution.workload
        if execution.kill is None and workload is not None and not workload.stubborn and not execution.frozen:
            ends_well = scheduler.chance(0.1)
            code, number = (0, 0) if ends_well else (None, int(signal.SIGTERM))
            heeds = f"{self.name}: lease {execution.lease_id} heeds SIGTERM"
            delay_ns = scheduler.between_ns(0.01, 3.0)
            self._plan(execution, delay_ns, heeds, lambda: self.exits(execution, code, number))
        if execution.kill is not None:
            execution.kill.cancelled = True
        execution.kill_at_ns = kill_at_ns
        delay_ns = kill_at_ns - scheduler.now_ns + self._late_ns() + scheduler.between_ns(0, _KILL_TAKES_S)
        execution.kill = scheduler.after(
            delay_ns,
            f"{self.name}: lease {execution.lease_id} is killed",
            lambda: self.exits(execution, None, int(signal.SIGKILL)),
        )
        execution.plans.append(execution.kill)

    # ── what happens to hosts ────────────────────────────────────────────────

    def lose_keeper(self, execution: Execution) -> None:
        """The keeper dies, and the tree with it."""
        execution.cause = execution.cause or StopCause.KEEPER_DIED
        self.exits(execution, None, 0)

    def reboot(self) -> None:
        """Everything on the host is gone; its disk is not."""
        for execution in list(self.executions.values()):
            if execution.exit is None:
                execution.exit = Exit(None, 0, None, None, execution.started_at, self.wall())
                execution.gone_ns = self._scheduler.now_ns
                for plan in execution.plans:
                    plan.cancelled = True
        self.executions.clear()
        self.boot_id = f"{self.name}-boot-{self._scheduler.now_ns}"

    def forget(self, lease_id: int) -> None:
        """Removes what an execution left."""
        self.executions.pop(lease_id, None)


def _exit(host: Host, execution: Execution, code: int) -> Callable[[], None]:
    return lambda: host.exits(execution, code, 0)
