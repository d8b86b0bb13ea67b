"""Process runtimes, requests for them, and ways to wait for what jobs do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import lessor_agent
from lessor_agent.boottime import NS_PER_MS, boottime_ns
from lessor_agent.keeper.kernel import IDLE_TITLE
from lessor_agent.keeper.tree import read_process
from lessor_agent.runtimes.base import Execution, Exit, OnLost, RuntimeContext, StartRequest, StopCause
from lessor_agent.runtimes.process import ProcessRuntime, find_keepers
from tests.support.processes import wait_gone

ENV_ALLOW = ("PATH", "LANG", "LC_*", "ALLOWED")


def start_request(lease_id: int, argv: Sequence[str], *, deadline_ms: int = 60_000, **changes: Any) -> StartRequest:
    """Returns a request whose deadline is ``deadline_ms`` from now; ``changes`` replace its other fields."""
    request = StartRequest(
        lease_id=lease_id,
        job_id="j0000000000001",
        attempt=1,
        argv=argv,
        env={},
        working_dir=None,
        user=None,
        gpu_uuids=(),
        grace=timedelta(seconds=10),
        on_lost=OnLost.STOP,
        run_timeout=None,
        checkpoint=None,
        deadline_ns=boottime_ns() + deadline_ms * NS_PER_MS,
    )
    return replace(request, **changes)


def shell(lease_id: int, script: str, **changes: Any) -> StartRequest:
    """Returns a request that runs a shell script."""
    return start_request(lease_id, ["/bin/sh", "-c", script], **changes)


def python(lease_id: int, script: str, *arguments: str, **changes: Any) -> StartRequest:
    """Returns a request that runs a Python script."""
    return start_request(lease_id, [sys.executable, "-I", "-S", "-c", script, *arguments], **changes)


@contextlib.asynccontextmanager
async def open_runtime(state_dir: Path) -> AsyncIterator[ProcessRuntime]:
    """An open runtime. On leaving it ends every execution of the state directory, so that no test leaves any."""
    runtime = ProcessRuntime(RuntimeContext(state_dir, ENV_ALLOW))
    await runtime.open()
    try:
        yield runtime
    finally:
        for handle in await runtime.strays():
            try:
                execution = await runtime.adopt(handle)
            except Exception:  # whatever it is, the next one is to be ended too
                continue
            await execution.stop(StopCause.STALE, timedelta(0))
            async with asyncio.timeout(60):
                await execution.wait()
        await runtime.close()
        for pid in find_keepers(state_dir).values():
            await gone(pid)


# `kill_self` is what a keeper dies of; `once(path)` is true for the first that asks, in whatever process;
# `held(path)` returns when the test has written a line into that pipe.
_ENTRY = """
import os, sys
sys.path.append({agent!r})
from lessor_agent.keeper import child, directory, duty, freezer, groups, guard, spawned_child, zygote

def kill_self(*_, **__):
    os.kill(os.getpid(), 9)

def once(path):
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True

def held(path):
    with open(path) as pipe:
        pipe.readline()

{fault}

zygote.main(sys.argv[1:])
"""

Break = Callable[[str], None]
"""Has the zygotes that are started from now on, and their keepers, run with a fault: lines of Python."""


def write_faulty_entry(directory: Path, fault: str) -> None:
    """Makes ``directory`` with an entry of the zygote that runs the shipped code, changed by ``fault``."""
    directory.mkdir()
    agent = str(Path(lessor_agent.__file__).parents[1])
    (directory / "__main__.py").write_text(_ENTRY.format(agent=agent, fault=fault))


async def run(runtime: ProcessRuntime, request: StartRequest) -> tuple[Execution, Exit]:
    """Runs a request to its end."""
    execution = await runtime.prepare(request)
    await execution.begin()
    async with asyncio.timeout(60):
        return execution, await execution.wait()


async def gone(pid: int) -> None:
    """Returns once the process has ended."""
    await asyncio.to_thread(wait_gone, pid)


def lives(pid: int) -> bool:
    """Whether a process runs; the dead that nobody has reaped do not."""
    process = read_process(pid)
    return process is not None and process.alive


def keeper_of(execution: Execution) -> int:
    """Returns the pid of the keeper that guards an execution, or did."""
    return int(execution.handle.data["keeper_pid"])


async def idle(pid: int) -> None:
    """Returns once keeper ``pid`` guards nothing, and has said so."""
    async with asyncio.timeout(60):
        while Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0") != IDLE_TITLE.rstrip(b"\0"):  # noqa: ASYNC110
            await asyncio.sleep(0.001)


class Fifo:
    """A named pipe through which jobs say that something has happened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        # Open for writing as well: it never reads as closed between two writers.
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        self._data = b""

    async def line(self) -> str:
        """Returns the next line somebody writes."""
        readable = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._fd, readable.set)
        try:
            async with asyncio.timeout(60):
                while b"\n" not in self._data:
                    readable.clear()
                    await readable.wait()
                    with contextlib.suppress(BlockingIOError):
                        self._data += os.read(self._fd, 65536)
        finally:
            loop.remove_reader(self._fd)
        line, _, self._data = self._data.partition(b"\n")
        return line.decode()

    def close(self) -> None:
        """Closes it."""
        os.close(self._fd)


async def main(state_dir: str, request: StartRequest) -> None:
    """An agent that starts one job, tells the keeper's pid, and never renews."""
    runtime = ProcessRuntime(RuntimeContext(Path(state_dir), ENV_ALLOW))
    await runtime.open()
    execution = await runtime.prepare(request)
    await execution.begin()
    print(execution.handle.data["keeper_pid"], flush=True)
    await execution.wait()


if __name__ == "__main__":
    # state_dir lease_id deadline_ms grace_ms script
    asyncio.run(
        main(
            sys.argv[1],
            shell(
                int(sys.argv[2]),
                sys.argv[5],
                deadline_ms=int(sys.argv[3]),
                grace=timedelta(milliseconds=int(sys.argv[4])),
            ),
        )
    )
