"""Chaos on real processes, the short version; `make chaos CHAOS_SECONDS=1800` is the long one."""

from __future__ import annotations

import random

import pytest

from tests.chaos import network
from tests.chaos.run import chaos
from tests.chaos.schedule import Planned
from tests.chaos.world import Shape

pytestmark = pytest.mark.chaos

SECONDS = 16.0
AGENTS = 3
CERTAIN = (Planned("partition", 0, 1.0, 14.0), Planned("server kill", 0, 6.0, 1.0))
"""One agent is away for longer than a lease, so that its jobs go elsewhere."""


@pytest.mark.timeout(180)
async def test_nothing_runs_twice_and_nothing_is_lost() -> None:
    if lacking := network.missing():
        pytest.skip(f"chaos needs network namespaces, iptables and tmpfs: {lacking}")
    seed = random.SystemRandom().randrange(1_000_000)
    lines: list[str] = []
    verdict = await chaos(SECONDS, seed, Shape(agents=AGENTS), lines.append, certain=CERTAIN)
    told = "\n".join([*lines, *verdict.figures()])
    assert not verdict.violations, told
    assert not verdict.broken, told
    assert len(verdict.history.faults) > len(CERTAIN), told
    assert len(verdict.history.executions) > 20, told
