"""A runtime without processes: a test, or a simulation, decides what its jobs do.

A :class:`ScriptedHost` outlives its :class:`ScriptedRuntime`\\ s, as a host
outlives its agents: make a second runtime over the same host to restart one.
Output files are real, below the host's directory.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

from lessor_agent.runtimes.base import (
    Capabilities,
    Execution,
    ExecutionVanished,
    Exit,
    Handle,
    OutputFiles,
    Runtime,
    RuntimeContext,
    StartRefused,
    StartRequest,
    StopCause,
)


class ScriptedExecution(Execution):
    """One execution; the methods from :meth:`write` on are for the script."""

    def __init__(self, host: ScriptedHost, request: StartRequest) -> None:
        """Made by :class:`ScriptedHost`."""
        directory = host.directory / str(request.lease_id)
        directory.mkdir(parents=True, exist_ok=True)
        self.request = request
        self.lease_id = request.lease_id
        self.handle = Handle(ScriptedRuntime.name, 1, {"lease_id": request.lease_id})
        self.output = OutputFiles(directory / "stdout", directory / "stderr", directory / "events")
        for path in (self.output.stdout, self.output.stderr, self.output.events):
            path.touch()
        self.deadline_ns = request.deadline_ns
        self.begun = False
        self.stops: list[tuple[StopCause, timedelta | None]] = []
        """Every stop asked for, in order."""
        self.forgotten = False
        self.exit: Exit | None = None
        self._host = host
        self._directory = directory
        self._started_at: datetime | None = None
        self._vanished = False
        self._waiters: set[asyncio.Event] = set()

    async def begin(self) -> bool:
        """See :class:`Execution`."""
        if self.begun or self.exit is not None:
            return self.begun
        self.begun = True
        self._started_at = self._host.now()
        self._host.begun.append(self.lease_id)
        self._host.changed()
        return True

    @property
    def ended(self) -> bool:
        """See :class:`Execution`."""
        return self.exit is not None or self._vanished

    async def wait(self) -> Exit:
        """See :class:`Execution`."""
        waiter = asyncio.Event()
        self._waiters.add(waiter)
        try:
            while self.exit is None:
                if self._vanished:
                    raise ExecutionVanished(f"lease {self.lease_id} has vanished")
                await waiter.wait()
                waiter.clear()
        finally:
            self._waiters.discard(waiter)
        return self.exit

    async def stop(self, cause: StopCause, grace: timedelta | None = None) -> None:
        """See :class:`Execution`. Ends at once unless the host is told to be stubborn."""
        self.stops.append((cause, grace))
        self._host.changed()
        if not self._host.stubborn or not self.begun:
            self.end(signal_number=signal.SIGTERM if self.begun else 0)

    def renew(self, deadline_ns: int) -> None:
        """See :class:`Execution`."""
        self.deadline_ns = max(self.deadline_ns, deadline_ns)
        self._host.changed()

    async def forget(self) -> None:
        """See :class:`Execution`."""
        self.forgotten = True
        self._host.executions.pop(self.lease_id, None)
        shutil.rmtree(self._directory, ignore_errors=True)
        self._host.changed()

    def write(self, stdout: bytes = b"", stderr: bytes = b"") -> None:
        """Has the workload write."""
        for path, data in ((self.output.stdout, stdout), (self.output.stderr, stderr)):
            if data:
                with open(path, "ab") as file:
                    file.write(data)

    def tell(self, **event: Any) -> None:
        """Has the workload write an event: ``tell(type="progress", fraction=0.5)``."""
        with open(self.output.events, "ab") as file:
            file.write(json.dumps(event).encode() + b"\n")

    def end(self, exit_code: int | None = None, signal_number: int = 0, start_error: str | None = None) -> None:
        """Ends the workload; the cause is that of the first stop."""
        if self.exit is None:
            cause = self.stops[0][0] if self.stops else None
            self.exit = Exit(exit_code, signal_number, cause, start_error, self._started_at, self._host.now())
            self._wake()

    def vanish(self) -> None:
        """Has nothing left of it, as after a crash of the host or a deleted directory."""
        self._vanished = True
        self._host.executions.pop(self.lease_id, None)
        shutil.rmtree(self._directory, ignore_errors=True)
        self._wake()

    def _wake(self) -> None:
        for waiter in self._waiters:
            waiter.set()
        self._host.changed()


class ScriptedHost:
    """A host on which executions live, whatever becomes of the agent."""

    def __init__(self, directory: Path, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        """Makes an empty host whose output files go below ``directory``."""
        self.directory = directory
        self.now = now
        self.executions: dict[int, ScriptedExecution] = {}
        """lease_id → execution not forgotten."""
        self.begun: list[int] = []
        """lease_ids in the order they began to run; a lease that is twice in it ran twice."""
        self.refusal: str | None = None
        """If set, every prepare is refused with it."""
        self.failure: Exception | None = None
        """If set, every prepare raises it after the execution stands."""
        self.stubborn = False
        """Running executions do not end when they are stopped."""
        self.gate = asyncio.Event()
        """Prepare waits for it; set at first."""
        self.gate.set()
        self._changes: set[asyncio.Event] = set()

    def expire(self, now_ns: int) -> list[int]:
        """Ends every execution whose deadline has passed, as keepers do; returns their lease_ids."""
        late = [
            lease_id for lease_id, each in self.executions.items() if each.exit is None and each.deadline_ns <= now_ns
        ]
        for lease_id in late:
            execution = self.executions[lease_id]
            execution.stops.append((StopCause.LEASE_LOST, None))
            execution.end(signal_number=signal.SIGKILL)
        return late

    def changed(self) -> None:
        """Wakes :meth:`until`."""
        for change in self._changes:
            change.set()

    async def until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Waits until ``condition`` holds; it is asked again whenever something happens on the host.

        Raises:
            TimeoutError: It did not hold in time.
        """
        change = asyncio.Event()
        self._changes.add(change)
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    await change.wait()
                    change.clear()
        finally:
            self._changes.discard(change)

    async def execution(self, lease_id: int) -> ScriptedExecution:
        """Returns the execution of a lease, once it stands."""
        await self.until(lambda: lease_id in self.executions)
        return self.executions[lease_id]

    async def running(self, lease_id: int) -> ScriptedExecution:
        """Returns the execution of a lease, once it runs."""
        await self.until(lambda: lease_id in self.executions and self.executions[lease_id].begun)
        return self.executions[lease_id]


class ScriptedRuntime(Runtime):
    """A runtime over a :class:`ScriptedHost`. Its jobs do only what they are told."""

    name: ClassVar[str] = "process"

    def __init__(self, context: RuntimeContext, host: ScriptedHost | None = None) -> None:
        """Makes a runtime over ``host``; default: a new one below the context's state directory."""
        self.host = host or ScriptedHost(context.state_dir / "scripted")

    @property
    def capabilities(self) -> Capabilities:
        """It runs nothing, as any user."""
        return Capabilities(can_set_user=True)

    async def open(self) -> None:
        """See :class:`Runtime`."""

    async def close(self) -> None:
        """See :class:`Runtime`."""

    async def prepare(self, request: StartRequest) -> Execution:
        """See :class:`Runtime`."""
        await self.host.gate.wait()
        if self.host.refusal is not None:
            raise StartRefused(self.host.refusal)
        execution = self.host.executions.get(request.lease_id)
        if execution is None:
            execution = self.host.executions[request.lease_id] = ScriptedExecution(self.host, request)
            self.host.changed()
        if self.host.failure is not None:
            raise self.host.failure
        return execution

    async def adopt(self, handle: Handle) -> Execution:
        """See :class:`Runtime`."""
        execution = self.host.executions.get(int(handle.data["lease_id"]))
        if execution is None:
            raise ExecutionVanished(f"lease {handle.data['lease_id']} has vanished")
        return execution

    async def strays(self) -> list[Handle]:
        """See :class:`Runtime`."""
        return [execution.handle for execution in self.host.executions.values()]
