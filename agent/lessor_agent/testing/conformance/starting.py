"""Starting: nothing before begin, and one execution of a lease whatever is repeated."""

from __future__ import annotations

import asyncio

import pytest

from lessor_agent.runtimes.base import StartRefused
from lessor_agent.testing.conformance.checks import Check
from lessor_agent.testing.conformance.holding import holds
from lessor_agent.testing.conformance.stage import Stage
from lessor_agent.testing.conformance.subject import Subject


class StartChecks(Subject):
    """How executions are started."""

    @holds(Check.PREPARE_RUNS_NOTHING)
    async def test_prepare_runs_nothing(self, stage: Stage) -> None:
        place = stage.place()
        execution = await stage.prepare(stage.request("begun", place))
        await stage.observe()
        assert place.begun() == 0
        assert not execution.ended
        assert await stage.within(execution.begin(), "begin") is True
        assert (await stage.end(execution)).exit_code == 0
        assert place.begun() == 1

    @holds(Check.PREPARE_ONCE)
    async def test_prepare_once(self, stage: Stage) -> None:
        place = stage.place()
        request = stage.request("stand", place, "polite")
        first, second = await asyncio.gather(stage.prepare(request), stage.prepare(request))
        third = await stage.prepare(request)
        assert first.lease_id == second.lease_id == third.lease_id == request.lease_id
        for execution in (first, second, third):
            assert await stage.within(execution.begin(), "begin") is True
        await stage.running(place, first, {"main"})
        assert len(await stage.runtime.strays()) == 1
        await stage.observe()
        place.go(6)
        exits = [await stage.end(execution) for execution in (first, second, third)]
        assert [exit.exit_code for exit in exits] == [6, 6, 6]
        assert place.begun() == 1

    @holds(Check.PREPARE_AGAIN)
    async def test_prepare_again(self, stage: Stage) -> None:
        before, running = stage.place(), stage.place()
        unbegun = stage.request("begun", before)
        await stage.prepare(unbegun)
        begun = stage.request("stand", running, "polite")
        await stage.running(running, await stage.start(begun), {"main"})
        await stage.restart()
        # As after a crash between the start and the note of it: the same starts again, by an agent that knows nothing.
        execution = await stage.start(unbegun)
        assert (await stage.end(execution)).exit_code == 0
        assert before.begun() == 1
        execution = await stage.start(begun)
        await stage.running(running, execution, {"main"})
        running.go(4)
        assert (await stage.end(execution)).exit_code == 4
        await stage.observe()
        assert running.begun() == 1
        assert len(await stage.runtime.strays()) == 2

    @holds(Check.PREPARE_ENDED)
    async def test_prepare_ended(self, stage: Stage) -> None:
        place = stage.place()
        request = stage.request("begun", place)
        first = await stage.start(request)
        exit = await stage.end(first)
        for _ in range(2):
            again = await stage.prepare(request)
            await stage.within(again.begin(), "begin")
            assert await stage.end(again) == exit
            await stage.restart()
        await stage.observe()
        assert place.begun() == 1

    @holds(Check.BEGIN_TWICE)
    async def test_begin_twice(self, stage: Stage) -> None:
        place = stage.place()
        execution = await stage.prepare(stage.request("stand", place, "polite"))
        begins = await asyncio.gather(*(stage.within(execution.begin(), "begin") for _ in range(3)))
        await stage.running(place, execution, {"main"})
        assert [*begins, await stage.within(execution.begin(), "begin")] == [True] * 4
        place.go()
        await stage.end(execution)
        assert await stage.within(execution.begin(), "begin") is True
        await stage.observe()
        assert place.begun() == 1

    @holds(Check.START_REFUSED)
    async def test_start_refused(self, stage: Stage) -> None:
        place = stage.place()
        for request in (stage.request(argv=[]), stage.request("begun", place, "a\0b")):
            with pytest.raises(StartRefused, match=r"\w"):
                await stage.prepare(request)
        assert await stage.runtime.strays() == []
        assert place.begun() == 0

    @holds(Check.MANY_AT_ONCE)
    async def test_many_at_once(self, stage: Stage) -> None:
        requests = [stage.request("say", f"I am {number}", str(number)) for number in range(self.many)]
        executions = await asyncio.gather(*(stage.start(request) for request in requests))
        exits = await asyncio.gather(*(stage.end(execution) for execution in executions))
        assert [exit.exit_code for exit in exits] == list(range(self.many))
        texts = [execution.output.stdout.read_text() for execution in executions]
        assert texts == [f"I am {number}" for number in range(self.many)]
        assert len(await stage.runtime.strays()) == self.many
        await asyncio.gather(*(execution.forget() for execution in executions))
        assert await stage.runtime.strays() == []
