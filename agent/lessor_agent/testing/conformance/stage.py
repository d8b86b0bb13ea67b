"""Where one check is played: an agent's state directory, a directory shared with the jobs, one agent after another."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pytest

from lessor_agent.boottime import boottime_ns
from lessor_agent.runtimes.base import (
    Execution,
    ExecutionVanished,
    Exit,
    OnLost,
    Runtime,
    RuntimeContext,
    StartRequest,
    StopCause,
)
from lessor_agent.testing.conformance import workload
from lessor_agent.testing.conformance.subject import Subject

UNSUPPORTED = "declared unsupported: "
"""What the reason of a skipped check begins with if its author declared it; others were not run."""

LONG = timedelta(hours=1)
"""A lease that no check outlives."""

HOST_ALLOW = ("CONFORMANCE_ALLOWED", "CONFORMANCE_PREFIX_*", "LESSOR_CONFORMANCE_*")
"""What the checks have allow-listed; the last must not help."""

_T = TypeVar("_T")

_POLL_S = 0.005
_LEASE_TRIES = 4
_LEASE_GROWTH = 3


def nanoseconds(duration: timedelta) -> int:
    """Returns a duration in nanoseconds."""
    return round(duration / timedelta(microseconds=1)) * 1000


async def passed(at_ns: int) -> None:
    """Returns once the agent's clock (CLOCK_BOOTTIME) shows more than ``at_ns``."""
    while (left_ns := at_ns - boottime_ns()) >= 0:  # noqa: ASYNC110 - a clock rings no event
        await asyncio.sleep(left_ns / 1e9)


class Place:
    """A directory in which one workload shows what it does; see :func:`workload.stand`."""

    def __init__(self, path: Path) -> None:
        """Makes it; ``path`` is where the suite sees it."""
        self.path = path
        path.mkdir()
        path.chmod(0o777)

    def begun(self) -> int:
        """Returns how often the workload was run."""
        return self._size("begun") // len("begun\n")

    def ticks(self) -> dict[str, int]:
        """Returns how much each process of the workload has run so far: name → bytes it wrote."""
        return {name: size for name in ("main", "child", "runaway") if (size := self._size(name))}

    def heard(self) -> str:
        """Returns what the workload noted when it heard SIGTERM; empty: it did not."""
        path = self.path / "heard"
        return path.read_text() if path.exists() else ""

    def over(self) -> bool:
        """Whether the workload came to its own end."""
        return self._size("over") > 0

    def go(self, exit_code: int = 0) -> None:
        """Lets the workload end with ``exit_code``."""
        staged = self.path / "going"
        staged.write_text(str(exit_code))
        staged.rename(self.path / "go")

    def _size(self, name: str) -> int:
        try:
            return (self.path / name).stat().st_size
        except FileNotFoundError:
            return 0


class Stage:
    """What a check works with. Made by :func:`open_stage`."""

    def __init__(self, subject: Subject, directory: Path) -> None:
        """Makes the directories below ``directory``; :meth:`restart` opens the first agent."""
        self.subject = subject
        self.shared = directory / "shared"
        self.shared.mkdir()
        self.shared.chmod(0o777)
        self.context = self.context_of(directory / "state")
        self._directory = directory
        self._runtime: Runtime | None = None
        self._script = self.shared / "workload.py"
        shutil.copyfile(workload.__file__, self._script)
        self._script.chmod(0o755)
        # Any two checks differ in it, for runtimes that name what they start by the lease alone.
        self._lease_id = secrets.randbelow(1 << 40) * 1000
        self._places = 0

    def context_of(self, state_dir: Path) -> RuntimeContext:
        """Returns what an agent gives its runtime; makes the state directory."""
        state_dir.mkdir(exist_ok=True)
        state_dir.chmod(0o711)
        return RuntimeContext(state_dir, (*self.subject.env_allow, *HOST_ALLOW))

    @property
    def runtime(self) -> Runtime:
        """The runtime of the agent that runs now."""
        assert self._runtime is not None, "no agent runs"
        return self._runtime

    # -- agents ----------------------------------------------------------------

    async def end_agent(self) -> None:
        """Ends the agent. Executions go on."""
        if self._runtime is not None:
            runtime, self._runtime = self._runtime, None
            await self.within(runtime.close(), "close")

    async def restart(self) -> Runtime:
        """Ends the agent and starts the next one over the same state directory."""
        await self.end_agent()
        runtime = self.subject.make(self.context)
        await self.within(runtime.open(), "open")
        self._runtime = runtime
        return runtime

    async def close(self) -> None:
        """Ends the agent and whatever was left running.

        Raises:
            AssertionError: Something of it cannot be ended.
        """
        cleaner = self.subject.make_cleaner(self.context)
        if cleaner is None:
            await end_everything(self, self._runtime or await self.restart())
            await self.end_agent()
            return
        with contextlib.suppress(AssertionError):
            await self.end_agent()
        await self.within(cleaner.open(), "open, to clean up")
        try:
            await end_everything(self, cleaner)
        finally:
            await self.within(cleaner.close(), "close, after cleaning up")

    # -- workloads -----------------------------------------------------------------

    def place(self) -> Place:
        """Makes a place for one more workload."""
        self._places += 1
        return Place(self.shared / f"place-{self._places}")

    def request(self, *arguments: str | Path | Place, **changes: Any) -> StartRequest:
        """Returns a request that runs the suite's workload, under a lease of its own that ends in an hour.

        Args:
            arguments: Verb and arguments of :mod:`workload`; paths are those the suite sees.
            changes: Other fields of the request.
        """
        self._lease_id += 1
        argv = [*self.subject.python(), "-I", self.subject.there(self._script)]
        for argument in arguments:
            if isinstance(argument, Place):
                argument = argument.path
            argv.append(argument if isinstance(argument, str) else self.subject.there(argument))
        request = StartRequest(
            lease_id=self._lease_id,
            job_id="j0conformance1",
            attempt=1,
            argv=argv,
            env={},
            working_dir=None,
            user=None,
            gpu_uuids=(),
            grace=timedelta(seconds=30),
            on_lost=OnLost.STOP,
            run_timeout=None,
            checkpoint=None,
            deadline_ns=boottime_ns() + nanoseconds(LONG),
        )
        return replace(request, **changes)

    async def prepare(self, request: StartRequest) -> Execution:
        """Prepares it."""
        return await self.within(self.runtime.prepare(request), "prepare")

    async def start(self, request: StartRequest) -> Execution:
        """Prepares and begins it, which must work."""
        execution = await self.prepare(request)
        if not await self.within(execution.begin(), "begin"):
            _fail(f"it could not be run: {await self.end(execution)}")
        return execution

    async def run(self, *arguments: str | Path | Place, **changes: Any) -> tuple[Execution, Exit]:
        """Runs the suite's workload to its end; see :meth:`request`."""
        execution = await self.start(self.request(*arguments, **changes))
        return execution, await self.end(execution)

    async def stand(
        self, place: Place, manner: str = "polite", family: Sequence[str] = (), **changes: Any
    ) -> Execution:
        """Starts a workload that stands until it is let go, and returns once all of it runs."""
        execution = await self.start(self.request("stand", place, manner, *family, **changes))
        await self.running(place, execution, {"main", *family})
        return execution

    async def stand_briefly(
        self, manner: str = "polite", family: Sequence[str] = (), **changes: Any
    ) -> tuple[Place, Execution, int]:
        """Starts a workload whose lease will soon run out, and returns once all of it runs.

        Returns:
            Its place, the execution, and its deadline (CLOCK_BOOTTIME ns). Some of the lease is left.
        """
        lease = self.subject.lease
        for _ in range(_LEASE_TRIES):
            place = self.place()
            deadline_ns = boottime_ns() + nanoseconds(lease)
            request = self.request("stand", place, manner, *family, deadline_ns=deadline_ns, **changes)
            execution = await self.prepare(request)
            await self.within(execution.begin(), "begin")
            # A third of it is left for what the check does then, and for what has to be early.
            latest_ns = deadline_ns - nanoseconds(lease) // 3
            while place.ticks().keys() != {"main", *family}:
                if boottime_ns() > latest_ns:
                    break
                await asyncio.sleep(_POLL_S)
            else:
                return place, execution, deadline_ns
            await execution.stop(StopCause.STALE, timedelta(0))
            await self.end(execution)
            lease *= _LEASE_GROWTH
        _fail(f"no start took less than two thirds of {lease / _LEASE_GROWTH}: give `lease` a longer time")

    # -- waiting ---------------------------------------------------------------------

    async def within(self, awaitable: Awaitable[_T], what: str) -> _T:
        """Returns what ``awaitable`` returns; fails if that takes longer than the subject's patience."""
        patience = self.subject.patience
        try:
            async with asyncio.timeout(patience.total_seconds()):
                return await awaitable
        except TimeoutError:
            _fail(f"{what}: not done after {patience}")

    async def until(self, condition: Callable[[], object], what: str) -> None:
        """Returns once ``condition`` holds; ``what`` says so in a failure."""
        until_ns = boottime_ns() + nanoseconds(self.subject.patience)
        while not condition():
            if boottime_ns() > until_ns:
                _fail(f"not after {self.subject.patience}: {what}")
            await asyncio.sleep(_POLL_S)

    async def end(self, execution: Execution) -> Exit:
        """Returns how it ended, once it has."""
        return await self.within(execution.wait(), "wait")

    async def running(self, place: Place, execution: Execution, names: set[str]) -> None:
        """Returns once each of ``names`` runs, or runs again."""
        before = place.ticks()

        def missing() -> list[str]:
            now = place.ticks()
            return sorted(name for name in names if now.get(name, 0) <= before.get(name, 0))

        await self.until(lambda: not missing() or execution.ended, f"all of {sorted(names)} run")
        assert not execution.ended, f"it ended: {await self.end(execution)}"

    async def assert_still(self, place: Place, since: str) -> None:
        """Fails if a process of the workload runs from now on, for as long as the subject observes."""
        before = place.ticks()
        await self.observe()
        running = {name for name, size in place.ticks().items() if size != before.get(name, 0)}
        assert not running, f"{since}, and still running: {sorted(running)}"

    async def observe(self) -> None:
        """Returns after the time that shows that nothing happens."""
        await passed(boottime_ns() + nanoseconds(self.subject.observe))

    async def past(self, deadline_ns: int) -> None:
        """Returns once a deadline is over, and what may be late as well."""
        await passed(deadline_ns + nanoseconds(self.subject.late))

    def needs(self, capable: bool, capability: str) -> None:
        """Skips the check, as declared unsupported, where the runtime says that it is not capable of it."""
        if not capable:
            pytest.skip(f"{UNSUPPORTED}`capabilities.{capability}` is false")


def make_directory(parent: Path | None) -> Path:
    """Makes the directory of one stage, which jobs of other users can pass through."""
    directory = Path(tempfile.mkdtemp(prefix="lessor-conformance-", dir=parent)).resolve()
    directory.chmod(0o711)
    return directory


@contextlib.asynccontextmanager
async def open_stage(subject: Subject) -> AsyncIterator[Stage]:
    """A stage with a running agent. On leaving it all that was left is ended and removed."""
    directory = make_directory(subject.parent_dir())
    try:
        stage = Stage(subject, directory)
        try:
            await stage.restart()
            yield stage
        finally:
            await stage.close()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def end_everything(stage: Stage, cleaner: Runtime) -> None:
    """Ends and forgets every execution of the stage's state directory.

    Raises:
        AssertionError: One does not end.
    """
    for handle in await stage.within(cleaner.strays(), "strays, to clean up"):
        try:
            execution = await stage.within(cleaner.adopt(handle), "adopt, to clean up")
        except ExecutionVanished:
            continue
        await execution.stop(StopCause.STALE, timedelta(0))
        await stage.end(execution)
        await stage.within(execution.forget(), "forget, to clean up")


def told(execution: Execution) -> dict[str, Any]:
    """Returns what :func:`workload.tell` printed; ``environ`` decoded, undecodable bytes as surrogates."""
    found: dict[str, Any] = json.loads(execution.output.stdout.read_bytes())
    found["argv"] = [bytes.fromhex(argument) for argument in found["argv"]]
    found["environ"] = {
        bytes.fromhex(name).decode(errors="surrogateescape"): bytes.fromhex(value).decode(errors="surrogateescape")
        for name, value in found["environ"].items()
    }
    return found


def assert_never_ran(exit: Exit, cause: StopCause | None) -> None:
    """Fails unless it ended, for that cause, without having run."""
    assert (exit.exit_code, exit.signal, exit.stop_cause, exit.started_at) == (None, 0, cause, None)


def _fail(message: str) -> NoReturn:
    raise AssertionError(message)
