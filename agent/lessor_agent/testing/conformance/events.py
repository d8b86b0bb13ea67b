"""Events: what the workload says about itself arrives as it was written."""

from __future__ import annotations

from lessor_agent.testing.conformance import workload
from lessor_agent.testing.conformance.checks import Check
from lessor_agent.testing.conformance.holding import holds
from lessor_agent.testing.conformance.stage import Stage
from lessor_agent.testing.conformance.subject import Subject


class EventChecks(Subject):
    """The events file. What its lines mean is the agent's business, not the runtime's."""

    @holds(Check.EVENTS_EXACT)
    async def test_events_exact(self, stage: Stage) -> None:
        place = stage.place()
        place.go()
        execution, exit = await stage.run("events", place)
        assert exit.exit_code == 0
        assert execution.output.events.read_bytes() == b"".join(workload.EVENTS)
        assert execution.output.stdout.read_bytes() == b""

    @holds(Check.EVENTS_LIVE)
    async def test_events_live(self, stage: Stage) -> None:
        place = stage.place()
        execution = await stage.start(stage.request("events", place))
        events = execution.output.events
        before_last = b"".join(workload.EVENTS[:-1])
        await stage.until(lambda: len(events.read_bytes()) >= len(before_last), "all events but the last have arrived")
        assert events.read_bytes() == before_last
        assert not execution.ended
        place.go()
        await stage.end(execution)
        assert events.read_bytes() == before_last + workload.EVENTS[-1]
