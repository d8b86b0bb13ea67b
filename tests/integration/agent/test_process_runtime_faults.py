"""Keepers and zygotes that fail at a certain step: each runs the shipped code, changed by the test's own entry."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from lessor_agent.keeper import nursery
from lessor_agent.keeper.directory import LeaseDirectory
from lessor_agent.runtimes.base import Execution, RuntimeContext, StopCause
from lessor_agent.runtimes.process import ProcessRuntime, find_keepers
from tests.support.process_runtime import (
    ENV_ALLOW,
    Break,
    Fifo,
    gone,
    idle,
    keeper_of,
    lives,
    open_runtime,
    run,
    shell,
    start_request,
)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Fifo]:
    made = Fifo(tmp_path / "gate")
    yield made
    made.close()


async def ended(execution: Execution) -> StopCause | None:
    async with asyncio.timeout(60):
        return (await execution.wait()).stop_cause


@contextlib.asynccontextmanager
async def an_agent(state_dir: Path) -> AsyncIterator[ProcessRuntime]:
    """A runtime that leaves its executions running, as an agent that dies does."""
    runtime = ProcessRuntime(RuntimeContext(state_dir, ENV_ALLOW))
    await runtime.open()
    try:
        yield runtime
    finally:
        await runtime.close()


async def marks(path: Path, count: int) -> list[str]:
    """Returns the lines that jobs have appended to ``path`` once there are ``count``."""
    async with asyncio.timeout(60):
        while not path.exists() or len(path.read_text().splitlines()) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
    return path.read_text().splitlines()


# -- a keeper that is killed on the way ------------------------------------------------

STEPS = {
    "note of the begin made, nothing started": "spawned_child.SpawnedChild.begin = kill_self",
    "process there, not told": """
tell = guard.Keeper._tell_all
def fail(self, outcome=None):
    if outcome is None:
        kill_self()
    tell(self, outcome)
guard.Keeper._tell_all = fail
""",
    "tree gone, outcome not stored": "directory.LeaseDirectory.write_outcome = kill_self",
}


@pytest.mark.parametrize("fault", STEPS.values(), ids=STEPS.keys())
async def test_a_keeper_killed_after_the_begin_ends_its_lease_which_never_runs_again(
    tmp_path: Path, breaks: Break, fault: str
) -> None:
    breaks(fault)
    request = shell(1, f"echo $$ >> {tmp_path}/ran; test -e {tmp_path}/stay && exec sleep 1000")
    if fault is not STEPS["tree gone, outcome not stored"]:
        (tmp_path / "stay").touch()
    async with open_runtime(tmp_path / "state") as runtime:
        execution = await runtime.prepare(request)
        await execution.begin()
        assert await ended(execution) is StopCause.KEEPER_DIED
        again = await runtime.prepare(request)
        assert await ended(again) is StopCause.KEEPER_DIED
    # An agent that comes later finds the same.
    async with open_runtime(tmp_path / "state") as later:
        assert await ended(await later.prepare(request)) is StopCause.KEEPER_DIED
    ran = (tmp_path / "ran").read_text().split() if (tmp_path / "ran").exists() else []
    assert len(ran) <= 1
    for pid in ran:
        assert not lives(int(pid))


async def test_an_agent_that_died_too_finds_that_it_began(tmp_path: Path, breaks: Break) -> None:
    breaks("spawned_child.SpawnedChild.begin = kill_self")
    request = shell(1, f"echo ran >> {tmp_path}/ran")
    async with an_agent(tmp_path / "state") as first:
        execution = await first.prepare(request)
        begin = asyncio.create_task(execution.begin())
        await gone(keeper_of(execution))
        begin.cancel()
    # The first may have written down the end already, or not: neither lets it run.
    async with open_runtime(tmp_path / "state") as second:
        assert await ended(await second.prepare(request)) is StopCause.KEEPER_DIED
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("guard.set_title = kill_self", id="stored, lock held"),
        pytest.param(
            """
tell = guard.Keeper._tell_all
def fail(self, outcome=None):
    if outcome is not None:
        kill_self()
    tell(self, outcome)
guard.Keeper._tell_all = fail
""",
            id="lock free, not told",
        ),
    ],
)
async def test_a_keeper_killed_once_the_outcome_is_stored_loses_none(tmp_path: Path, breaks: Break, fault: str) -> None:
    breaks(fault)
    async with open_runtime(tmp_path / "state") as runtime:
        execution, exit = await run(runtime, shell(1, "exit 3"))
        assert (exit.exit_code, exit.stop_cause) == (3, None)
        await execution.forget()
    assert os.listdir(tmp_path / "state" / "leases") == []


async def test_a_keeper_killed_before_the_begin_lets_the_lease_start_again(tmp_path: Path, breaks: Break) -> None:
    breaks(
        f"""
report = duty._report
def fail(zygote, answer):
    if answer == {{}} and once({str(tmp_path / "first")!r}):
        kill_self()
    report(zygote, answer)
duty._report = fail
"""
    )
    async with open_runtime(tmp_path / "state") as runtime:
        with pytest.raises(Exception, match="died before it was ready"):
            await runtime.prepare(shell(1, "exit 5"))
        _, exit = await run(runtime, shell(1, "exit 5"))
        assert exit.exit_code == 5


# -- a start that hangs, or that the host has no room for ----------------------------------


async def test_a_start_that_hangs_before_its_process_never_happens_once_it_is_stopped(
    tmp_path: Path, breaks: Break, gate: Fifo
) -> None:
    # A directory of PATH on a file system that does not answer, say.
    breaks(f"spawned_child._may_exist = lambda path: held({str(gate.path)!r}) or True")
    argv = ["sh", "-c", f"echo ran >> {tmp_path}/ran"]
    async with open_runtime(tmp_path / "state") as runtime:
        execution = await runtime.prepare(start_request(1, argv, deadline_ms=1500, grace=timedelta(0)))
        begin = asyncio.create_task(execution.begin())
        # Nobody renews: the keeper must end it while its other thread hangs.
        assert await ended(execution) is StopCause.LEASE_LOST
        assert (await execution.wait()).started_at is None
        assert not await begin
        keeper = keeper_of(execution)
        gate.path.write_text("go\n")
        await gone(keeper)
        assert not (tmp_path / "ran").exists()


_LATE = """
class Late:
    def __getattr__(self, name):
        return getattr(real, name)
    def posix_spawn(self, *arguments):
        once({gate!r} + ".reached")
        held({gate!r})
        return real.posix_spawn(*arguments)
real = spawned_child._libc
spawned_child._libc = Late()
"""
"""A workload's process comes only when the test says so: its keeper was not scheduled, say."""


async def test_a_process_that_comes_after_the_deadline_is_ended(tmp_path: Path, breaks: Break, gate: Fifo) -> None:
    breaks(_LATE.format(gate=str(gate.path)))
    request = shell(1, f"echo $$ > {tmp_path}/pid; exec sleep 1000", deadline_ms=1000, grace=timedelta(0))
    async with open_runtime(tmp_path / "state") as runtime:
        execution = await runtime.prepare(request)
        begin = asyncio.create_task(execution.begin())
        async with asyncio.timeout(60):
            while not (execution.output.stdout.parent / "cancel").exists():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        # Its end is not told as long as a process may come.
        assert find_keepers(tmp_path / "state") == {1: keeper_of(execution)}
        gate.path.write_text("go\n")
        assert await ended(execution) is StopCause.LEASE_LOST
        await begin
    if (tmp_path / "pid").exists() and (pid := (tmp_path / "pid").read_text().strip()):
        assert not lives(int(pid))


async def test_a_process_that_comes_after_a_stop_is_asked_to_stop(tmp_path: Path, breaks: Break, gate: Fifo) -> None:
    breaks(_LATE.format(gate=str(gate.path)))
    async with open_runtime(tmp_path / "state") as runtime:
        execution = await runtime.prepare(shell(1, "exec sleep 1000", grace=timedelta(seconds=40)))
        begin = asyncio.create_task(execution.begin())
        async with asyncio.timeout(60):
            while not gate.path.with_name("gate.reached").exists():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            await execution.stop(StopCause.CANCELLED)
            while not (execution.output.stdout.parent / "cancel").exists():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        gate.path.write_text("go\n")
        # Within the grace.
        assert await ended(execution) is StopCause.CANCELLED
        assert (await execution.wait()).signal == signal.SIGTERM
        await begin


@pytest.mark.parametrize("code", ["EAGAIN", "ENOMEM"])
async def test_a_host_without_room_for_a_process_is_not_the_jobs_fault(
    tmp_path: Path, breaks: Break, code: str
) -> None:
    breaks(
        f"""
import errno
class Full:
    def __getattr__(self, name):
        return getattr(real, name)
    def posix_spawn(self, *arguments):
        return errno.{code} if once({str(tmp_path / "first")!r}) else real.posix_spawn(*arguments)
real = spawned_child._libc
spawned_child._libc = Full()
"""
    )
    async with open_runtime(tmp_path / "state") as runtime:
        execution, exit = await run(runtime, shell(1, "exit 1"))
        assert (exit.stop_cause, exit.start_error, exit.started_at) == (StopCause.KEEPER_DIED, None, None)
        assert "cannot run /bin/sh" in (execution.output.stdout.parent / "keeper.log").read_text()
        _, exit = await run(runtime, shell(2, "exit 2"))
        assert exit.exit_code == 2


async def test_a_keeper_without_room_for_a_thread_says_so(tmp_path: Path, breaks: Break) -> None:
    breaks(
        """
def full(*_):
    raise RuntimeError("can't start new thread")
spawned_child._thread.start_new_thread = full
"""
    )
    async with open_runtime(tmp_path / "state") as runtime:
        _, exit = await run(runtime, shell(1, "exit 1"))
        assert (exit.stop_cause, exit.start_error, exit.started_at) == (StopCause.KEEPER_DIED, None, None)


async def test_a_full_disk_does_not_keep_the_end_from_being_told(tmp_path: Path, breaks: Break) -> None:
    breaks(
        """
import errno
def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
directory.LeaseDirectory.write_outcome = full
"""
    )
    async with open_runtime(tmp_path / "state") as runtime:
        execution, exit = await run(runtime, shell(1, "exit 3"))
        assert exit.exit_code == 3
        # What is not on disk may be asked for again only of this keeper: it takes no other lease.
        await gone(keeper_of(execution))


# -- agent and zygote gone ---------------------------------------------------------------


async def test_agent_and_keeper_killed_the_zygote_ends_the_whole_tree(tmp_path: Path, fifo: Fifo) -> None:
    async with an_agent(tmp_path / "state") as runtime:
        script = f"setsid -f sh -c 'echo $$ > {fifo.path}; exec sleep 1000'; echo $$ > {fifo.path}; exec sleep 1000"
        execution = await runtime.prepare(shell(1, script))
        await execution.begin()
        pids = [int(await fifo.line()), int(await fifo.line())]
        zygote = runtime.zygote_pid
        assert zygote is not None
    assert lives(zygote)
    os.kill(keeper_of(execution), signal.SIGKILL)
    for pid in (*pids, zygote):
        await gone(pid)


async def test_a_keeper_killed_while_the_zygote_stands_still_is_cleaned_up_after_at_once(
    tmp_path: Path, fifo: Fifo
) -> None:
    async with open_runtime(tmp_path / "state") as runtime:
        execution = await runtime.prepare(shell(1, f"echo $$ > {fifo.path}; exec sleep 1000"))
        await execution.begin()
        main = int(await fifo.line())
        assert runtime.zygote_pid is not None
        os.kill(runtime.zygote_pid, signal.SIGSTOP)
        os.kill(keeper_of(execution), signal.SIGKILL)
        async with asyncio.timeout(nursery.ANSWER_TIMEOUT_S / 2):
            while lives(main):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        os.kill(runtime.zygote_pid, signal.SIGCONT)
        assert await ended(execution) is StopCause.KEEPER_DIED


async def test_an_agent_that_dies_before_a_given_lease_is_answered_for(
    tmp_path: Path, breaks: Break, gate: Fifo
) -> None:
    breaks(
        f"""
report = duty._report
def slow(zygote, answer):
    if answer == {{}} and not once({str(tmp_path / "first")!r}) and once({str(tmp_path / "second")!r}):
        held({str(gate.path)!r})
    report(zygote, answer)
duty._report = slow
"""
    )
    request = shell(2, f"echo ran >> {tmp_path}/ran")
    async with an_agent(tmp_path / "state") as first:
        execution, _ = await run(first, shell(1, ":"))
        await execution.forget()
        keeper = keeper_of(execution)
        await idle(keeper)
        start = asyncio.create_task(first.prepare(request))
        async with asyncio.timeout(60):
            while not (tmp_path / "second").exists():  # noqa: ASYNC110
                await asyncio.sleep(0.002)
    with pytest.raises(asyncio.CancelledError):
        await start
    async with open_runtime(tmp_path / "state") as second:
        found = asyncio.create_task(second.prepare(request))
        gate.path.write_text("go\n")
        execution = await found
        assert keeper_of(execution) == keeper
        await execution.begin()
        assert await ended(execution) is None
        assert await marks(tmp_path / "ran", 1) == ["ran"]
        await gone(keeper)


async def test_idle_keepers_end_with_their_zygote_and_others_once_they_are_idle(
    tmp_path: Path, fifo: Fifo, gate: Fifo
) -> None:
    async with open_runtime(tmp_path / "state") as runtime:
        busy = await runtime.prepare(shell(1, f"echo up > {fifo.path}; read line < {gate.path}; exit 7"))
        await busy.begin()
        await fifo.line()
        done, _ = await run(runtime, shell(2, ":"))
        await done.forget()
        zygote = runtime.zygote_pid
        assert zygote is not None
        assert keeper_of(done) != keeper_of(busy)
        os.kill(zygote, signal.SIGKILL)
        await gone(keeper_of(done))
        assert lives(keeper_of(busy))
        gate.path.write_text("go\n")
        assert (await busy.wait()).exit_code == 7
        await gone(keeper_of(busy))


async def test_a_keeper_that_stands_still_with_a_lease_given_to_it_takes_none_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_runtime(tmp_path / "state") as runtime:
        done, _ = await run(runtime, shell(1, ":"))
        await done.forget()
        await idle(keeper_of(done))
        os.kill(keeper_of(done), signal.SIGSTOP)
        monkeypatch.setattr(nursery, "ANSWER_TIMEOUT_S", 0.5)
        execution, exit = await run(runtime, shell(2, f"echo ran >> {tmp_path}/ran; exit 2"))
        assert exit.exit_code == 2
        assert keeper_of(execution) != keeper_of(done)
        os.kill(keeper_of(done), signal.SIGCONT)
        await gone(keeper_of(done))
        assert (tmp_path / "ran").read_text() == "ran\n"


async def test_a_keeper_that_cannot_say_what_went_wrong_guards_on(tmp_path: Path, fifo: Fifo) -> None:
    """A full disk has no room for ``keeper.log``."""
    async with open_runtime(tmp_path / "state") as runtime:
        execution = await runtime.prepare(shell(1, f"read answer < {fifo.path}; exit 6"))
        await execution.begin()
        path = execution.output.stdout.parent
        (path / "keeper.log").symlink_to("/dev/full")
        directory = LeaseDirectory(str(path), 1)
        with directory.connect() as connection:
            directory.close()
            connection.sendall(b"no order\n" * 3)
            # The word that comes after an order was read is proof that the keeper lived on.
            connection.sendall(b'{"op": "begin"}\n')
        with open(fifo.path, "w") as pipe:
            pipe.write("go on\n")
        assert (await execution.wait()).exit_code == 6
