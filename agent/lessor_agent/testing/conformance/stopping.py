"""Stopping: asked first, forced after the grace, and gone as a whole before the end is told."""

from __future__ import annotations

import signal
from datetime import timedelta

from lessor_agent.boottime import boottime_ns
from lessor_agent.runtimes.base import StopCause
from lessor_agent.testing.conformance.checks import Check
from lessor_agent.testing.conformance.holding import holds
from lessor_agent.testing.conformance.stage import LONG, Stage, assert_never_ran, nanoseconds
from lessor_agent.testing.conformance.subject import Subject

FAMILY = ("child", "runaway")
SHORT_GRACE = timedelta(milliseconds=300)


class StopChecks(Subject):
    """How executions are stopped."""

    @holds(Check.STOP_COOPERATIVE)
    async def test_stop_cooperative(self, stage: Stage) -> None:
        place = stage.place()
        execution = await stage.stand(place, "polite")
        await execution.stop(StopCause.CANCELLED)
        exit = await stage.end(execution)
        # Noted by the workload itself: when SIGTERM came the file was there, and when it began it was not.
        assert place.heard() == "cancel file"
        assert (exit.exit_code, exit.signal, exit.stop_cause) == (5, 0, StopCause.CANCELLED)

    @holds(Check.STOP_FORCED)
    async def test_stop_forced(self, stage: Stage) -> None:
        place = stage.place()
        grace = timedelta(seconds=1)
        execution = await stage.stand(place, "deaf")
        asked_ns = boottime_ns()
        await execution.stop(StopCause.CANCELLED, grace)
        exit = await stage.end(execution)
        took_ns = boottime_ns() - asked_ns
        assert took_ns >= nanoseconds(grace), f"killed after {took_ns / 1e9:.3f} s of a grace of {grace}"
        assert (exit.exit_code, exit.signal, exit.stop_cause) == (None, signal.SIGKILL, StopCause.CANCELLED)
        assert place.heard() == "cancel file"

    @holds(Check.STOP_TREE)
    async def test_stop_tree(self, stage: Stage) -> None:
        place = stage.place()
        # Its main process ends when it is asked; the others never do.
        execution = await stage.stand(place, "polite", FAMILY)
        await execution.stop(StopCause.CANCELLED, SHORT_GRACE)
        exit = await stage.end(execution)
        await stage.assert_still(place, "the end was told")
        assert (exit.exit_code, exit.signal, exit.stop_cause) == (5, 0, StopCause.CANCELLED)

    @holds(Check.STOP_SHORTENS)
    async def test_stop_shortens(self, stage: Stage) -> None:
        execution = await stage.stand(stage.place(), "deaf")
        for grace in (LONG, SHORT_GRACE, LONG):
            await execution.stop(StopCause.CANCELLED, grace)
        assert (await stage.end(execution)).signal == signal.SIGKILL

    @holds(Check.STOP_CAUSE)
    async def test_stop_cause(self, stage: Stage) -> None:
        execution = await stage.stand(stage.place(), "deaf")
        await execution.stop(StopCause.AGENT_STOPPED, LONG)
        await execution.stop(StopCause.STALE, timedelta(0))
        assert (await stage.end(execution)).stop_cause is StopCause.AGENT_STOPPED

    @holds(Check.STOP_BEFORE_BEGIN)
    async def test_stop_before_begin(self, stage: Stage) -> None:
        place = stage.place()
        execution = await stage.prepare(stage.request("begun", place))
        await execution.stop(StopCause.CANCELLED)
        exit = await stage.end(execution)
        assert_never_ran(exit, StopCause.CANCELLED)
        assert exit.start_error is None
        assert await stage.within(execution.begin(), "begin") is False
        assert await stage.end(execution) == exit
        await stage.observe()
        assert place.begun() == 0

    @holds(Check.STOP_ENDED)
    async def test_stop_ended(self, stage: Stage) -> None:
        execution, exit = await stage.run("leave", "3")
        await execution.stop(StopCause.CANCELLED, timedelta(0))
        execution.renew(boottime_ns() + nanoseconds(LONG))
        assert await stage.end(execution) == exit
        assert (exit.exit_code, exit.stop_cause) == (3, None)

    @holds(Check.LEFTOVERS)
    async def test_leftovers(self, stage: Stage) -> None:
        place = stage.place()
        execution = await stage.stand(place, "polite", FAMILY, grace=SHORT_GRACE)
        place.go(3)
        exit = await stage.end(execution)
        await stage.assert_still(place, "the end was told")
        assert (exit.exit_code, exit.signal, exit.stop_cause) == (3, 0, None)

    @holds(Check.RUN_TIMEOUT)
    async def test_run_timeout(self, stage: Stage) -> None:
        place = stage.place()
        run_timeout = timedelta(milliseconds=500)
        request = stage.request("stand", place, "deaf", grace=SHORT_GRACE, run_timeout=run_timeout)
        execution = await stage.prepare(request)
        # Its time has not begun: a start may take longer than that.
        await stage.observe()
        await stage.observe()
        assert await stage.within(execution.begin(), "begin") is True
        exit = await stage.end(execution)
        await stage.assert_still(place, "the end was told")
        assert (exit.exit_code, exit.stop_cause) == (None, StopCause.RUN_TIMEOUT)
        assert exit.started_at is not None
        assert exit.ended_at - exit.started_at >= run_timeout
