"""Deadlines: what becomes of an execution whose lease is not renewed."""

from __future__ import annotations

import signal
from datetime import timedelta

from lessor_agent.boottime import boottime_ns
from lessor_agent.runtimes.base import OnLost, StopCause
from lessor_agent.testing.conformance.checks import Check
from lessor_agent.testing.conformance.holding import holds
from lessor_agent.testing.conformance.stage import LONG, Stage, assert_never_ran, nanoseconds
from lessor_agent.testing.conformance.stopping import FAMILY
from lessor_agent.testing.conformance.subject import Subject

GRACE = timedelta(milliseconds=100)
"""Short, so that next to nothing of a short lease is spent on it."""


class DeadlineChecks(Subject):
    """What holds when nobody renews, and when somebody does."""

    @holds(Check.DEADLINE_STOP)
    async def test_deadline_stop(self, stage: Stage) -> None:
        place, execution, deadline_ns = await stage.stand_briefly("polite", FAMILY, grace=GRACE)
        await stage.past(deadline_ns)
        await stage.assert_still(place, "the deadline has passed")
        exit = await stage.end(execution)
        assert exit.stop_cause is StopCause.LEASE_LOST
        # Asked first, and as it then ended by itself.
        assert (place.heard(), exit.exit_code) == ("cancel file", 5)

    @holds(Check.DEADLINE_ALONE)
    async def test_deadline_alone(self, stage: Stage) -> None:
        place, execution, deadline_ns = await stage.stand_briefly("deaf", FAMILY, grace=GRACE)
        handle = execution.handle
        await stage.end_agent()
        await stage.past(deadline_ns)
        await stage.assert_still(place, "the deadline has passed")
        runtime = await stage.restart()
        exit = await stage.end(await runtime.adopt(handle))
        assert (exit.exit_code, exit.signal, exit.stop_cause) == (None, signal.SIGKILL, StopCause.LEASE_LOST)

    @holds(Check.DEADLINE_UNBEGUN)
    async def test_deadline_unbegun(self, stage: Stage) -> None:
        place = stage.place()
        request = stage.request("begun", place, deadline_ns=boottime_ns() + nanoseconds(self.lease), grace=GRACE)
        execution = await stage.prepare(request)
        exit = await stage.end(execution)
        assert_never_ran(exit, StopCause.LEASE_LOST)
        assert await stage.within(execution.begin(), "begin") is False
        await stage.observe()
        assert place.begun() == 0

    @holds(Check.DEADLINE_RENEWED)
    async def test_deadline_renewed(self, stage: Stage) -> None:
        place, execution, deadline_ns = await stage.stand_briefly("deaf", grace=GRACE)
        # Long enough to be seen to run after the first deadline, which may show late, also on a host that is slow.
        renewed_ns = deadline_ns + 2 * nanoseconds(self.late) + nanoseconds(self.lease)
        execution.renew(renewed_ns)
        await stage.past(deadline_ns)
        await stage.running(place, execution, {"main"})
        await stage.past(renewed_ns)
        await stage.assert_still(place, "the renewed deadline has passed")
        assert (await stage.end(execution)).stop_cause is StopCause.LEASE_LOST

    @holds(Check.RENEW_NEVER_BACK)
    async def test_renew_never_back(self, stage: Stage) -> None:
        place = stage.place()
        execution = await stage.stand(place, grace=GRACE)
        soon_ns = boottime_ns() + nanoseconds(self.lease)
        for earlier_ns in (soon_ns, boottime_ns(), 0):
            execution.renew(earlier_ns)
        await stage.past(soon_ns)
        await stage.running(place, execution, {"main"})
        assert place.heard() == ""

    @holds(Check.DEADLINE_CONTINUE)
    async def test_deadline_continue(self, stage: Stage) -> None:
        place, execution, deadline_ns = await stage.stand_briefly(on_lost=OnLost.CONTINUE, grace=GRACE)
        await stage.past(deadline_ns)
        await stage.running(place, execution, {"main"})
        assert place.heard() == ""
        place.go(2)
        exit = await stage.end(execution)
        assert (exit.exit_code, exit.stop_cause) == (2, None)

    @holds(Check.DEADLINE_FREEZE)
    async def test_deadline_freeze(self, stage: Stage) -> None:
        stage.needs(stage.runtime.capabilities.can_freeze, "can_freeze")
        place, execution, deadline_ns = await stage.stand_briefly("polite", FAMILY, on_lost=OnLost.FREEZE, grace=GRACE)
        await stage.past(deadline_ns)
        await stage.assert_still(place, "the deadline has passed")
        assert not execution.ended
        execution.renew(boottime_ns() + nanoseconds(LONG))
        await stage.running(place, execution, {"main", *FAMILY})
        assert place.heard() == ""
        place.go(2)
        exit = await stage.end(execution)
        assert (exit.exit_code, exit.stop_cause) == (2, None)

    @holds(Check.FROZEN_STOP)
    async def test_frozen_stop(self, stage: Stage) -> None:
        stage.needs(stage.runtime.capabilities.can_freeze, "can_freeze")
        place, execution, deadline_ns = await stage.stand_briefly("polite", FAMILY, on_lost=OnLost.FREEZE, grace=GRACE)
        await stage.past(deadline_ns)
        ran = place.ticks()
        await execution.stop(StopCause.STALE, timedelta(seconds=30))
        exit = await stage.end(execution)
        await stage.observe()
        assert (place.ticks(), place.heard()) == (ran, "")
        assert (exit.exit_code, exit.signal, exit.stop_cause) == (None, signal.SIGKILL, StopCause.STALE)
