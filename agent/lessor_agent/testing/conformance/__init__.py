"""The conformance suite: what every runtime promises, as tests that its author runs.

    from lessor_agent.testing.conformance import RuntimeConformance

    class TestMine(RuntimeConformance):
        runtime_class = MyRuntime

See docs/runtimes.md. It needs pytest, and no plugin; nothing else of Lessor does.
"""

import pytest

# Before these modules are imported, so that a failure shows what was compared.
pytest.register_assert_rewrite(
    *(
        f"lessor_agent.testing.conformance.{module}"
        for module in (
            "adoption", "deadlines", "environment", "events", "exits", "output", "stage", "starting", "stopping",
        )
    )
)  # fmt: skip

from lessor_agent.testing.conformance.checks import Check, Topic  # noqa: E402
from lessor_agent.testing.conformance.stage import Place, Stage  # noqa: E402
from lessor_agent.testing.conformance.subject import Subject  # noqa: E402
from lessor_agent.testing.conformance.suite import RuntimeConformance  # noqa: E402

__all__ = ["Check", "Place", "RuntimeConformance", "Stage", "Subject", "Topic"]
