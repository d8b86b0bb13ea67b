"""The process runtime: a lease that is lost while its workload is being started, and freezes that fail half-way."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

from lessor_agent.boottime import boottime_ns
from lessor_agent.keeper.record import read_begun
from lessor_agent.runtimes.base import Execution, StopCause
from tests.support.cluster import until
from tests.support.freezing import (
    FAMILY,
    LATER_NS,
    LISTENING,
    LONG_NS,
    TICKING,
    WAYS,
    Lose,
    assert_still,
    begun,
    expire,
    of,
    passed,
    ticked,
)
from tests.support.process_runtime import Break, Fifo, gone, keeper_of, open_runtime

# -- a lease that is lost while its workload is being started ------------------------------


async def test_what_is_about_to_be_started_at_its_deadline_never_runs(
    tmp_path: Path, ticks: Path, fifo: Fifo, breaks: Break
) -> None:
    breaks(f"""
def wait(spec, candidates=spawned_child._candidates):
    held({str(fifo.path)!r})
    yield from candidates(spec)
spawned_child._candidates = wait
""")
    async with open_runtime(tmp_path / "state") as runtime:
        execution = await runtime.prepare(of(FAMILY, ticks))
        begin = asyncio.create_task(execution.begin())
        await until(lambda: begun_at(execution) is not None)
        expire(execution)
        async with asyncio.timeout(60):
            exit = await execution.wait()
        assert (exit.started_at, exit.stop_cause, exit.start_error) == (None, StopCause.LEASE_LOST, None)
        assert not await begin
        fifo.path.write_text("go on\n")
        await gone(keeper_of(execution))
    assert list(ticks.iterdir()) == []


def begun_at(execution: Execution) -> int | None:
    """Returns when the keeper let it run."""
    with (execution.output.stdout.parent / "record").open("rb") as record:
        return read_begun(record.fileno())


async def test_what_has_just_begun_at_its_deadline_stands_still(
    tmp_path: Path, ticks: Path, fifo: Fifo, breaks: Break, lose: Lose
) -> None:
    breaks(f"""
def tell_late(self, spawn=spawned_child.SpawnedChild._spawn):
    failure = spawn(self)
    held({str(fifo.path)!r})
    return failure
spawned_child.SpawnedChild._spawn = tell_late
""")
    async with open_runtime(tmp_path / "state") as runtime:
        execution = await runtime.prepare(of(LISTENING, ticks))
        begin = asyncio.create_task(execution.begin())
        await ticked(ticks / "main")
        freeze = await lose(execution)
        await passed(freeze.since_ns + LATER_NS)
        renewed_ns = boottime_ns()
        assert_still(ticks, freeze, renewed_ns)
        execution.renew(renewed_ns + LONG_NS)
        await ticked(ticks / "main", renewed_ns)
        fifo.path.write_text("go on\n")
        assert await begin
        await execution.stop(StopCause.CANCELLED)
        assert (await execution.wait()).exit_code == 0


async def test_an_attempt_to_start_that_fails_after_the_deadline_is_the_last(
    tmp_path: Path, ticks: Path, fifo: Fifo, breaks: Break, lose: Lose
) -> None:
    breaks(f"""
class Libc:
    def __getattr__(self, name, libc=spawned_child._libc):
        return getattr(libc, name)
    def posix_spawn(self, *arguments, spawn=spawned_child._libc.posix_spawn):
        if once({str(tmp_path / "tried")!r}):
            held({str(fifo.path)!r})
            return 2
        return spawn(*arguments)
spawned_child._libc = Libc()
spawned_child._candidates = lambda spec: [spec.argv[0].encode()] * 2
""")
    async with open_runtime(tmp_path / "state") as runtime:
        execution = await runtime.prepare(of(FAMILY, ticks))
        begin = asyncio.create_task(execution.begin())
        await until((tmp_path / "tried").exists)
        await lose(execution)
        fifo.path.write_text("go on\n")
        async with asyncio.timeout(60):
            exit = await execution.wait()
        assert (exit.started_at, exit.stop_cause, exit.start_error) == (None, StopCause.LEASE_LOST, None)
        assert not await begin
    assert list(ticks.iterdir()) == []


# -- signals from elsewhere, and what fails half-way ----------------------------------------


async def test_a_thaw_that_fails_half_way_is_completed(tmp_path: Path, ticks: Path, breaks: Break, lose: Lose) -> None:
    breaks(f"""
{WAYS["signals"]}
import signal
def refuse(process, signum, send=freezer.send, sent=[]):
    sent += [signum] * (signum == signal.SIGCONT)
    if signum == signal.SIGCONT and len(sent) in (2, 3):
        raise OSError(24, "Too many open files")
    return send(process, signum)
freezer.send = refuse
""")
    family = ("main", "child", "grandchild", "busy")
    async with open_runtime(tmp_path / "state") as runtime:
        execution = await begun(runtime, of(FAMILY, ticks), ticks, *family)
        await lose(execution)
        renewed_ns = boottime_ns()
        execution.renew(renewed_ns + LONG_NS)
        for name in family:
            await ticked(ticks / name, renewed_ns)
        await until(lambda: "could not thaw" in (execution.output.stdout.parent / "keeper.log").read_text())
        await execution.stop(StopCause.CANCELLED, timedelta(0))
        await execution.wait()


# Children of groups of their own, deaf to SIGHUP, which the kernel sends with SIGCONT to those whose parent dies.
SHELL = f"""{TICKING}
for number in range(20):
    if os.fork() == 0:
        os.setpgid(0, 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        tick(directory + "/child%d" % number)
tick(directory + "/main")
"""


async def test_what_is_killed_as_it_stands_is_not_woken_by_its_parents_death(
    tmp_path: Path, ticks: Path, breaks: Break, lose: Lose
) -> None:
    # So slow is a host that is busy: the dead parent is buried before its child is killed.
    breaks(f"""
{WAYS["signals"]}
import signal, time
from lessor_agent.keeper import tree
def slow(process, signum, send=tree.send):
    sent = send(process, signum)
    time.sleep(0.01 if signum == signal.SIGKILL else 0)
    return sent
tree.send = slow
""")
    names = ("main", *(f"child{number}" for number in range(20)))
    async with open_runtime(tmp_path / "state") as runtime:
        execution = await begun(runtime, of(SHELL, ticks), ticks, *names)
        freeze = await lose(execution)
        await execution.stop(StopCause.STALE)
        await execution.wait()
        assert_still(ticks, freeze)
