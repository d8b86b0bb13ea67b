"""Runtimes with one fault each, around the process runtime: what the suite must find."""

from __future__ import annotations

import asyncio
import os
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import ClassVar

from lessor_agent.runtimes.base import (
    Capabilities,
    Execution,
    ExecutionVanished,
    Exit,
    Handle,
    OnLost,
    OutputFiles,
    Runtime,
    RuntimeContext,
    StartRefused,
    StartRequest,
    StopCause,
)
from lessor_agent.runtimes.process import ProcessRuntime
from tests.support.cluster import until
from tests.support.freezing import main_process
from tests.support.process_runtime import lives

_HOUR = timedelta(hours=1)


class Faulty(Execution):
    """An execution of the process runtime; each fault changes one thing."""

    def __init__(self, inner: Execution, runtime: FaultyRuntime) -> None:
        self.inner = inner
        self.runtime = runtime
        self.request: StartRequest | None = None
        """What it was prepared with, by this agent."""
        self.lease_id = inner.lease_id
        self.handle = inner.handle
        self.output = inner.output

    @property
    def ended(self) -> bool:
        return self.inner.ended

    async def begin(self) -> bool:
        return await self.inner.begin()

    async def wait(self) -> Exit:
        return await self.inner.wait()

    async def stop(self, cause: StopCause, grace: timedelta | None = None) -> None:
        await self.inner.stop(cause, grace)

    def renew(self, deadline_ns: int) -> None:
        self.inner.renew(deadline_ns)

    async def forget(self) -> None:
        await self.inner.forget()


class FaultyRuntime(Runtime):
    """The process runtime, its executions wrapped; each fault changes one thing."""

    name: ClassVar[str] = ProcessRuntime.name
    execution: ClassVar[type[Faulty]] = Faulty

    def __init__(self, context: RuntimeContext) -> None:
        self.inner = ProcessRuntime(context)

    @property
    def capabilities(self) -> Capabilities:
        return self.inner.capabilities

    async def open(self) -> None:
        await self.inner.open()

    async def close(self) -> None:
        await self.inner.close()

    def change(self, request: StartRequest) -> StartRequest:
        return request

    async def prepare(self, request: StartRequest) -> Execution:
        execution = self.execution(await self.inner.prepare(self.change(request)), self)
        execution.request = request
        return execution

    async def adopt(self, handle: Handle) -> Execution:
        return self.execution(await self.inner.adopt(handle), self)

    async def strays(self) -> list[Handle]:
        return await self.inner.strays()


# -- how it ended -------------------------------------------------------------


class CodeSwallowed(Faulty):
    async def wait(self) -> Exit:
        exit = await self.inner.wait()
        return exit if exit.exit_code is None else replace(exit, exit_code=0)


class SignalAsCode(Faulty):
    async def wait(self) -> Exit:
        exit = await self.inner.wait()
        return replace(exit, exit_code=128 + exit.signal, signal=0) if exit.signal else exit


class LocalTime(Faulty):
    async def wait(self) -> Exit:
        exit = await self.inner.wait()
        return replace(exit, ended_at=exit.ended_at.replace(tzinfo=None))


class StartErrorAsCode(Faulty):
    async def wait(self) -> Exit:
        exit = await self.inner.wait()
        return replace(exit, exit_code=127, start_error=None) if exit.start_error else exit


# -- output ---------------------------------------------------------------------


class Mixed(Faulty):
    async def wait(self) -> Exit:
        exit = await self.inner.wait()
        with self.output.stdout.open("ab") as stdout:
            stdout.write(self.output.stderr.read_bytes())
        return exit


class Decoded(Faulty):
    async def wait(self) -> Exit:
        exit = await self.inner.wait()
        self.output.stdout.write_text(self.output.stdout.read_text(errors="replace"))
        return exit


class Truncated(Faulty):
    async def wait(self) -> Exit:
        exit = await self.inner.wait()
        if self.output.stdout.stat().st_size > 1 << 20:
            os.truncate(self.output.stdout, 1 << 20)
        return exit


class OutputAtTheEnd(Faulty):
    """Output is fetched when all is over."""

    def __init__(self, inner: Execution, runtime: FaultyRuntime) -> None:
        super().__init__(inner, runtime)
        stdout = self.output.stdout.with_name("fetched")
        self.output = OutputFiles(stdout, self.output.stderr, self.output.events)

    async def wait(self) -> Exit:
        exit = await self.inner.wait()
        shutil.copyfile(self.inner.output.stdout, self.output.stdout)
        return exit


class InputInherited(FaultyRuntime):
    def change(self, request: StartRequest) -> StartRequest:
        return replace(request, argv=["/bin/sh", "-c", 'exec "$@" </etc/passwd', "sh", *request.argv])


class EventsDropped(Faulty):
    def __init__(self, inner: Execution, runtime: FaultyRuntime) -> None:
        super().__init__(inner, runtime)
        nothing = self.output.events.with_name("nothing")
        nothing.touch()
        self.output = OutputFiles(self.output.stdout, self.output.stderr, nothing)


class EventsParsed(Faulty):
    """Lines that are no JSON do not arrive."""

    async def wait(self) -> Exit:
        exit = await self.inner.wait()
        lines = self.output.events.read_bytes().splitlines(keepends=True)
        self.output.events.write_bytes(b"".join(line for line in lines if line.startswith(b"{")))
        return exit


# -- what it is started with ------------------------------------------------------


class ThroughAShell(FaultyRuntime):
    def change(self, request: StartRequest) -> StartRequest:
        return replace(request, argv=["/bin/sh", "-c", " ".join(f'"{argument}"' for argument in request.argv)])


class GpusForgotten(FaultyRuntime):
    def change(self, request: StartRequest) -> StartRequest:
        return replace(request, gpu_uuids=())


class AllGpus(FaultyRuntime):
    def change(self, request: StartRequest) -> StartRequest:
        return replace(request, gpu_uuids=request.gpu_uuids or ("all",))


class VariablesDropped(FaultyRuntime):
    def change(self, request: StartRequest) -> StartRequest:
        return replace(request, env={})


class AttemptForgotten(FaultyRuntime):
    def change(self, request: StartRequest) -> StartRequest:
        return replace(request, attempt=1)


class HostLeaks(FaultyRuntime):
    def change(self, request: StartRequest) -> StartRequest:
        leaked = {name: value for name, value in os.environ.items() if name.startswith("CONFORMANCE_")}
        return replace(request, env={**leaked, **request.env})


class CheckpointDropped(FaultyRuntime):
    def change(self, request: StartRequest) -> StartRequest:
        return replace(request, checkpoint=None)


class DirectoryIgnored(FaultyRuntime):
    def change(self, request: StartRequest) -> StartRequest:
        return replace(request, working_dir=None)


class OneDirectory(FaultyRuntime):
    """All attempts run in one directory."""

    def change(self, request: StartRequest) -> StartRequest:
        directory = self.inner.state_dir / "work"
        directory.mkdir(exist_ok=True)
        directory.chmod(0o777)
        return replace(request, working_dir=request.working_dir or directory)


class UserIgnored(FaultyRuntime):
    def change(self, request: StartRequest) -> StartRequest:
        return replace(request, user=None)


# -- starting -----------------------------------------------------------------------


class SecondExecution(FaultyRuntime):
    """Every start is a new execution, as where the lease is no part of what names it."""

    _starts: ClassVar[list[int]] = []

    async def prepare(self, request: StartRequest) -> Execution:
        self._starts.append(request.lease_id)
        other = request.lease_id + (self._starts.count(request.lease_id) - 1) * 100_000_000
        execution = self.execution(await self.inner.prepare(replace(request, lease_id=other)), self)
        execution.lease_id = request.lease_id
        return execution


class BegunAtPrepare(FaultyRuntime):
    async def prepare(self, request: StartRequest) -> Execution:
        execution = await self.inner.prepare(request)
        await execution.begin()
        return execution


class BegunAgain(Faulty):
    begun = False

    async def begin(self) -> bool:
        if self.begun and self.request is not None:
            again = replace(self.request, lease_id=self.lease_id + 100_000_000)
            await (await self.runtime.inner.prepare(again)).begin()
        self.begun = True
        return await self.inner.begin()


class RefusedOtherwise(FaultyRuntime):
    async def prepare(self, request: StartRequest) -> Execution:
        try:
            return await self.inner.prepare(request)
        except StartRefused as refused:
            raise ValueError(str(refused)) from None


class Crossed(Faulty):
    """Output is looked for where the last one that was started has it."""

    last: ClassVar[OutputFiles]

    def __init__(self, inner: Execution, runtime: FaultyRuntime) -> None:
        super().__init__(inner, runtime)
        Crossed.last = self.output

    async def wait(self) -> Exit:
        self.output = Crossed.last
        return await self.inner.wait()


# -- stopping -------------------------------------------------------------------------


class GraceIgnored(Faulty):
    async def stop(self, cause: StopCause, grace: timedelta | None = None) -> None:
        await self.inner.stop(cause, timedelta(0))


class NeverForced(Faulty):
    async def stop(self, cause: StopCause, grace: timedelta | None = None) -> None:
        await self.inner.stop(cause, _HOUR)


class StopOnce(Faulty):
    stopped = False

    async def stop(self, cause: StopCause, grace: timedelta | None = None) -> None:
        if not self.stopped:
            self.stopped = True
            await self.inner.stop(cause, grace)


class LastCause(Faulty):
    cause: StopCause | None = None

    async def stop(self, cause: StopCause, grace: timedelta | None = None) -> None:
        self.cause = cause
        await self.inner.stop(cause, grace)

    async def wait(self) -> Exit:
        exit = await self.inner.wait()
        return exit if self.cause is None else replace(exit, stop_cause=self.cause)


class StopForgottenBeforeBegin(Faulty):
    """A stop is kept for later if there is nothing to signal yet."""

    begun = False

    async def stop(self, cause: StopCause, grace: timedelta | None = None) -> None:
        if not self.begun:
            self.begun = await self.inner.begin()
        await self.inner.stop(cause, grace)

    async def begin(self) -> bool:
        self.begun = True
        return await self.inner.begin()


class EndToldEarly(Faulty):
    """The end is told when the main process has ended."""

    main = 0
    cause: StopCause | None = None

    async def begin(self) -> bool:
        begun = await self.inner.begin()
        if begun:
            self.main = main_process(self.inner)
        return begun

    async def stop(self, cause: StopCause, grace: timedelta | None = None) -> None:
        self.cause = cause
        await self.inner.stop(cause, grace)

    async def wait(self) -> Exit:
        if not self.main:
            return await self.inner.wait()
        await until(lambda: not lives(self.main))
        return Exit(5, 0, self.cause, None, datetime.now(UTC), datetime.now(UTC))


class TimeoutIgnored(FaultyRuntime):
    def change(self, request: StartRequest) -> StartRequest:
        return replace(request, run_timeout=None)


# -- deadlines ----------------------------------------------------------------------------


class NotEnforced(FaultyRuntime):
    def change(self, request: StartRequest) -> StartRequest:
        return replace(request, deadline_ns=1 << 62)


class AlwaysStopped(FaultyRuntime):
    def change(self, request: StartRequest) -> StartRequest:
        return replace(request, on_lost=OnLost.STOP)


class RenewIgnored(Faulty):
    def renew(self, deadline_ns: int) -> None:
        pass


class RenewedForEver(Faulty):
    def renew(self, deadline_ns: int) -> None:
        self.inner.renew(1 << 62)


class MovedBack(Faulty):
    """What is renewed to an earlier time is lost then."""

    stopping: asyncio.Task[None] | None = None

    def renew(self, deadline_ns: int) -> None:
        if self.request is not None and deadline_ns < self.request.deadline_ns:
            self.stopping = asyncio.create_task(self.inner.stop(StopCause.LEASE_LOST))
        self.inner.renew(deadline_ns)


# -- agent restarts ----------------------------------------------------------------------------


class AdoptLoses(FaultyRuntime):
    async def adopt(self, handle: Handle) -> Execution:
        raise ExecutionVanished("not looked for")


class AdoptInvents(FaultyRuntime):
    """What is not found is told as ended."""

    async def adopt(self, handle: Handle) -> Execution:
        try:
            return await super().adopt(handle)
        except ExecutionVanished:
            return Invented(int(handle.data["lease_id"]), handle)


class Invented(Execution):
    def __init__(self, lease_id: int, handle: Handle) -> None:
        self.lease_id = lease_id
        self.handle = handle

    @property
    def ended(self) -> bool:
        return True

    async def begin(self) -> bool:
        return False

    async def wait(self) -> Exit:
        return Exit(None, 0, None, None, None, datetime.now(UTC))

    async def stop(self, cause: StopCause, grace: timedelta | None = None) -> None:
        pass

    def renew(self, deadline_ns: int) -> None:
        pass

    async def forget(self) -> None:
        pass


class AdoptBegins(FaultyRuntime):
    async def adopt(self, handle: Handle) -> Execution:
        execution = await super().adopt(handle)
        await execution.begin()
        return execution


class AdoptStops(FaultyRuntime):
    """What an agent left behind is ended, instead of going on."""

    async def adopt(self, handle: Handle) -> Execution:
        execution = await super().adopt(handle)
        await execution.stop(StopCause.STALE, timedelta(0))
        return execution


class StraysHidden(FaultyRuntime):
    async def strays(self) -> list[Handle]:
        return []


class StraysOfNeighbours(FaultyRuntime):
    async def strays(self) -> list[Handle]:
        leases = self.inner.state_dir.parent.glob("*/leases/*")
        return [Handle(self.name, 1, {"lease_id": int(path.name)}) for path in leases]


class FilesLeft(Faulty):
    async def forget(self) -> None:
        pass


class ForgetOnce(Faulty):
    forgotten = False

    async def forget(self) -> None:
        if self.forgotten:
            raise KeyError(self.lease_id)
        self.forgotten = True
        await self.inner.forget()
