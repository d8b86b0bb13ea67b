"""A ground is freed with its last user: a fleet of it is made with every read, and nobody looks for cycles often."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from lessor_server.planner.cycle import plan_on
from lessor_server.planner.model import Policy, Queue
from lessor_server.planner.placement import Ground
from tests.unit.server.planner.worlds import make_agent, make_group, make_shape


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def make_ground() -> Ground:
    return Ground([make_agent("a1", 4), make_agent("a2", 2)], max_offers=10)


def test_a_ground_that_nothing_was_planned_on() -> None:
    ground = make_ground()
    freed = weakref.ref(ground)
    del ground
    assert freed() is None


def test_a_ground_that_is_retired() -> None:
    ground = make_ground()
    groups = [make_group(make_shape(1), 1, 2), make_group(make_shape(), 3, shape_id=2)]
    assert len(plan_on(ground, groups, {1: Queue(1, "default")}, Policy()).grants) == 3
    freed = weakref.ref(ground)
    ground.retire()
    del ground
    assert freed() is None
