"""The storm brake as a machine of its own: when it holds, for how long, and what it says."""

from __future__ import annotations

import logging
from datetime import timedelta

import pytest

from lessor import timing
from lessor_server.maintenance.storm_brake import FEW, StormBrake

LIMIT_MS = timing.STORM_BRAKE_MAX // timedelta(milliseconds=1)


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[str, int]]:
    """(event, level) of each line that was logged."""
    return [(record.__dict__["event"], record.levelno) for record in caplog.records]


@pytest.mark.parametrize(
    ("silent", "holding", "storm"),
    [
        (0, 0, False),
        (10, 10, False),
        (11, 11, True),
        (11, 21, True),
        (11, 22, False),
        (12, 22, True),
        (50, 100, False),
        (51, 100, True),
        (5000, 10_000, False),
        (5001, 10_000, True),
    ],
)
def test_a_storm_is_more_than_ten_and_more_than_half(silent: int, holding: int, storm: bool) -> None:
    brake = StormBrake()
    brake.see(silent, holding)
    assert brake.holds is storm


def test_it_holds_for_its_limit_and_not_again_before_the_agents_are_back() -> None:
    brake = StormBrake()
    brake.see(80, 100)
    for _ in range(LIMIT_MS // 250 - 1):
        brake.stood(250)
        assert brake.holds
    brake.stood(250)
    assert not brake.holds
    for silent in (80, 100, 60, 51, 90):
        brake.see(silent, 100)
        assert not brake.holds, "the limit of this storm is used up"
    brake.see(25, 100)
    assert brake.stood_ms == 0
    brake.see(80, 100)
    assert brake.holds, "another storm"


def test_a_fleet_that_wavers_around_half_has_one_limit() -> None:
    brake = StormBrake()
    for _ in range(2 * LIMIT_MS // 1000):
        brake.see(51, 100)
        brake.stood(1000)
        brake.see(49, 100)
        assert not brake.holds
    assert brake.stood_ms == LIMIT_MS


def test_the_last_few_end_a_storm_of_any_fleet() -> None:
    brake = StormBrake()
    brake.see(11, 11)
    brake.stood(250)
    brake.see(FEW, 0)
    assert (brake.holds, brake.stood_ms) == (False, 0)


def test_time_counts_only_while_it_holds() -> None:
    brake = StormBrake()
    brake.stood(1000)
    assert brake.stood_ms == 0
    brake.see(80, 100)
    # Let go while a tick was on its way: what that tick found was another storm.
    brake.see(0, 0)
    brake.stood(1000)
    assert brake.stood_ms == 0


@pytest.mark.parametrize(("stood_ms", "holds"), [(0, False), (1, True), (LIMIT_MS - 1, True), (LIMIT_MS, False)])
def test_a_new_leader_goes_on_where_the_last_one_was(stood_ms: int, holds: bool) -> None:
    brake = StormBrake()
    brake.begin_term(stood_ms)
    assert brake.holds is holds
    brake.see(80, 100)
    assert brake.holds is (stood_ms < LIMIT_MS)


def test_off_it_never_holds() -> None:
    brake = StormBrake(timedelta(0))
    assert brake.is_off
    brake.begin_term(30_000)
    assert (brake.holds, brake.stood_ms) == (False, 0)
    brake.see(100, 100)
    assert not brake.holds


def test_it_says_once_that_a_storm_began_and_once_that_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    brake = StormBrake()
    with caplog.at_level(logging.INFO):
        brake.see(3, 0)
        for silent in (80, 90, 49, 80):
            brake.see(silent, 100)
            brake.stood(1000)
        brake.see(2, 0)
        brake.see(2, 0)
    assert said(caplog) == [("storm_brake", logging.ERROR), ("storm_over", logging.WARNING)]
    began = caplog.records[0].__dict__
    assert (began["silent_sessions"], began["holding_sessions"], began["left_ms"]) == (80, 100, LIMIT_MS)


def test_it_says_once_that_the_limit_is_used_up(caplog: pytest.LogCaptureFixture) -> None:
    brake = StormBrake()
    with caplog.at_level(logging.INFO):
        for _ in range(2 * LIMIT_MS // 1000):
            brake.see(80, 100)
            brake.stood(1000)
        brake.see(0, 0)
    assert said(caplog) == [
        ("storm_brake", logging.ERROR),
        ("storm_brake_spent", logging.ERROR),
        ("storm_over", logging.WARNING),
    ]
