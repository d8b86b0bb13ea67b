"""The process runtime keeps everything that a runtime promises."""

from __future__ import annotations

from datetime import timedelta

from lessor_agent.runtimes.process import ProcessRuntime
from lessor_agent.testing.conformance import RuntimeConformance


class TestProcess(RuntimeConformance):
    """Jobs as processes of this host."""

    runtime_class = ProcessRuntime
    lease = timedelta(seconds=1)
