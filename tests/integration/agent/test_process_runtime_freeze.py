"""The process runtime: jobs that stand still when their lease is lost, in each of the ways to freeze; or run on."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from lessor_agent.boottime import boottime_ns
from lessor_agent.keeper.groups import make_group
from lessor_agent.keeper.tree import STOPPED, offspring
from lessor_agent.runtimes.base import Execution, OnLost, StopCause
from lessor_agent.runtimes.process import ProcessRuntime
from tests.support.cluster import until
from tests.support.freezing import (
    FAMILY,
    LATER_NS,
    LISTENING,
    LONG_NS,
    TICKING,
    WAYS,
    Freeze,
    Lose,
    assert_still,
    begun,
    expire,
    main_process,
    of,
    passed,
    state_of,
    ticked,
    times,
    words_of,
)
from tests.support.process_runtime import Break, Fifo, idle, keeper_of, lives, open_runtime, shell

# Each process ticks once, forks the next, and ends.
FORKING = f"""{TICKING}
fd = os.open(directory + "/main", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
for _ in range(3):
    if os.fork() == 0:
        while True:
            os.write(fd, b"%d\\n" % now())
            if os.fork():
                os._exit(0)
            os.setsid()
signal.pause()
"""

# Its first thread has exited; another ticks.
HEADLESS = f"""{TICKING}
import ctypes, threading
threading.Thread(target=tick, args=[directory + "/main"]).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def can_make_group(version: int) -> bool:
    group = make_group(0, (version,))
    if group is not None:
        group.remove()
    return group is not None


@pytest.fixture(params=WAYS)
async def freezing(request: pytest.FixtureRequest, tmp_path: Path, breaks: Break) -> AsyncIterator[ProcessRuntime]:
    """A runtime whose keepers freeze in one way."""
    version = {"v2": 2, "v1": 1}.get(request.param)
    if version is not None and not can_make_group(version):
        pytest.skip(f"no control group of version {version} can be made here")
    breaks(WAYS[request.param])
    async with open_runtime(tmp_path / "state") as opened:
        yield opened


async def test_a_tree_stands_still_by_its_deadline_and_goes_on_when_renewed(
    freezing: ProcessRuntime, ticks: Path, lose: Lose, caplog: pytest.LogCaptureFixture
) -> None:
    family = ("main", "child", "grandchild", "busy")
    execution = await begun(freezing, of(FAMILY, ticks), ticks, *family)
    for _ in range(2):
        freeze = await lose(execution)
        await passed(freeze.since_ns + LATER_NS)
        renewed_ns = boottime_ns()
        assert_still(ticks, freeze, renewed_ns)
        execution.renew(renewed_ns + LONG_NS)
        for name in family:
            await ticked(ticks / name, renewed_ns)
    assert not execution.ended
    await until(lambda: words_of(caplog.records) == ["frozen", "thawed"] * 2)
    await execution.stop(StopCause.CANCELLED, timedelta(seconds=5))
    exit = await execution.wait()
    assert (exit.signal, exit.stop_cause) == (signal.SIGTERM, StopCause.CANCELLED)


async def test_a_workload_that_forks_without_end_stands_still(
    freezing: ProcessRuntime, ticks: Path, lose: Lose
) -> None:
    execution = await begun(freezing, of(FORKING, ticks), ticks)
    freeze = await lose(execution)
    await passed(freeze.since_ns + LATER_NS)
    renewed_ns = boottime_ns()
    execution.renew(renewed_ns + LONG_NS)
    await ticked(ticks / "main", renewed_ns)
    assert_still(ticks, freeze, renewed_ns)
    await execution.stop(StopCause.CANCELLED, timedelta(0))
    assert (await execution.wait()).stop_cause is StopCause.CANCELLED


@pytest.mark.parametrize("cause", [StopCause.STALE, StopCause.CANCELLED, StopCause.AGENT_STOPPED])
async def test_what_is_asked_to_stop_while_frozen_is_killed_as_it_stands(
    freezing: ProcessRuntime, ticks: Path, lose: Lose, cause: StopCause
) -> None:
    execution = await begun(freezing, of(LISTENING, ticks), ticks)
    freeze = await lose(execution)
    await passed(freeze.deadline_ns)
    await execution.stop(cause, timedelta(seconds=30))
    exit = await execution.wait()
    assert (exit.exit_code, exit.signal, exit.stop_cause) == (None, signal.SIGKILL, cause)
    assert_still(ticks, freeze)
    assert not (ticks / "heard").exists()


async def test_a_keeper_killed_while_frozen_ends_the_whole_tree(
    freezing: ProcessRuntime, ticks: Path, lose: Lose
) -> None:
    execution = await begun(freezing, of(FAMILY, ticks), ticks, "main", "child", "grandchild", "busy")
    freeze = await lose(execution)
    os.kill(keeper_of(execution), signal.SIGKILL)
    assert (await execution.wait()).stop_cause is StopCause.KEEPER_DIED
    assert_still(ticks, freeze)
    await until(lambda: not abandoned_groups(keeper_of(execution)))


@pytest.mark.parametrize("script", [FAMILY, HEADLESS], ids=["family", "headless"])
async def test_keeper_and_zygote_killed_while_frozen_the_agent_ends_what_it_finds(
    freezing: ProcessRuntime, ticks: Path, lose: Lose, script: str
) -> None:
    execution = await begun(freezing, of(script, ticks), ticks)
    freeze = await lose(execution)
    tree = list(offspring(keeper_of(execution)))
    assert freezing.zygote_pid is not None
    os.kill(freezing.zygote_pid, signal.SIGKILL)
    os.kill(keeper_of(execution), signal.SIGKILL)
    assert (await execution.wait()).stop_cause is StopCause.KEEPER_DIED
    assert not any(lives(process.pid) for process in tree)
    assert_still(ticks, freeze)


def abandoned_groups(keeper: int) -> list[str]:
    found = []
    for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/freezer"):
        found += [path for path, _, _ in os.walk(root) if path.endswith(f"/lessor-1-{keeper}")]
    return found


async def test_nothing_is_left_of_a_group_when_the_lease_is_over(
    freezing: ProcessRuntime, ticks: Path, lose: Lose
) -> None:
    execution = await begun(freezing, of(FAMILY, ticks), ticks)
    await lose(execution)
    for path in abandoned_groups(keeper_of(execution)):
        # As a workload may that manages groups itself.
        os.makedirs(f"{path}/own/inner", exist_ok=True)
    await execution.stop(StopCause.STALE)
    await execution.wait()
    assert abandoned_groups(keeper_of(execution)) == []


async def test_a_renewal_and_a_cancel_at_once_stop_in_good_order(
    freezing: ProcessRuntime, ticks: Path, lose: Lose
) -> None:
    execution = await begun(freezing, of(LISTENING, ticks), ticks)
    await lose(execution)
    execution.renew(boottime_ns() + LONG_NS)
    await execution.stop(StopCause.CANCELLED)
    exit = await execution.wait()
    assert (exit.exit_code, exit.stop_cause) == (0, StopCause.CANCELLED)
    assert (ticks / "heard").exists()


async def test_the_run_timeout_of_a_frozen_job_kills_it_as_it_stands(
    runtime: ProcessRuntime, ticks: Path, lose: Lose
) -> None:
    request = of(LISTENING, ticks, run_timeout=timedelta(seconds=5))
    execution = await begun(runtime, request, ticks)
    freeze = await lose(execution)
    exit = await execution.wait()
    assert (exit.signal, exit.stop_cause) == (signal.SIGKILL, StopCause.RUN_TIMEOUT)
    assert_still(ticks, freeze)


# -- a workload whose first thread has exited ---------------------------------------------


async def test_a_tree_without_its_first_thread_stands_still_and_goes_on(
    freezing: ProcessRuntime, ticks: Path, lose: Lose
) -> None:
    execution = await headless(freezing, ticks)
    freeze = await lose(execution)
    await passed(freeze.since_ns + LATER_NS)
    renewed_ns = boottime_ns()
    assert_still(ticks, freeze, renewed_ns)
    execution.renew(renewed_ns + LONG_NS)
    await ticked(ticks / "main", renewed_ns)
    await execution.stop(StopCause.CANCELLED)
    exit = await execution.wait()
    assert (exit.signal, exit.stop_cause) == (signal.SIGTERM, StopCause.CANCELLED)


async def test_a_tree_without_its_first_thread_is_killed_as_it_stands(
    freezing: ProcessRuntime, ticks: Path, lose: Lose
) -> None:
    execution = await headless(freezing, ticks)
    freeze = await lose(execution)
    await execution.stop(StopCause.STALE)
    exit = await execution.wait()
    assert (exit.signal, exit.stop_cause) == (signal.SIGKILL, StopCause.STALE)
    assert_still(ticks, freeze)


async def headless(runtime: ProcessRuntime, ticks: Path) -> Execution:
    execution = await begun(runtime, of(HEADLESS, ticks), ticks)
    await until(lambda: main_thread_state(main_process(execution)) == "Z")
    return execution


def main_thread_state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


async def test_what_the_workload_has_stopped_itself_stays_stopped(
    freezing: ProcessRuntime, fifo: Fifo, lose: Lose
) -> None:
    script = f"sleep 1000 & kill -STOP $!; echo $! > {fifo.path}; while :; do read _ < {fifo.path}x; done"
    os.mkfifo(f"{fifo.path}x")
    execution = await freezing.prepare(shell(1, script, on_lost=OnLost.FREEZE))
    await execution.begin()
    stopped = int(await fifo.line())
    await lose(execution)
    execution.renew(boottime_ns() + LONG_NS)
    main = main_process(execution)
    await until(lambda: state_of(main) == "S")
    assert state_of(stopped) == STOPPED
    await execution.stop(StopCause.CANCELLED, timedelta(0))
    await execution.wait()


@pytest.mark.parametrize("script", [FAMILY, HEADLESS], ids=["family", "headless"])
async def test_what_somebody_else_lets_go_on_is_stopped_again(
    tmp_path: Path, ticks: Path, breaks: Break, lose: Lose, script: str
) -> None:
    breaks(WAYS["signals"])
    async with open_runtime(tmp_path / "state") as runtime:
        execution = await begun(runtime, of(script, ticks), ticks)
        freeze = await lose(execution)
        main = main_process(execution)
        assert state_of(main) == STOPPED

        def ran() -> bool:
            # On a busy host the keeper may stop it again before it is given a processor.
            os.kill(main, signal.SIGCONT)
            return times(ticks / "main")[-1] > freeze.since_ns

        await until(ran)
        # No longer than until the keeper's next look.
        await until(lambda: state_of(main) == STOPPED)
        still_ns = boottime_ns()
        await passed(still_ns + LATER_NS)
        assert_still(ticks, Freeze(still_ns, still_ns))


@pytest.mark.parametrize("on_lost", [OnLost.FREEZE, OnLost.CONTINUE])
async def test_what_has_not_begun_by_the_deadline_never_does(
    runtime: ProcessRuntime, ticks: Path, on_lost: OnLost
) -> None:
    request = of(FAMILY, ticks, deadline_ms=500, on_lost=on_lost)
    execution = await runtime.prepare(request)
    exit = await execution.wait()
    assert (exit.started_at, exit.stop_cause) == (None, StopCause.LEASE_LOST)
    assert not await execution.begin()
    assert list(ticks.iterdir()) == []


async def test_a_grace_longer_than_the_lease_takes_nothing_of_its_time(
    runtime: ProcessRuntime, ticks: Path, lose: Lose
) -> None:
    execution = await begun(runtime, of(LISTENING, ticks, grace=timedelta(minutes=5)), ticks)
    freeze = await lose(execution)
    await passed(freeze.deadline_ns)
    assert not execution.ended
    assert not (ticks / "heard").exists()


@pytest.mark.parametrize("on_lost", [OnLost.FREEZE, OnLost.STOP])
async def test_a_record_that_nobody_can_renew_ends_the_job(
    runtime: ProcessRuntime, ticks: Path, on_lost: OnLost
) -> None:
    execution = await begun(runtime, of(LISTENING, ticks, on_lost=on_lost), ticks)
    garble(execution)
    exit = await execution.wait()
    assert (exit.signal, exit.stop_cause) == (signal.SIGKILL, StopCause.LEASE_LOST)


def garble(execution: Execution) -> None:
    with (execution.output.stdout.parent / "record").open("r+b") as record:
        record.write(b"GARBLED!")


async def test_a_job_that_is_to_continue_does_and_can_still_be_stopped(runtime: ProcessRuntime, ticks: Path) -> None:
    execution = await begun(runtime, of(LISTENING, ticks, on_lost=OnLost.CONTINUE), ticks)
    deadline_ns = expire(execution)
    await ticked(ticks / "main", deadline_ns + LATER_NS)
    garble(execution)
    await ticked(ticks / "main", boottime_ns() + 2 * LATER_NS)
    await execution.stop(StopCause.STALE)
    exit = await execution.wait()
    assert (exit.exit_code, exit.stop_cause) == (0, StopCause.STALE)


async def test_the_run_timeout_of_a_job_that_continues_counts(runtime: ProcessRuntime, ticks: Path) -> None:
    request = of(LISTENING, ticks, on_lost=OnLost.CONTINUE, run_timeout=timedelta(seconds=4))
    execution = await begun(runtime, request, ticks)
    expire(execution)
    exit = await execution.wait()
    assert (exit.exit_code, exit.stop_cause) == (0, StopCause.RUN_TIMEOUT)


async def test_a_main_process_killed_by_others_while_frozen_lets_nothing_of_the_rest_run(
    freezing: ProcessRuntime, ticks: Path, lose: Lose
) -> None:
    execution = await begun(freezing, of(FAMILY, ticks), ticks, "main", "child", "grandchild", "busy")
    freeze = await lose(execution)
    os.kill(main_process(execution), signal.SIGKILL)
    if not await ends_within(execution, 1.0):
        # In a group of version 1 nothing dies before it is thawed.
        assert_still(ticks, freeze)
        execution.renew(boottime_ns() + LONG_NS)
    exit = await execution.wait()
    assert (exit.signal, exit.stop_cause) == (signal.SIGKILL, None)


async def ends_within(execution: Execution, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await execution.wait()
    except TimeoutError:
        return False
    return True


async def test_a_keeper_guards_another_lease_after_a_freeze(freezing: ProcessRuntime, ticks: Path, lose: Lose) -> None:
    keepers = set()
    for lease_id in (1, 2):
        execution = await begun(freezing, of(LISTENING, ticks, lease_id), ticks)
        await lose(execution)
        renewed_ns = boottime_ns()
        execution.renew(renewed_ns + LONG_NS)
        await ticked(ticks / "main", renewed_ns)
        await execution.stop(StopCause.CANCELLED)
        assert (await execution.wait()).exit_code == 0
        await execution.forget()
        keepers.add(keeper_of(execution))
        await idle(keeper_of(execution))
    assert len(keepers) == 1
