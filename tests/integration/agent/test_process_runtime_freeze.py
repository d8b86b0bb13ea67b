"""The process runtime: jobs that stand still when their lease is lost, in each of the ways to freeze; or run on."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from lessor_agent.boottime import NS_PER_MS, boottime_ns
from lessor_agent.keeper.groups import make_group
from lessor_agent.keeper.tree import read_process
from lessor_agent.runtimes.base import Execution, OnLost, StartRequest, StopCause
from lessor_agent.runtimes.process import ProcessRuntime
from tests.support.cluster import until
from tests.support.process_runtime import Break, Fifo, keeper_of, lives, open_runtime, python, shell

TTL_MS = 1500
LATER_NS = 300 * NS_PER_MS

# `tick(path)` appends the time to a file for ever, so that it tells when it ran; `fork_off` starts such a process in a
# session of its own whose parent is gone.
_TICKING = """
import os, signal, sys, time
def now():
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
def tick(path, computes=False):
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while True:
        os.write(fd, b"%d\\n" % now())
        next_ns = now() + 2_000_000
        while computes and now() < next_ns:
            pass
        time.sleep(0 if computes else 0.002)
def fork_off(path):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            tick(path)
        os._exit(0)
    os.wait()
directory = sys.argv[1]
"""

# The main process, a child, a grandchild of another session, and one that computes without a pause.
FAMILY = f"""{_TICKING}
fork_off(directory + "/grandchild")
if os.fork() == 0:
    tick(directory + "/child")
if os.fork() == 0:
    tick(directory + "/busy", computes=True)
tick(directory + "/main")
"""

# Each process ticks once, forks the next, and ends.
FORKING = f"""{_TICKING}
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

# Deaf to no signal: tells on what it hears.
LISTENING = f"""{_TICKING}
def heard(*_):
    open(directory + "/heard", "w").close()
    os._exit(0)
signal.signal(signal.SIGTERM, heard)
tick(directory + "/main")
"""

WAYS = {
    "v2": "freezer.make_group = lambda lease_id: groups.make_group(lease_id, (2,))",
    "v1": "freezer.make_group = lambda lease_id: groups.make_group(lease_id, (1,))",
    "signals": "freezer.make_group = lambda lease_id: None",
    "unmovable": "groups.Group.add = lambda *_: (_ for _ in ()).throw(PermissionError())",
    "unfreezable": "groups.Group.freeze = lambda *_: (_ for _ in ()).throw(PermissionError())",
}
"""How a keeper is made to freeze in one way only: a kind of control group, or stopping; the last two fail half-way."""


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


@pytest.fixture
def ticks(tmp_path: Path) -> Path:
    """Where jobs write when they ran."""
    path = tmp_path / "ticks"
    path.mkdir()
    return path


def of(script: str, ticks: Path, lease_id: int = 1, *, deadline_ms: int = TTL_MS, **changes: object) -> StartRequest:
    changes.setdefault("on_lost", OnLost.FREEZE)
    return python(lease_id, script, str(ticks), deadline_ms=deadline_ms, **changes)


def times(path: Path) -> list[int]:
    """Returns when the processes that write into ``path`` ran, ascending."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return sorted(int(line) for line in lines)


def assert_still(ticks: Path, from_ns: int, to_ns: int | None = None) -> None:
    """Nothing ran in between."""
    for path in ticks.iterdir():
        ran = [at - from_ns for at in times(path) if at > from_ns and (to_ns is None or at < to_ns)]
        assert not ran, f"{path.name} ran {ran[0] / 1e6} … {ran[-1] / 1e6} ms after its deadline"


async def passed(at_ns: int) -> None:
    """Returns once it is later than ``at_ns``."""
    await until(lambda: boottime_ns() > at_ns)


async def ticked(path: Path, since_ns: int = 0) -> None:
    """Returns once something that writes into ``path`` has run after ``since_ns``."""
    await until(lambda: any(at > since_ns for at in times(path)[-1:]))


async def begun(runtime: ProcessRuntime, request: StartRequest, ticks: Path, *names: str) -> Execution:
    execution = await runtime.prepare(request)
    assert await execution.begin()
    for name in names or ("main",):
        await ticked(ticks / name)
    return execution


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [getattr(record, "event", "") for record in caplog.records if hasattr(record, "lease_id")]


async def test_a_tree_stands_still_by_its_deadline_and_goes_on_when_renewed(
    freezing: ProcessRuntime, ticks: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lessor_agent")
    request = of(FAMILY, ticks)
    family = ("main", "child", "grandchild", "busy")
    execution = await begun(freezing, request, ticks, *family)
    deadline_ns = request.deadline_ns
    for _ in range(2):
        await passed(deadline_ns + LATER_NS)
        renewed_ns = boottime_ns()
        assert_still(ticks, deadline_ns, renewed_ns)
        next_ns = renewed_ns + TTL_MS * NS_PER_MS
        execution.renew(next_ns)
        for name in family:
            await ticked(ticks / name, renewed_ns)
        deadline_ns = next_ns
    assert not execution.ended
    await until(lambda: told(caplog) == ["frozen", "thawed"] * 2)
    execution.renew(boottime_ns() + 60_000 * NS_PER_MS)
    await execution.stop(StopCause.CANCELLED, timedelta(seconds=5))
    exit = await execution.wait()
    assert (exit.signal, exit.stop_cause) == (signal.SIGTERM, StopCause.CANCELLED)


async def test_a_workload_that_forks_without_end_stands_still(freezing: ProcessRuntime, ticks: Path) -> None:
    request = of(FORKING, ticks)
    execution = await begun(freezing, request, ticks)
    await passed(request.deadline_ns + LATER_NS)
    renewed_ns = boottime_ns()
    execution.renew(renewed_ns + 60_000 * NS_PER_MS)
    await ticked(ticks / "main", renewed_ns)
    assert_still(ticks, request.deadline_ns, renewed_ns)
    await execution.stop(StopCause.CANCELLED, timedelta(0))
    assert (await execution.wait()).stop_cause is StopCause.CANCELLED


@pytest.mark.parametrize("cause", [StopCause.STALE, StopCause.CANCELLED, StopCause.AGENT_STOPPED])
async def test_what_is_asked_to_stop_while_frozen_is_killed_as_it_stands(
    freezing: ProcessRuntime, ticks: Path, cause: StopCause
) -> None:
    request = of(LISTENING, ticks)
    execution = await begun(freezing, request, ticks)
    await passed(request.deadline_ns + LATER_NS)
    await execution.stop(cause, timedelta(seconds=30))
    exit = await execution.wait()
    assert (exit.exit_code, exit.signal, exit.stop_cause) == (None, signal.SIGKILL, cause)
    assert_still(ticks, request.deadline_ns)
    assert not (ticks / "heard").exists()


async def test_a_keeper_killed_while_frozen_ends_the_whole_tree(freezing: ProcessRuntime, ticks: Path) -> None:
    request = of(FAMILY, ticks)
    execution = await begun(freezing, request, ticks, "main", "child", "grandchild", "busy")
    await passed(request.deadline_ns + LATER_NS)
    os.kill(keeper_of(execution), signal.SIGKILL)
    assert (await execution.wait()).stop_cause is StopCause.KEEPER_DIED
    assert_still(ticks, request.deadline_ns)
    await until(lambda: not abandoned_groups(keeper_of(execution)))


async def test_keeper_and_zygote_killed_while_frozen_the_agent_ends_what_it_finds(
    freezing: ProcessRuntime, ticks: Path
) -> None:
    request = of(FAMILY, ticks)
    execution = await begun(freezing, request, ticks, "main", "child", "grandchild", "busy")
    await passed(request.deadline_ns + LATER_NS)
    assert freezing.zygote_pid is not None
    os.kill(freezing.zygote_pid, signal.SIGKILL)
    os.kill(keeper_of(execution), signal.SIGKILL)
    assert (await execution.wait()).stop_cause is StopCause.KEEPER_DIED
    assert_still(ticks, request.deadline_ns)


def abandoned_groups(keeper: int) -> list[str]:
    found = []
    for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/freezer"):
        found += [path for path, _, _ in os.walk(root) if path.endswith(f"/lessor-1-{keeper}")]
    return found


async def test_nothing_is_left_of_a_group_when_the_lease_is_over(freezing: ProcessRuntime, ticks: Path) -> None:
    request = of(FAMILY, ticks)
    execution = await begun(freezing, request, ticks)
    await passed(request.deadline_ns + LATER_NS)
    await execution.stop(StopCause.STALE)
    await execution.wait()
    assert abandoned_groups(keeper_of(execution)) == []


async def test_a_renewal_and_a_cancel_at_once_stop_in_good_order(freezing: ProcessRuntime, ticks: Path) -> None:
    request = of(LISTENING, ticks)
    execution = await begun(freezing, request, ticks)
    await passed(request.deadline_ns + LATER_NS)
    execution.renew(boottime_ns() + 60_000 * NS_PER_MS)
    await execution.stop(StopCause.CANCELLED)
    exit = await execution.wait()
    assert (exit.exit_code, exit.stop_cause) == (0, StopCause.CANCELLED)
    assert (ticks / "heard").exists()


async def test_the_run_timeout_of_a_frozen_job_kills_it_as_it_stands(runtime: ProcessRuntime, ticks: Path) -> None:
    request = of(LISTENING, ticks, run_timeout=timedelta(milliseconds=TTL_MS + 500))
    execution = await begun(runtime, request, ticks)
    exit = await execution.wait()
    assert (exit.signal, exit.stop_cause) == (signal.SIGKILL, StopCause.RUN_TIMEOUT)
    assert_still(ticks, request.deadline_ns)


async def test_what_the_workload_has_stopped_itself_stays_stopped(freezing: ProcessRuntime, fifo: Fifo) -> None:
    script = f"sleep 1000 & kill -STOP $!; echo $! > {fifo.path}; while :; do read _ < {fifo.path}x; done"
    os.mkfifo(f"{fifo.path}x")
    request = shell(1, script, deadline_ms=TTL_MS, on_lost=OnLost.FREEZE)
    execution = await freezing.prepare(request)
    await execution.begin()
    stopped = int(await fifo.line())
    await passed(request.deadline_ns + LATER_NS)
    execution.renew(boottime_ns() + 60_000 * NS_PER_MS)
    main = main_process(execution)
    await until(lambda: state_of(main) == "S")
    assert state_of(stopped) == "T"
    await execution.stop(StopCause.CANCELLED, timedelta(0))
    await execution.wait()


def main_process(execution: Execution) -> int:
    with open(f"/proc/{keeper_of(execution)}/task/{keeper_of(execution)}/children") as file:
        return int(file.read().split()[0])


def state_of(pid: int) -> str:
    process = read_process(pid)
    assert process is not None
    return process.state


async def test_what_somebody_else_lets_go_on_is_stopped_again(tmp_path: Path, ticks: Path, breaks: Break) -> None:
    breaks(WAYS["signals"])
    async with open_runtime(tmp_path / "state") as runtime:
        request = of(FAMILY, ticks)
        execution = await begun(runtime, request, ticks)
        await passed(request.deadline_ns + LATER_NS)
        main = main_process(execution)
        assert state_of(main) == "T"
        os.kill(main, signal.SIGCONT)
        # It ran for no longer than until the keeper's next look.
        await until(lambda: state_of(main) == "T" and times(ticks / "main")[-1] > request.deadline_ns)
        still_ns = boottime_ns()
        await passed(still_ns + LATER_NS)
        assert_still(ticks, still_ns)


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


async def test_a_grace_longer_than_the_lease_takes_nothing_of_its_time(runtime: ProcessRuntime, ticks: Path) -> None:
    request = of(LISTENING, ticks, grace=timedelta(minutes=5))
    execution = await begun(runtime, request, ticks)
    await ticked(ticks / "main", request.deadline_ns - 500 * NS_PER_MS)
    await passed(request.deadline_ns)
    assert not execution.ended
    assert not (ticks / "heard").exists()


async def test_a_record_that_nobody_can_renew_ends_the_job(runtime: ProcessRuntime, ticks: Path) -> None:
    execution = await begun(runtime, of(LISTENING, ticks, deadline_ms=60_000), ticks)
    with (execution.output.stdout.parent / "record").open("r+b") as record:
        record.write(b"GARBLED!")
    exit = await execution.wait()
    assert (exit.signal, exit.stop_cause) == (signal.SIGKILL, StopCause.LEASE_LOST)


async def test_a_job_that_is_to_continue_does_and_can_still_be_stopped(runtime: ProcessRuntime, ticks: Path) -> None:
    request = of(LISTENING, ticks, on_lost=OnLost.CONTINUE)
    execution = await begun(runtime, request, ticks)
    await ticked(ticks / "main", request.deadline_ns + LATER_NS)
    await execution.stop(StopCause.STALE)
    exit = await execution.wait()
    assert (exit.exit_code, exit.stop_cause) == (0, StopCause.STALE)


async def test_the_run_timeout_of_a_job_that_continues_counts(runtime: ProcessRuntime, ticks: Path) -> None:
    timeout = timedelta(milliseconds=TTL_MS + 300)
    execution = await begun(runtime, of(LISTENING, ticks, on_lost=OnLost.CONTINUE, run_timeout=timeout), ticks)
    exit = await execution.wait()
    assert (exit.exit_code, exit.stop_cause) == (0, StopCause.RUN_TIMEOUT)


async def test_a_main_process_killed_by_others_while_frozen_lets_nothing_of_the_rest_run(
    freezing: ProcessRuntime, ticks: Path
) -> None:
    request = of(FAMILY, ticks)
    execution = await begun(freezing, request, ticks, "main", "child", "grandchild", "busy")
    await passed(request.deadline_ns + LATER_NS)
    os.kill(main_process(execution), signal.SIGKILL)
    renewed_ns = boottime_ns() + 60_000 * NS_PER_MS
    if not await ends_within(execution, 1.0):
        # In a group of version 1 nothing dies before it is thawed.
        assert_still(ticks, request.deadline_ns)
        execution.renew(renewed_ns)
    exit = await execution.wait()
    assert (exit.signal, exit.stop_cause) == (signal.SIGKILL, None)


async def ends_within(execution: Execution, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await execution.wait()
    except TimeoutError:
        return False
    return True


async def test_a_keeper_guards_another_lease_after_a_freeze(freezing: ProcessRuntime, ticks: Path) -> None:
    keepers = set()
    for lease_id in (1, 2):
        request = of(LISTENING, ticks, lease_id)
        execution = await begun(freezing, request, ticks)
        await passed(request.deadline_ns + LATER_NS)
        renewed_ns = boottime_ns()
        execution.renew(renewed_ns + 60_000 * NS_PER_MS)
        await ticked(ticks / "main", renewed_ns)
        await execution.stop(StopCause.CANCELLED)
        assert (await execution.wait()).exit_code == 0
        await execution.forget()
        keepers.add(keeper_of(execution))
        assert lives(keeper_of(execution))
    assert len(keepers) == 1
