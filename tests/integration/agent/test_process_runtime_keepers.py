"""Keepers that guard one lease after another: what they leave behind, and when they do not."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from datetime import timedelta
from pathlib import Path

from lessor_agent.boottime import boottime_ns
from lessor_agent.keeper.kernel import IDLE_TITLE, parse_keeper_title, read_title
from lessor_agent.runtimes.base import Execution, RuntimeContext, StopCause
from lessor_agent.runtimes.process import ProcessRuntime, find_keepers, kill_keeper
from tests.support.process_runtime import (
    ENV_ALLOW,
    Fifo,
    gone,
    idle,
    keeper_of,
    lives,
    open_runtime,
    python,
    run,
    shell,
    start_request,
)


async def let_go(execution: Execution) -> None:
    """Returns once the keeper has let go of the lease, and its files are removed."""
    await execution.forget()


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


async def test_one_keeper_guards_one_lease_after_another(runtime: ProcessRuntime, tmp_path: Path) -> None:
    keepers, files = set(), set()
    for lease_id in range(1, 6):
        execution, exit = await run(runtime, shell(lease_id, f"echo {lease_id}; exit {lease_id}"))
        assert (exit.exit_code, exit.stop_cause) == (lease_id, None)
        assert execution.output.stdout.read_text() == f"{lease_id}\n"
        keepers.add(keeper_of(execution))
        await let_go(execution)
        await idle(keeper_of(execution))
        files.add(open_files(keeper_of(execution)))
    assert len(keepers) == 1
    # Nothing of a lease stays open.
    assert len(files) == 1
    assert os.listdir(tmp_path / "state" / "leases") == []


async def test_an_idle_keeper_is_no_keeper_of_any_lease_and_no_stray(runtime: ProcessRuntime, tmp_path: Path) -> None:
    execution, _ = await run(runtime, shell(1, ":"))
    await let_go(execution)
    await idle(keeper_of(execution))
    assert parse_keeper_title(IDLE_TITLE) is None
    assert read_title(keeper_of(execution)) is None
    assert find_keepers(tmp_path / "state") == {}
    assert await runtime.strays() == []


async def test_leases_at_once_have_a_keeper_each(runtime: ProcessRuntime, fifo: Fifo) -> None:
    waits = f"read line < {fifo.path}"
    executions = [await runtime.prepare(shell(lease_id, waits)) for lease_id in (1, 2, 3)]
    assert len({keeper_of(execution) for execution in executions}) == 3
    for execution in executions:
        await execution.begin()
        await execution.stop(StopCause.CANCELLED, timedelta(0))
        assert (await execution.wait()).stop_cause is StopCause.CANCELLED


async def test_a_lease_starts_afresh_under_a_keeper_that_has_stopped_another(
    runtime: ProcessRuntime, fifo: Fifo
) -> None:
    first = await runtime.prepare(shell(1, f"echo up > {fifo.path}; exec sleep 1000", run_timeout=timedelta(hours=1)))
    await first.begin()
    await fifo.line()
    await first.stop(StopCause.CANCELLED, timedelta(0))
    assert (await first.wait()).signal == signal.SIGKILL
    await let_go(first)
    await idle(keeper_of(first))
    second, exit = await run(runtime, shell(2, "test -e ../cancel || echo fresh; kill -TERM $$"))
    assert keeper_of(second) == keeper_of(first)
    assert (exit.exit_code, exit.signal, exit.stop_cause) == (None, signal.SIGTERM, None)
    assert second.output.stdout.read_text() == "fresh\n"


async def test_a_start_that_fails_costs_no_other_lease_its_keeper(runtime: ProcessRuntime) -> None:
    first, _ = await run(runtime, shell(1, ":"))
    await let_go(first)
    await idle(keeper_of(first))
    _, exit = await run(runtime, start_request(2, ["/no/such/program"]))
    assert exit.start_error is not None
    assert "no such program" in exit.start_error
    third, exit = await run(runtime, shell(3, "exit 3"))
    assert exit.exit_code == 3
    assert lives(keeper_of(third))


async def test_an_idle_keeper_that_was_killed_is_replaced(runtime: ProcessRuntime) -> None:
    first, _ = await run(runtime, shell(1, ":"))
    await let_go(first)
    await idle(keeper_of(first))
    os.kill(keeper_of(first), signal.SIGKILL)
    await gone(keeper_of(first))
    second, exit = await run(runtime, shell(2, "exit 2"))
    assert exit.exit_code == 2
    assert keeper_of(second) != keeper_of(first)


async def test_idle_keepers_end_with_their_agent(tmp_path: Path) -> None:
    runtime = ProcessRuntime(RuntimeContext(tmp_path / "state", ENV_ALLOW))
    await runtime.open()
    execution, _ = await run(runtime, shell(1, ":"))
    await let_go(execution)
    await idle(keeper_of(execution))
    await runtime.close()
    await gone(keeper_of(execution))


async def test_a_keeper_whose_agent_is_gone_takes_no_other_lease(tmp_path: Path, fifo: Fifo) -> None:
    first = ProcessRuntime(RuntimeContext(tmp_path / "state", ENV_ALLOW))
    await first.open()
    execution = await first.prepare(shell(1, f"read line < {fifo.path}"))
    await execution.begin()
    await first.close()
    async with open_runtime(tmp_path / "state") as second:
        adopted = await second.adopt(execution.handle)
        await adopted.stop(StopCause.CANCELLED, timedelta(0))
        assert (await adopted.wait()).stop_cause is StopCause.CANCELLED
        await let_go(adopted)
        await gone(keeper_of(adopted))


async def test_a_keeper_whose_directory_was_deleted_exits(runtime: ProcessRuntime, tmp_path: Path, fifo: Fifo) -> None:
    execution = await runtime.prepare(shell(1, f"echo up > {fifo.path}; exec sleep 1000"))
    await execution.begin()
    await fifo.line()
    shutil.rmtree(tmp_path / "state" / "leases" / "1")
    await execution.stop(StopCause.CANCELLED, timedelta(0))
    assert (await execution.wait()).stop_cause is StopCause.CANCELLED
    await gone(keeper_of(execution))
    await let_go(execution)


async def test_a_keeper_is_killed_for_its_own_lease_only(runtime: ProcessRuntime, tmp_path: Path, fifo: Fifo) -> None:
    execution = await runtime.prepare(shell(1, f"read line < {fifo.path}; exit 1"))
    await execution.begin()
    await asyncio.to_thread(kill_keeper, tmp_path / "state", 2)
    assert lives(keeper_of(execution))
    await asyncio.to_thread(kill_keeper, tmp_path / "state", 1)
    await gone(keeper_of(execution))
    assert (await execution.wait()).stop_cause is StopCause.KEEPER_DIED


async def test_what_a_keeper_has_to_say_is_in_its_log_and_else_there_is_none(
    runtime: ProcessRuntime, tmp_path: Path, fifo: Fifo
) -> None:
    directory = tmp_path / "state" / "leases" / "1"
    execution = await runtime.prepare(shell(1, f"read line < {fifo.path}"))
    await execution.begin()
    assert not (directory / "keeper.log").exists()
    fd = os.open(directory, os.O_RDONLY)
    try:
        _, writer = await asyncio.open_unix_connection(f"/proc/self/fd/{fd}/control")
    finally:
        os.close(fd)
    writer.write(b'{"op": "dance"}\n')
    await writer.drain()
    await execution.stop(StopCause.CANCELLED, timedelta(0))
    await execution.wait()
    writer.close()
    async with asyncio.timeout(60):
        while not (directory / "keeper.log").exists():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert "an order that is none" in (directory / "keeper.log").read_text()
    await let_go(execution)
    second = await runtime.prepare(shell(2, ":"))
    assert not (tmp_path / "state" / "leases" / "2" / "keeper.log").exists()
    await second.begin()


async def test_a_renewal_reaches_a_keeper_that_guards_its_second_lease(runtime: ProcessRuntime, fifo: Fifo) -> None:
    first, _ = await run(runtime, shell(1, ":"))
    await let_go(first)
    await idle(keeper_of(first))
    second = await runtime.prepare(shell(2, f"echo up > {fifo.path}; exec sleep 1000", deadline_ms=30_000))
    await second.begin()
    await fifo.line()
    second.renew(boottime_ns() + 3_600_000_000_000)
    await second.stop(StopCause.CANCELLED, timedelta(0))
    assert (await second.wait()).stop_cause is StopCause.CANCELLED
    third = await runtime.prepare(shell(3, f"echo up > {fifo.path}; exec sleep 1000", deadline_ms=1_500))
    await third.begin()
    assert (await third.wait()).stop_cause is StopCause.LEASE_LOST


async def test_each_lease_of_a_keeper_starts_as_clean_as_the_first(tmp_path: Path) -> None:
    script = """
import json, os, resource, signal
print(json.dumps([
    sorted(int(n) for n in os.listdir("/proc/self/fd"))[:-1],
    [os.readlink(f"/proc/self/fd/{n}").rsplit("/", 1)[-1] for n in (0, 1, 2)],
    open("/proc/self/fdinfo/0").read().split()[3][-1],
    os.getcwd().rsplit("/", 1)[-1],
    os.umask(0o777),
    os.getpid() == os.getsid(0) == os.getpgid(0),
    resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    [resource.getrlimit(limit) for limit in (resource.RLIMIT_CORE, resource.RLIMIT_CPU, resource.RLIMIT_AS)],
    [line.split()[1] for line in open("/proc/self/status") if line[:6] in ("SigBlk", "SigPnd")],
    sorted(os.environ),
]))
signal.signal(signal.SIGTERM, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
os.setpgid(0, 0) if os.getpid() != os.getsid(0) else os.chdir("/")
if os.fork() == 0:
    os.setsid()
    signal.pause()
"""
    runtime = ProcessRuntime(RuntimeContext(tmp_path / "state", ENV_ALLOW, open_files=256))
    await runtime.open()
    seen, keepers = set(), set()
    for lease_id in (1, 2, 3):
        execution, exit = await run(runtime, python(lease_id, script, grace=timedelta(milliseconds=50)))
        assert exit.exit_code == 0, execution.output.stderr.read_text()
        seen.add(execution.output.stdout.read_text())
        keepers.add(keeper_of(execution))
        await let_go(execution)
        await idle(keeper_of(execution))
        # Nothing of it goes on under a keeper that guards nothing.
        assert Path(f"/proc/{keeper_of(execution)}/task/{keeper_of(execution)}/children").read_text() == ""
    await runtime.close()
    assert len(keepers) == 1
    (first,) = seen
    fds, files, access, directory, umask, leads, open_limit, *_ = json.loads(first)
    assert (fds, files) == ([0, 1, 2], ["null", "stdout", "stderr"])
    assert (access, directory, umask, leads, open_limit) == ("0", "work", 0o022, True, 256)


async def test_a_lease_too_large_to_be_given_has_a_keeper_of_its_own(runtime: ProcessRuntime) -> None:
    first, _ = await run(runtime, shell(1, ":"))
    await let_go(first)
    await idle(keeper_of(first))
    large = {f"V{number}": "x" * 60_000 for number in range(4)}
    second, exit = await run(runtime, shell(2, "exit ${#V3}", env=large))
    assert exit.exit_code == 60_000 % 256
    assert keeper_of(second) != keeper_of(first)


async def test_a_lease_whose_directory_was_deleted_before_it_began_runs_where_it_was(
    runtime: ProcessRuntime, tmp_path: Path, fifo: Fifo
) -> None:
    execution = await runtime.prepare(shell(1, f"echo ran > {fifo.path}; exit 4"))
    shutil.rmtree(tmp_path / "state" / "leases" / "1")
    await execution.begin()
    assert await fifo.line() == "ran"
    assert (await execution.wait()).exit_code == 4
    await gone(keeper_of(execution))


async def test_a_stop_before_the_begin_leaves_the_keeper_for_another(runtime: ProcessRuntime) -> None:
    first = await runtime.prepare(shell(1, "echo ran"))
    await first.stop(StopCause.CANCELLED)
    exit = await first.wait()
    assert (exit.stop_cause, exit.started_at) == (StopCause.CANCELLED, None)
    assert first.output.stdout.read_text() == ""
    await let_go(first)
    await idle(keeper_of(first))
    second, exit = await run(runtime, shell(2, "exit 2"))
    assert (exit.exit_code, keeper_of(second)) == (2, keeper_of(first))


async def test_a_begin_after_the_deadline_runs_nothing(runtime: ProcessRuntime) -> None:
    execution = await runtime.prepare(shell(1, "echo ran", deadline_ms=-1))
    assert not await execution.begin()
    exit = await execution.wait()
    assert (exit.stop_cause, exit.started_at) == (StopCause.LEASE_LOST, None)
    assert execution.output.stdout.read_text() == ""


async def test_a_program_of_the_working_directory_is_found_there(runtime: ProcessRuntime, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "program").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "bin" / "program").chmod(0o755)
    for lease_id, request in enumerate(
        (
            start_request(1, ["./bin/program"], working_dir=tmp_path),
            start_request(2, ["program"], working_dir=tmp_path, env={"PATH": "/no/such:bin"}),
            start_request(3, ["program"], env={"PATH": f"{tmp_path}:{tmp_path}/bin"}),
        ),
        1,
    ):
        execution, exit = await run(runtime, request)
        assert (exit.exit_code, exit.start_error) == (9, None), lease_id
        await let_go(execution)
