"""The process runtime: asking jobs to stop, ending whole trees, and deadlines."""

from __future__ import annotations

import asyncio
import os
import signal
from datetime import timedelta

import pytest

from lessor_agent.boottime import NS_PER_MS, boottime_ns
from lessor_agent.keeper.tree import read_process
from lessor_agent.keeper.verdict import KILL_SLACK_NS
from lessor_agent.runtimes.base import StopCause
from lessor_agent.runtimes.process import ProcessRuntime
from tests.support.process_runtime import Fifo, gone, lives, python, shell

MS = timedelta(milliseconds=1)
SLACK_MS = KILL_SLACK_NS // NS_PER_MS

# Tells that it stands and waits for ever, deaf to SIGTERM.
DEAF = "trap '' TERM; echo $$ > {fifo}; exec sleep 1000"

# A grandchild of its own session whose parent is gone, deaf to SIGTERM and without any inherited file or variable.
RUNAWAY = """
import os, signal, sys
def runaway(tell):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(signum, signal.SIG_IGN)
            os.closerange(0, 64)
            os.chdir("/")
            fd = os.open(tell, os.O_WRONLY)
            script = f"import os, signal; os.write({fd}, b'%d\\\\n' % os.getpid()); os.close({fd}); signal.pause()"
            os.set_inheritable(fd, True)
            os.execve(sys.executable, [sys.executable, "-I", "-S", "-c", script], {})
        os._exit(0)
    os.wait()
runaway(sys.argv[1])
"""


async def test_cooperative_cancel(runtime: ProcessRuntime, fifo: Fifo) -> None:
    script = f"""trap 'test -e "$LESSOR_CANCEL" && echo asked; exit 0' TERM
        test -e "$LESSOR_CANCEL" && echo early; echo ready > {fifo.path}; while :; do sleep 1000 & wait; done"""
    execution = await runtime.prepare(shell(1, script))
    await execution.begin()
    await fifo.line()
    await execution.stop(StopCause.CANCELLED)
    exit = await execution.wait()
    assert (exit.exit_code, exit.signal, exit.stop_cause) == (0, 0, StopCause.CANCELLED)
    assert execution.output.stdout.read_text() == "asked\n"


async def test_forced_after_the_grace(runtime: ProcessRuntime, fifo: Fifo) -> None:
    execution = await runtime.prepare(shell(1, DEAF.format(fifo=fifo.path)))
    await execution.begin()
    await fifo.line()
    asked_ns = boottime_ns()
    await execution.stop(StopCause.CANCELLED, 300 * MS)
    exit = await execution.wait()
    assert boottime_ns() - asked_ns >= 300 * NS_PER_MS
    assert (exit.exit_code, exit.signal, exit.stop_cause) == (None, signal.SIGKILL, StopCause.CANCELLED)


async def test_a_second_stop_only_shortens_the_grace_and_the_first_cause_counts(
    runtime: ProcessRuntime, fifo: Fifo
) -> None:
    execution = await runtime.prepare(shell(1, DEAF.format(fifo=fifo.path)))
    await execution.begin()
    await fifo.line()
    asked_ns = boottime_ns()
    await execution.stop(StopCause.CANCELLED, timedelta(seconds=60))
    await execution.stop(StopCause.STALE, timedelta(milliseconds=50))
    await execution.stop(StopCause.STALE, timedelta(seconds=60))
    exit = await execution.wait()
    assert exit.stop_cause is StopCause.CANCELLED
    assert boottime_ns() - asked_ns < 20_000 * NS_PER_MS


async def test_a_stopped_process_hears_the_cancel(runtime: ProcessRuntime, fifo: Fifo) -> None:
    script = f"trap 'exit 4' TERM; echo $$ > {fifo.path}; kill -STOP $$; while :; do sleep 1000 & wait; done"
    execution = await runtime.prepare(shell(1, script))
    await execution.begin()
    await fifo.line()
    await execution.stop(StopCause.CANCELLED)
    assert (await execution.wait()).exit_code == 4


async def test_runaway_grandchild_is_killed_on_stop(runtime: ProcessRuntime, fifo: Fifo) -> None:
    execution = await runtime.prepare(python(1, RUNAWAY + "signal.pause()", str(fifo.path)))
    await execution.begin()
    runaway = int(await fifo.line())
    assert lives(runaway)
    await execution.stop(StopCause.CANCELLED, 100 * MS)
    exit = await execution.wait()
    assert not lives(runaway)
    assert (exit.signal, exit.stop_cause) == (signal.SIGTERM, StopCause.CANCELLED)


async def test_what_the_main_process_leaves_behind_is_ended_before_the_end_is_told(
    runtime: ProcessRuntime, fifo: Fifo
) -> None:
    answer = Fifo(fifo.path.with_name("answer"))
    script = RUNAWAY + "open(sys.argv[2]).readline(); os._exit(3)"
    execution = await runtime.prepare(python(1, script, str(fifo.path), str(answer.path), grace=100 * MS))
    await execution.begin()
    runaway = int(await fifo.line())
    answer.path.write_text("go\n")
    exit = await execution.wait()
    answer.close()
    assert not lives(runaway)
    assert (exit.exit_code, exit.signal, exit.stop_cause) == (3, 0, None)


async def test_a_tree_that_keeps_forking_is_killed(runtime: ProcessRuntime, fifo: Fifo) -> None:
    # Each process lives for an instant and is replaced by its child: a kill by list always comes too late.
    script = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
fd = os.open(sys.argv[1], os.O_WRONLY)
if os.fork():
    signal.pause()
os.setsid()
generation = 0
while True:
    if os.fork():
        os._exit(0)
    generation += 1
    if generation == 50:
        os.write(fd, b"turning\\n")
"""
    execution = await runtime.prepare(python(1, script, str(fifo.path)))
    await execution.begin()
    assert await fifo.line() == "turning"
    await execution.stop(StopCause.CANCELLED, timedelta(0))
    async with asyncio.timeout(60):
        exit = await execution.wait()
    assert exit.signal == signal.SIGKILL
    # The keeper has exited: as a subreaper it does so only without descendants.


async def test_signals_to_the_keeper_do_not_reach_the_job(runtime: ProcessRuntime, fifo: Fifo) -> None:
    execution = await runtime.prepare(shell(1, f"echo ready > {fifo.path}; read _ < {fifo.path}.go; exit 6"))
    go = Fifo(fifo.path.with_name("fifo.go"))
    await execution.begin()
    await fifo.line()
    keeper = int(execution.handle.data["keeper_pid"])
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(keeper, signum)
    go.path.write_text("go\n")
    exit = await execution.wait()
    go.close()
    assert (exit.exit_code, exit.stop_cause) == (6, None)


async def test_without_renewals_the_tree_is_gone_by_the_deadline(runtime: ProcessRuntime, fifo: Fifo) -> None:
    request = python(1, RUNAWAY + "signal.pause()", str(fifo.path), deadline_ms=1500, grace=200 * MS)
    execution = await runtime.prepare(request)
    await execution.begin()
    runaway = int(await fifo.line())
    exit = await execution.wait()
    ended_ns = boottime_ns()
    assert exit.stop_cause is StopCause.LEASE_LOST
    assert exit.signal == signal.SIGTERM
    assert not lives(runaway)
    # Not before the stop was due, and over by the deadline.
    assert request.deadline_ns - (SLACK_MS + 200) * NS_PER_MS <= ended_ns < request.deadline_ns


async def test_a_job_deaf_to_sigterm_is_gone_by_the_deadline(runtime: ProcessRuntime, fifo: Fifo) -> None:
    request = shell(1, DEAF.format(fifo=fifo.path), deadline_ms=1000, grace=300 * MS)
    execution = await runtime.prepare(request)
    await execution.begin()
    exit = await execution.wait()
    assert boottime_ns() < request.deadline_ns
    assert (exit.signal, exit.stop_cause) == (signal.SIGKILL, StopCause.LEASE_LOST)


async def test_a_renewal_extends_and_an_earlier_one_changes_nothing(runtime: ProcessRuntime, fifo: Fifo) -> None:
    request = shell(1, DEAF.format(fifo=fifo.path), deadline_ms=700, grace=100 * MS)
    execution = await runtime.prepare(request)
    await execution.begin()
    later_ns = request.deadline_ns + 800 * NS_PER_MS
    execution.renew(later_ns)
    execution.renew(request.deadline_ns)
    execution.renew(0)
    exit = await execution.wait()
    assert exit.stop_cause is StopCause.LEASE_LOST
    assert request.deadline_ns < boottime_ns() < later_ns
    execution.renew(later_ns * 2)


async def test_prepared_and_never_begun_is_gone_by_the_deadline_without_having_run(runtime: ProcessRuntime) -> None:
    request = shell(1, "echo ran", deadline_ms=600, grace=100 * MS)
    execution = await runtime.prepare(request)
    exit = await execution.wait()
    assert boottime_ns() < request.deadline_ns
    assert (exit.exit_code, exit.signal, exit.stop_cause) == (None, 0, StopCause.LEASE_LOST)
    assert exit.started_at is None
    await execution.begin()
    assert execution.output.stdout.read_text() == ""


@pytest.mark.parametrize("deadline_ms", [-1000, 0, 100])
async def test_a_deadline_in_the_past_lets_nothing_run(runtime: ProcessRuntime, deadline_ms: int) -> None:
    execution = await runtime.prepare(shell(1, "echo ran", deadline_ms=deadline_ms, grace=100 * MS))
    await execution.begin()
    exit = await execution.wait()
    assert (exit.stop_cause, exit.started_at) == (StopCause.LEASE_LOST, None)
    assert execution.output.stdout.read_text() == ""


async def test_a_damaged_record_ends_the_job_at_once(runtime: ProcessRuntime, fifo: Fifo) -> None:
    execution = await runtime.prepare(shell(1, DEAF.format(fifo=fifo.path)))
    await execution.begin()
    await fifo.line()
    with (execution.output.stdout.parent / "record").open("r+b") as record:
        record.write(b"NOTOURS!")
    async with asyncio.timeout(5):
        exit = await execution.wait()
    assert (exit.signal, exit.stop_cause) == (signal.SIGKILL, StopCause.LEASE_LOST)


async def test_keeper_killed_ends_the_whole_tree(runtime: ProcessRuntime, fifo: Fifo) -> None:
    execution = await runtime.prepare(python(1, RUNAWAY + "signal.pause()", str(fifo.path)))
    await execution.begin()
    runaway = int(await fifo.line())
    process = read_process(runaway)
    assert process is not None
    keeper = int(execution.handle.data["keeper_pid"])
    assert process.parent == keeper
    os.kill(keeper, signal.SIGKILL)
    exit = await execution.wait()
    # It has nothing by which it could be told: no variable, no file. Its parent was enough.
    await gone(runaway)
    assert (exit.exit_code, exit.signal, exit.stop_cause) == (None, 0, StopCause.KEEPER_DIED)
    assert exit.started_at is not None


async def test_keeper_killed_before_begin(runtime: ProcessRuntime) -> None:
    execution = await runtime.prepare(shell(1, "echo ran"))
    keeper = int(execution.handle.data["keeper_pid"])
    os.kill(keeper, signal.SIGKILL)
    await execution.begin()
    exit = await execution.wait()
    assert (exit.stop_cause, exit.started_at) == (StopCause.KEEPER_DIED, None)
    assert execution.output.stdout.read_text() == ""


async def test_keeper_and_zygote_killed_ends_what_carries_the_leases_mark(runtime: ProcessRuntime, fifo: Fifo) -> None:
    script = f"trap '' TERM; setsid /bin/sh -c 'echo $$ > {fifo.path}; exec sleep 1000' & wait"
    execution = await runtime.prepare(shell(1, script))
    await execution.begin()
    child = int(await fifo.line())
    keeper = int(execution.handle.data["keeper_pid"])
    zygote = runtime.zygote_pid
    assert zygote is not None
    os.kill(zygote, signal.SIGKILL)
    await gone(zygote)
    os.kill(keeper, signal.SIGKILL)
    exit = await execution.wait()
    assert exit.stop_cause is StopCause.KEEPER_DIED
    assert not lives(child)
