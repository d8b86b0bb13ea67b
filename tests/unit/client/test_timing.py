"""The numbers of the lease protocol leave each side the room it needs."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lessor import timing

MAX_TTL = timedelta(hours=24)
ttls = st.timedeltas(min_value=timing.MIN_TTL, max_value=MAX_TTL)


@pytest.mark.parametrize(
    ("ttl_s", "margin_s", "heartbeat_s", "grace_s"),
    [(10, 1.2, 2.5, 1.9), (20, 1.4, 5, 4.3), (60, 2.2, 15, 10), (3600, 73, 900, 10)],
)
def test_known_numbers(ttl_s: float, margin_s: float, heartbeat_s: float, grace_s: float) -> None:
    ttl = timedelta(seconds=ttl_s)
    assert timing.margin(ttl) == timedelta(seconds=margin_s)
    assert timing.longest_heartbeat(ttl) == timedelta(seconds=heartbeat_s)
    assert timing.default_grace(ttl) == timedelta(seconds=grace_s)


@given(ttls)
def test_clocks_that_differ_by_one_percent_do_not_meet(ttl: timedelta) -> None:
    agent_done = (ttl - timing.margin(ttl)) * 1.01
    server_waits = (ttl + timing.margin(ttl)) * 0.99
    assert agent_done + timedelta(seconds=1) < server_waits


@given(ttls)
def test_a_default_grace_leaves_two_heartbeats_to_spare(ttl: timedelta) -> None:
    interval = min(timing.DEFAULT_HEARTBEAT_INTERVAL, timing.longest_heartbeat(ttl))
    grace = timing.default_grace(ttl)
    assert timedelta(0) < grace <= timing.DEFAULT_GRACE
    assert grace + timing.margin(ttl) + 2 * interval < ttl


@given(ttls)
def test_the_longest_grace_is_the_bound_itself(ttl: timedelta) -> None:
    interval = min(timing.DEFAULT_HEARTBEAT_INTERVAL, timing.longest_heartbeat(ttl))
    assert timing.longest_grace(ttl) + timing.margin(ttl) + 2 * interval == ttl


def test_defaults_go_together() -> None:
    assert timing.longest_heartbeat(timing.DEFAULT_TTL) >= timing.DEFAULT_HEARTBEAT_INTERVAL
    assert timing.MIN_TTL <= timing.DEFAULT_TTL
    assert timing.LEADER_TICK < timing.LEADER_TICK_MAX < timing.LEADER_TAKEOVER
    assert timedelta(0) < timing.RENEWAL_FLUSH <= timedelta(milliseconds=250)
    assert timing.DEFAULT_BACKOFF_INITIAL <= timing.DEFAULT_BACKOFF_MAX
    assert timing.MIN_PROTOCOL_VERSION <= timing.PROTOCOL_VERSION
