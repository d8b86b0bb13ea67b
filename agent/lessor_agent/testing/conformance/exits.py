"""How it ended: exit codes, signals, and what could not be run at all."""

from __future__ import annotations

import asyncio
import signal
from datetime import UTC, datetime
from pathlib import Path

from lessor_agent.runtimes.base import StartRequest
from lessor_agent.testing.conformance.checks import Check
from lessor_agent.testing.conformance.holding import holds
from lessor_agent.testing.conformance.stage import Stage, assert_never_ran
from lessor_agent.testing.conformance.subject import Subject


class ExitChecks(Subject):
    """How an execution ended."""

    @holds(Check.EXIT_CODE)
    async def test_exit_code(self, stage: Stage) -> None:
        for code in (0, 7, 255):
            _, exit = await stage.run("leave", str(code))
            assert (exit.exit_code, exit.signal, exit.stop_cause, exit.start_error) == (code, 0, None, None)

    @holds(Check.EXIT_SIGNAL)
    async def test_exit_signal(self, stage: Stage) -> None:
        for number in (signal.SIGUSR1, signal.SIGKILL):
            _, exit = await stage.run("die", str(int(number)))
            assert (exit.exit_code, exit.signal, exit.stop_cause, exit.start_error) == (None, number, None, None)

    @holds(Check.EXIT_TIMES)
    async def test_exit_times(self, stage: Stage) -> None:
        before = datetime.now(UTC)
        _, exit = await stage.run("leave", "0")
        assert exit.started_at is not None
        assert exit.started_at.utcoffset() == exit.ended_at.utcoffset() == UTC.utcoffset(None)
        assert before <= exit.started_at <= exit.ended_at <= datetime.now(UTC)

    @holds(Check.WAIT_AGAIN)
    async def test_wait_again(self, stage: Stage) -> None:
        place = stage.place()
        execution = await stage.stand(place)
        assert not execution.ended
        waits = [asyncio.create_task(stage.end(execution)) for _ in range(3)]
        # One that is given up takes none of the others with it.
        given_up = asyncio.create_task(execution.wait())
        await stage.observe()
        given_up.cancel()
        place.go(9)
        exits = await asyncio.gather(*waits)
        assert [exit.exit_code for exit in exits] == [9, 9, 9]
        assert execution.ended
        assert await stage.end(execution) == exits[0] == exits[1] == exits[2]

    @holds(Check.START_ERROR_MISSING)
    async def test_start_error_missing(self, stage: Stage) -> None:
        request = stage.request(argv=[self.there(stage.shared / "no-such-program")])
        await self.assert_start_error(stage, request)

    @holds(Check.START_ERROR_PERMISSION)
    async def test_start_error_permission(self, stage: Stage) -> None:
        program = stage.shared / "program"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o644)
        await self.assert_start_error(stage, stage.request(argv=[self.there(program)]))

    @holds(Check.START_ERROR_DIRECTORY)
    async def test_start_error_directory(self, stage: Stage) -> None:
        place = stage.place()
        missing = self.there(stage.shared / "no-such-directory")
        await self.assert_start_error(stage, stage.request("begun", place, working_dir=Path(missing)))
        assert place.begun() == 0

    async def assert_start_error(self, stage: Stage, request: StartRequest) -> None:
        """Fails unless the request cannot be run, and that is told as such."""
        execution = await stage.prepare(request)
        assert await stage.within(execution.begin(), "begin") is False
        exit = await stage.end(execution)
        assert exit.start_error, f"no start error: {exit}"
        assert_never_ran(exit, None)
