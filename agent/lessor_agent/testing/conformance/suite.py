"""The whole suite as one class of tests."""

from __future__ import annotations

from lessor_agent.testing.conformance.adoption import AdoptionChecks
from lessor_agent.testing.conformance.deadlines import DeadlineChecks
from lessor_agent.testing.conformance.environment import EnvironmentChecks
from lessor_agent.testing.conformance.events import EventChecks
from lessor_agent.testing.conformance.exits import ExitChecks
from lessor_agent.testing.conformance.output import OutputChecks
from lessor_agent.testing.conformance.starting import StartChecks
from lessor_agent.testing.conformance.stopping import StopChecks


class RuntimeConformance(
    ExitChecks, OutputChecks, EnvironmentChecks, StartChecks, StopChecks, DeadlineChecks, AdoptionChecks, EventChecks
):
    """Every check, each a test. Subclass it in a test module, as ``Test…``, and say which runtime it is about.

    What a runtime does not promise is named in ``unsupported``, with the reason;
    how it is made and where its jobs find things are methods to override: see
    :class:`~lessor_agent.testing.conformance.subject.Subject`.
    """
