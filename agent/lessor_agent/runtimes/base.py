"""What a runtime is: the interface every way of running a job implements.

A runtime turns a :class:`StartRequest` into an :class:`Execution`. The order of
a start is fixed by the supervisor: journal the intent, :meth:`Runtime.prepare`
(the keeper stands, nothing of the job runs), journal the handle, send Accepted,
:meth:`Execution.begin`. An execution outlives the agent's process; after a
restart :meth:`Runtime.adopt` finds it again by its handle.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import ClassVar


class RuntimeFault(Exception):
    """Base of the errors a runtime raises.

    RuntimeFault
    ├── RuntimeUnavailable   it cannot work on this host
    ├── StartRefused         this job cannot be started here; nothing was started
    └── ExecutionVanished    the handle names nothing that can be found
    """


class RuntimeUnavailable(RuntimeFault):
    """The runtime cannot work on this host; the message says what is missing."""


class StartRefused(RuntimeFault):
    """This job cannot be started here; nothing was started. The message says why."""


class ExecutionVanished(RuntimeFault):
    """The handle names an execution of which nothing is left, not even how it ended."""


class OnLost(StrEnum):
    """What becomes of an execution whose lease is not renewed in time, at its deadline."""

    FREEZE = "freeze"
    """It stands still, and goes on when a renewal comes after all."""
    STOP = "stop"
    """It has ended."""
    CONTINUE = "continue"
    """It goes on."""


class StopCause(StrEnum):
    """Why an execution was stopped. The first cause given is kept."""

    CANCELLED = "cancelled"
    RUN_TIMEOUT = "run_timeout"
    START_TIMEOUT = "start_timeout"
    LEASE_LOST = "lease_lost"
    """No renewal came: the keeper stopped it before the server may give the job to another."""
    STALE = "stale"
    """The server said that the lease is over."""
    AGENT_STOPPED = "agent_stopped"
    """The agent was told to take its jobs along when it stops."""
    KEEPER_DIED = "keeper_died"
    """The keeper died under the job; its tree was ended and how it would have ended is unknown."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a runtime can do, advertised to the server."""

    can_set_user: bool
    """It can run a job as another user than the agent's."""
    can_freeze: bool = False
    """It can have a job stand still, and go on later."""


@dataclass(frozen=True, slots=True)
class StartRequest:
    """Everything needed to start one attempt."""

    lease_id: int
    """Fencing token and idempotency key: two starts of one lease are one execution."""
    job_id: str
    attempt: int
    argv: Sequence[str]
    env: Mapping[str, str]
    """The job's own variables. The runtime adds the allow-listed ones of the host and the LESSOR_* ones."""
    working_dir: Path | None
    """None: a fresh directory of the attempt."""
    user: str | None
    """None: the agent's own user."""
    gpu_uuids: Sequence[str]
    grace: timedelta
    """From SIGTERM to SIGKILL, for every stop that names no other."""
    on_lost: OnLost
    """What becomes of it at ``deadline_ns``. FREEZE only where the runtime can."""
    run_timeout: timedelta | None
    """Counted from begin; None: no limit."""
    checkpoint: str | None
    """Checkpoint cursor of an earlier attempt, handed to the workload."""
    deadline_ns: int
    """CLOCK_BOOTTIME nanoseconds by which the whole tree stands still or is gone unless renewed; see ``on_lost``."""


@dataclass(frozen=True, slots=True)
class Handle:
    """What finds an execution again after the agent's process is gone.

    Stored in the journal. ``version`` is the runtime's own; a runtime reads all
    versions it ever wrote.
    """

    runtime: str
    version: int
    data: Mapping[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Exit:
    """How an execution ended. Its whole process tree is gone."""

    exit_code: int | None
    """None: a signal ended it, it never ran, or nobody knows."""
    signal: int
    """Signal that ended it; 0: none."""
    stop_cause: StopCause | None
    """Why it was stopped; None: it ended by itself."""
    start_error: str | None
    """Why it could not be run (no such program, no permission); None: it ran, or was stopped before begin."""
    started_at: datetime | None
    """UTC; None: it never ran."""
    ended_at: datetime
    """UTC."""


@dataclass(frozen=True, slots=True)
class OutputFiles:
    """Where an execution writes. The files exist from prepare on and only grow."""

    stdout: Path
    stderr: Path
    events: Path
    """JSON lines by the workload; see docs/workload-interface.md."""


class Execution(ABC):
    """One attempt in the hands of a runtime."""

    handle: Handle
    lease_id: int
    output: OutputFiles

    @abstractmethod
    async def begin(self) -> bool:
        """Lets the workload run. Called once; a second call changes nothing.

        Returns:
            True once it runs or has run; False if it could not be run or was
            ended before: :meth:`wait` tells which.
        """

    @abstractmethod
    async def wait(self) -> Exit:
        """Returns how it ended, once its whole tree is gone and all its output is in its files.

        May be called again, and by several tasks.
        """

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Whether :meth:`wait` would return at once."""

    @abstractmethod
    async def stop(self, cause: StopCause, grace: timedelta | None = None) -> None:
        """Asks it to stop: SIGTERM and the cancel file, SIGKILL of the whole tree after ``grace``.

        Returns at once; :meth:`wait` tells the end. Before :meth:`begin` it ends
        without having run. One that stands still, and has not been renewed, is
        killed as it stands. A second call can only shorten the grace.
        """

    @abstractmethod
    def renew(self, deadline_ns: int) -> None:
        """Moves the deadline to ``deadline_ns`` (CLOCK_BOOTTIME). Never blocks, never fails, never moves it back.

        What stands still goes on then, within a second.
        """

    @abstractmethod
    async def forget(self) -> None:
        """Removes what it left behind (files, records). A second call does nothing.

        Called after the end and the last log byte are acked.
        """


class Runtime(ABC):
    """A way to run jobs. Instances are made once per agent; see :class:`RuntimeContext`."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What it can do on this host."""

    @abstractmethod
    async def open(self) -> None:
        """Makes it ready.

        Raises:
            RuntimeUnavailable: It cannot work on this host.
        """

    @abstractmethod
    async def close(self) -> None:
        """Lets go of everything but the executions: they go on."""

    @abstractmethod
    async def prepare(self, request: StartRequest) -> Execution:
        """Gets everything ready to run, and a keeper that enforces the deadline, without running any of the job.

        Idempotent by ``lease_id``.

        Raises:
            StartRefused: It cannot be started here.
        """

    @abstractmethod
    async def adopt(self, handle: Handle) -> Execution:
        """Finds a prepared, running or ended execution again.

        Raises:
            ExecutionVanished: Nothing of it is left, and no process of it runs.
        """

    @abstractmethod
    async def strays(self) -> list[Handle]:
        """Returns executions of this agent's state directory found on the host, whoever started them, in any state.

        One whose files were deleted while it ran is among them; its
        :class:`OutputFiles` do not exist.
        """


@dataclass(frozen=True, slots=True)
class RuntimeContext:
    """What an agent gives each runtime it makes: ``RuntimeClass(context)``."""

    state_dir: Path
    """Absolute; the runtime may use ``state_dir / "leases"``."""
    env_allow: Sequence[str]
    """Names (or prefixes ending in ``*``) of host variables a job may see."""
    open_files: int | None = None
    """Soft limit of open files for jobs, where the agent has raised its own; None: the agent's."""
