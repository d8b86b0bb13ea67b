"""The process runtime: what becomes of executions when the agent dies, and how the next one finds them."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from lessor_agent.boottime import NS_PER_MS, boot_id, boottime_ns
from lessor_agent.keeper.directory import LeaseDirectory
from lessor_agent.keeper.tree import read_process
from lessor_agent.runtimes.base import ExecutionVanished, Handle, RuntimeContext, StopCause
from lessor_agent.runtimes.process import ProcessRuntime, find_keepers
from tests.support import process_runtime
from tests.support.process_runtime import ENV_ALLOW, Fifo, gone, lives, open_runtime, shell

WAITS = "trap '' HUP; echo $$ > {fifo}; read answer < {answer}; echo $answer; exit 5"
FOR_EVER = "echo $$ > {fifo}; exec sleep 1000"


@pytest.fixture
def answer(tmp_path: Path) -> Iterator[Fifo]:
    made = Fifo(tmp_path / "answer")
    yield made
    made.close()


def stored_deadline_ns(state_dir: Path) -> int:
    """Returns the deadline in the record of lease 1."""
    directory = LeaseDirectory(str(state_dir / "leases" / "1"), 1)
    record = directory.map_record(boot_id())
    try:
        return record.deadline_ns()
    finally:
        record.close()
        directory.close()


class Agents:
    """Agent processes that start one job each, to be killed."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.processes: list[asyncio.subprocess.Process] = []

    async def start(self, lease_id: int, script: str, *, deadline_ms: int = 60_000, grace_ms: int = 10_000) -> int:
        """Starts an agent and its job; returns the keeper's pid."""
        agent = await asyncio.create_subprocess_exec(
            sys.executable, "-m", process_runtime.__name__, str(self.state_dir),
            str(lease_id), str(deadline_ms), str(grace_ms), script,
            stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[3],
        )  # fmt: skip
        self.processes.append(agent)
        assert agent.stdout is not None
        return int(await agent.stdout.readline())

    async def kill(self) -> None:
        """Kills the agents, and nothing else."""
        for process in self.processes:
            if process.returncode is None:
                process.kill()
            await process.wait()
        self.processes.clear()


@pytest.fixture
async def agents(tmp_path: Path) -> AsyncIterator[Agents]:
    made = Agents(tmp_path / "state")
    yield made
    await made.kill()
    async with open_runtime(made.state_dir):
        # Leaving it ends whatever a test left.
        pass


async def test_agent_killed_and_its_job_is_ended_by_the_deadline(agents: Agents, fifo: Fifo) -> None:
    started_ns = boottime_ns()
    keeper = await agents.start(1, FOR_EVER.format(fifo=fifo.path), deadline_ms=2500, grace_ms=1000)
    main = int(await fifo.line())
    await agents.kill()
    await gone(main)
    ended_ns = boottime_ns()
    await gone(keeper)
    # The agent's own start precedes the deadline's: a generous bound from outside, an exact one from the file.
    directory = LeaseDirectory(str(agents.state_dir / "leases" / "1"), 1)
    outcome = directory.read_outcome()
    directory.close()
    assert started_ns + 2500 * NS_PER_MS < stored_deadline_ns(agents.state_dir)
    assert ended_ns < stored_deadline_ns(agents.state_dir)
    assert outcome is not None
    assert outcome.stop_cause == StopCause.LEASE_LOST
    assert outcome.signal == signal.SIGTERM


async def test_running_execution_is_adopted(agents: Agents, fifo: Fifo, answer: Fifo) -> None:
    keeper = await agents.start(1, WAITS.format(fifo=fifo.path, answer=answer.path))
    await fifo.line()
    await agents.kill()
    async with open_runtime(agents.state_dir) as runtime:
        [handle] = await runtime.strays()
        execution = await runtime.adopt(handle)
        assert execution.handle.data["keeper_pid"] == keeper
        assert await runtime.adopt(execution.handle) is execution
        await execution.begin()
        answer.path.write_text("hello\n")
        exit = await execution.wait()
        assert (exit.exit_code, exit.stop_cause) == (5, None)
        assert execution.output.stdout.read_text() == "hello\n"
        await execution.forget()
        assert await runtime.strays() == []


async def test_adopted_execution_is_renewed(agents: Agents, fifo: Fifo) -> None:
    await agents.start(1, FOR_EVER.format(fifo=fifo.path), deadline_ms=2000, grace_ms=100)
    await fifo.line()
    await agents.kill()
    deadline_ns = stored_deadline_ns(agents.state_dir)
    async with open_runtime(agents.state_dir) as runtime:
        execution = await runtime.adopt(Handle("process", 1, {"lease_id": 1}))
        execution.renew(deadline_ns + 1000 * NS_PER_MS)
        exit = await execution.wait()
        assert deadline_ns < boottime_ns() < deadline_ns + 1000 * NS_PER_MS
        assert (exit.signal, exit.stop_cause) == (signal.SIGTERM, StopCause.LEASE_LOST)


async def test_adopted_execution_is_stopped(agents: Agents, fifo: Fifo) -> None:
    await agents.start(1, FOR_EVER.format(fifo=fifo.path))
    await fifo.line()
    await agents.kill()
    async with open_runtime(agents.state_dir) as runtime:
        execution = await runtime.adopt(Handle("process", 1, {"lease_id": 1}))
        await execution.stop(StopCause.STALE)
        exit = await execution.wait()
        assert (exit.signal, exit.stop_cause) == (signal.SIGTERM, StopCause.STALE)


async def test_execution_that_ended_meanwhile_is_adopted(agents: Agents, fifo: Fifo, answer: Fifo) -> None:
    keeper = await agents.start(1, WAITS.format(fifo=fifo.path, answer=answer.path))
    await fifo.line()
    await agents.kill()
    answer.path.write_text("bye\n")
    await gone(keeper)
    async with open_runtime(agents.state_dir) as runtime:
        execution = await runtime.adopt(Handle("process", 1, {"lease_id": 1}))
        exit = await execution.wait()
        assert (exit.exit_code, exit.stop_cause) == (5, None)
        assert exit.started_at is not None
        assert execution.output.stdout.read_text() == "bye\n"
        # All of these change nothing any more.
        await execution.begin()
        await execution.stop(StopCause.CANCELLED)
        execution.renew(boottime_ns())
        assert await execution.wait() == exit
        # Not even a new start of the same lease.
        assert await runtime.prepare(shell(1, "echo again")) is execution


async def test_vanished_execution_is_ended_and_told(agents: Agents, fifo: Fifo) -> None:
    script = f"trap '' TERM; setsid /bin/sh -c 'echo $$ > {fifo.path}; exec sleep 1000' & wait"
    keeper = await agents.start(1, script)
    child = int(await fifo.line())
    guarding = read_process(keeper)
    assert guarding is not None
    await agents.kill()
    # The zygote stays for exactly this, and would end it.
    os.kill(guarding.parent, signal.SIGKILL)
    await gone(guarding.parent)
    os.kill(keeper, signal.SIGKILL)
    await gone(keeper)
    assert lives(child)
    async with open_runtime(agents.state_dir) as runtime:
        [handle] = await runtime.strays()
        with pytest.raises(ExecutionVanished, match="no keeper and no outcome"):
            await runtime.adopt(handle)
        assert not lives(child)
        assert await runtime.strays() == []


async def test_lease_whose_keeper_was_killed_is_not_started_again(agents: Agents, fifo: Fifo) -> None:
    keeper = await agents.start(1, FOR_EVER.format(fifo=fifo.path))
    await fifo.line()
    await agents.kill()
    os.kill(keeper, signal.SIGKILL)
    await gone(keeper)
    async with open_runtime(agents.state_dir) as runtime:
        execution = await runtime.prepare(shell(1, "echo again"))
        await execution.begin()
        exit = await execution.wait()
        assert exit.stop_cause is StopCause.KEEPER_DIED
        assert exit.started_at is not None
        assert execution.output.stdout.read_text() == ""


async def test_unknown_lease_and_foreign_handle_have_vanished(tmp_path: Path) -> None:
    async with open_runtime(tmp_path / "state") as runtime:
        for handle in (
            Handle("process", 1, {"lease_id": 9}),
            Handle("docker", 1, {"lease_id": 9}),
            Handle("process", 99, {"lease_id": 9}),
        ):
            with pytest.raises(ExecutionVanished):
                await runtime.adopt(handle)


@pytest.mark.parametrize("meet", ["adopt", "prepare"])
async def test_state_directory_deleted_while_running(
    agents: Agents, fifo: Fifo, answer: Fifo, tmp_path: Path, meet: str
) -> None:
    """The next agent finds the keeper in /proc, and no second copy is started beside it."""
    keeper = await agents.start(1, WAITS.format(fifo=fifo.path, answer=answer.path), deadline_ms=2000, grace_ms=100)
    await fifo.line()
    await agents.kill()
    deadline_ns = stored_deadline_ns(agents.state_dir)
    shutil.rmtree(agents.state_dir)
    async with open_runtime(agents.state_dir) as runtime:
        assert [handle.data["lease_id"] for handle in await runtime.strays()] == [1]
        if meet == "adopt":
            execution = await runtime.adopt(Handle("process", 1, {"lease_id": 1}))
        else:
            execution = await runtime.prepare(shell(1, "echo second copy"))
        assert execution.handle.data["keeper_pid"] == keeper
        await execution.begin()
        if meet == "adopt":
            # The record is reached through the keeper, so it can still be kept.
            execution.renew(deadline_ns + 1000 * NS_PER_MS)
            exit = await execution.wait()
            assert deadline_ns < boottime_ns() < deadline_ns + 1000 * NS_PER_MS
            assert (exit.signal, exit.stop_cause) == (signal.SIGTERM, StopCause.LEASE_LOST)
        else:
            await execution.stop(StopCause.STALE)
            exit = await execution.wait()
            assert (exit.signal, exit.stop_cause) == (signal.SIGTERM, StopCause.STALE)
        await execution.forget()
        assert await runtime.strays() == []
    assert find_keepers(tmp_path / "state") == {}


async def test_state_directory_deleted_under_a_living_agent(tmp_path: Path, fifo: Fifo, answer: Fifo) -> None:
    async with open_runtime(tmp_path / "state") as runtime:
        execution = await runtime.prepare(shell(1, WAITS.format(fifo=fifo.path, answer=answer.path)))
        await execution.begin()
        await fifo.line()
        shutil.rmtree(tmp_path / "state")
        assert await runtime.prepare(shell(1, "echo second copy")) is execution
        answer.path.write_text("bye\n")
        exit = await execution.wait()
        assert (exit.exit_code, exit.stop_cause) == (5, None)


async def test_keeper_of_another_state_directory_is_no_stray(tmp_path: Path, fifo: Fifo) -> None:
    async with open_runtime(tmp_path / "one") as one, open_runtime(tmp_path / "two") as two:
        execution = await one.prepare(shell(1, FOR_EVER.format(fifo=fifo.path)))
        await execution.begin()
        await fifo.line()
        assert await two.strays() == []
        with pytest.raises(ExecutionVanished):
            await two.adopt(execution.handle)
        assert lives(int(execution.handle.data["keeper_pid"]))
        await execution.stop(StopCause.CANCELLED, timedelta(0))
        await execution.wait()


async def test_closing_cancels_waits_and_leaves_jobs(tmp_path: Path, fifo: Fifo, answer: Fifo) -> None:
    first = ProcessRuntime(RuntimeContext(tmp_path / "state", ENV_ALLOW))
    await first.open()
    execution = await first.prepare(shell(1, WAITS.format(fifo=fifo.path, answer=answer.path)))
    await execution.begin()
    await fifo.line()
    waiting = asyncio.create_task(execution.wait())
    await asyncio.sleep(0)
    await first.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    async with open_runtime(tmp_path / "state") as second:
        adopted = await second.adopt(execution.handle)
        answer.path.write_text("bye\n")
        assert (await adopted.wait()).exit_code == 5
