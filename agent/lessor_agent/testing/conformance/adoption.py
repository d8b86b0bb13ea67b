"""Agent restarts: the next agent finds every execution again, and what is left of it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import pytest

from lessor_agent.boottime import boottime_ns
from lessor_agent.runtimes.base import Execution, ExecutionVanished, Handle, StopCause
from lessor_agent.testing.conformance.checks import Check
from lessor_agent.testing.conformance.holding import holds
from lessor_agent.testing.conformance.stage import LONG, Stage, nanoseconds
from lessor_agent.testing.conformance.stopping import FAMILY, SHORT_GRACE
from lessor_agent.testing.conformance.subject import Subject


class AdoptionChecks(Subject):
    """What holds across agents."""

    @holds(Check.HANDLE_JSON)
    async def test_handle_json(self, stage: Stage) -> None:
        place = stage.place()
        execution = await stage.stand(place)
        assert execution.handle.runtime == stage.runtime.name
        read = Handle(**json.loads(json.dumps(asdict(execution.handle))))
        assert read == execution.handle
        runtime = await stage.restart()
        adopted = await stage.within(runtime.adopt(read), "adopt")
        place.go(8)
        assert (await stage.end(adopted)).exit_code == 8

    @holds(Check.ADOPT_RUNNING)
    async def test_adopt_running(self, stage: Stage) -> None:
        place = stage.place()
        execution = await stage.stand(place)
        lease_id, handle = execution.lease_id, execution.handle
        runtime = await stage.restart()
        adopted = await stage.within(runtime.adopt(handle), "adopt")
        assert adopted.lease_id == lease_id
        assert not adopted.ended
        assert await stage.within(adopted.begin(), "begin") is True
        await stage.running(place, adopted, {"main"})
        place.go(5)
        exit = await stage.end(adopted)
        assert (exit.exit_code, exit.stop_cause) == (5, None)
        assert exit.started_at is not None
        assert place.begun() == 1
        assert_output_is_whole(adopted)

    @holds(Check.ADOPT_ENDED)
    async def test_adopt_ended(self, stage: Stage) -> None:
        place = stage.place()
        handle = (await stage.stand(place)).handle
        await stage.end_agent()
        place.go(5)
        await stage.until(place.over, "the workload has ended")
        await stage.observe()
        runtime = await stage.restart()
        adopted = await stage.within(runtime.adopt(handle), "adopt")
        exit = await stage.end(adopted)
        assert (exit.exit_code, exit.signal, exit.stop_cause) == (5, 0, None)
        assert exit.started_at is not None
        assert exit.started_at <= exit.ended_at
        assert_output_is_whole(adopted)

    @holds(Check.ADOPT_PREPARED)
    async def test_adopt_prepared(self, stage: Stage) -> None:
        place = stage.place()
        handle = (await stage.prepare(stage.request("begun", place))).handle
        runtime = await stage.restart()
        adopted = await stage.within(runtime.adopt(handle), "adopt")
        await stage.observe()
        assert (place.begun(), adopted.ended) == (0, False)
        assert await stage.within(adopted.begin(), "begin") is True
        assert (await stage.end(adopted)).exit_code == 0
        assert place.begun() == 1

    @holds(Check.ADOPT_STOPPED)
    async def test_adopt_stopped(self, stage: Stage) -> None:
        place, execution, deadline_ns = await stage.stand_briefly("polite", FAMILY, grace=SHORT_GRACE)
        # Once by the first, for a second agent may take as long to start as is left of the lease.
        execution.renew(deadline_ns + nanoseconds(self.patience))
        handle = execution.handle
        runtime = await stage.restart()
        adopted = await stage.within(runtime.adopt(handle), "adopt")
        adopted.renew(boottime_ns() + nanoseconds(LONG))
        await stage.past(deadline_ns)
        await stage.running(place, adopted, {"main"})
        await adopted.stop(StopCause.STALE)
        exit = await stage.end(adopted)
        await stage.assert_still(place, "the end was told")
        assert (exit.exit_code, exit.stop_cause) == (5, StopCause.STALE)

    @holds(Check.ADOPT_VANISHED)
    async def test_adopt_vanished(self, stage: Stage) -> None:
        execution, _ = await stage.run("leave", "0")
        handle = execution.handle
        await stage.end_agent()
        await self.vanish(stage.context, handle)
        await stage.restart()
        await self.assert_vanished(stage, handle)

    @holds(Check.ADOPT_UNKNOWN)
    async def test_adopt_unknown(self, stage: Stage) -> None:
        execution = await stage.prepare(stage.request("leave", "0"))
        handle = execution.handle
        await execution.stop(StopCause.STALE)
        await stage.end(execution)
        await stage.within(execution.forget(), "forget")
        for unknown in (handle, Handle("another-runtime", handle.version, handle.data)):
            await self.assert_vanished(stage, unknown)

    @holds(Check.STRAYS)
    async def test_strays(self, stage: Stage) -> None:
        assert await stage.runtime.strays() == []
        prepared = await stage.prepare(stage.request("leave", "0"))
        running = await stage.stand(stage.place())
        ended, _ = await stage.run("leave", "3")
        lease_ids = [prepared.lease_id, running.lease_id, ended.lease_id]
        # To the agent that started them, and to one that knows nothing.
        for again in (False, True):
            runtime = await stage.restart() if again else stage.runtime
            handles = await stage.within(runtime.strays(), "strays")
            assert all(handle.runtime == runtime.name for handle in handles)
            adopted = [await stage.within(runtime.adopt(handle), "adopt") for handle in handles]
            assert sorted(execution.lease_id for execution in adopted) == lease_ids
        states = {execution.lease_id: execution.ended for execution in adopted}
        assert [states[lease_id] for lease_id in lease_ids] == [False, False, True]

    @holds(Check.STRAYS_APART)
    async def test_strays_apart(self, stage: Stage) -> None:
        execution = await stage.stand(stage.place())
        other = self.make(stage.context_of(stage.shared.with_name("other-state")))
        await stage.within(other.open(), "open")
        try:
            assert await stage.within(other.strays(), "strays") == []
        finally:
            await stage.within(other.close(), "close")
        assert not execution.ended

    @holds(Check.FORGET)
    async def test_forget(self, stage: Stage) -> None:
        execution, _ = await stage.run("lines", "10")
        output, handle = execution.output, execution.handle
        await stage.within(execution.forget(), "forget")
        assert [path for path in (output.stdout, output.stderr, output.events) if path.exists()] == []
        await stage.within(execution.forget(), "forget, again")
        await self.assert_vanished(stage, handle)
        await stage.restart()
        await self.assert_vanished(stage, handle)

    async def assert_vanished(self, stage: Stage, handle: Handle) -> None:
        """Fails unless the handle names nothing, and nothing is on the stage."""
        with pytest.raises(ExecutionVanished, match=r"\w"):
            await stage.within(stage.runtime.adopt(handle), "adopt")
        assert await stage.within(stage.runtime.strays(), "strays") == []


def assert_output_is_whole(execution: Execution) -> None:
    """Fails unless a workload that stood has each of its lines in its output, once and in order."""
    text = execution.output.stdout.read_text()
    end = re.search(r"over after (\d+)\n$", text)
    assert end is not None, f"the end of the output is missing: {text[-100:]!r}"
    assert text == "".join(f"line {number}\n" for number in range(int(end[1]))) + end[0]
