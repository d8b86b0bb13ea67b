"""The numbers of the lease protocol, in one place.

Times that are compared across machines are durations, never wall-clock
instants: the agent counts on its own ``CLOCK_BOOTTIME``, the server on lease
time (``leader.clock``). Source: docs/lease-protocol.md.
"""

from __future__ import annotations

from datetime import timedelta

DEFAULT_TTL = timedelta(seconds=60)
"""How long a lease stands without a renewal, unless the job says otherwise."""

MIN_TTL = timedelta(seconds=10)
"""The shortest ttl a job may ask for."""

DEFAULT_HEARTBEAT_INTERVAL = timedelta(seconds=5)
"""How often an agent renews its session, unless its configuration says otherwise."""

HEARTBEATS_PER_TTL = 4
"""An agent takes only jobs whose ttl holds at least this many heartbeat intervals."""

DEFAULT_GRACE = timedelta(seconds=10)
"""From SIGTERM to SIGKILL, unless the job says otherwise or its ttl is short."""

OFFER_TTL = timedelta(seconds=10)
"""An offer that is not accepted for this long is asked back."""

END_COMES = timedelta(seconds=5)
"""A waiting job is kept for so long for the agent that is back and says that it has finished it."""

SESSION_FRESH_INTERVALS = 2
"""A session that has not renewed for this many heartbeat intervals gets no new jobs."""

RENEWAL_FLUSH = timedelta(milliseconds=100)
"""Heartbeats of one replica are collected this long, then renewed in one statement."""

LEADER_TICK = timedelta(milliseconds=250)
"""How often the leader advances lease time."""

LEADER_TICK_MAX = timedelta(seconds=1)
"""Lease time advances at most this much per tick, however late the tick is."""

LEADER_TAKEOVER = timedelta(milliseconds=1500)
"""A leader that has not advanced for this long is replaced."""

FLEET_SETTLES = timedelta(seconds=5)
"""After a silence of all agents in which leases expired nothing is granted for so long, unless all are back before."""

STORM_MIN_SESSIONS = 10
"""At most so many silent sessions are never a storm, however small the fleet."""

STORM_SHARE = 0.5
"""More than this share of the sessions that hold leases, silent at once, is a storm."""

STORM_BRAKE_MAX = timedelta(seconds=60)
"""Lease time stands still in a storm for at most so long, unless the server's configuration says otherwise."""

DEFAULT_MAX_FAILURES = 1
DEFAULT_MAX_LOSSES = 10
DEFAULT_BACKOFF_INITIAL = timedelta(seconds=1)
DEFAULT_BACKOFF_MAX = timedelta(minutes=5)
BACKOFF_JITTER = 0.2
"""A backoff is spread by this share, both ways."""

DEFAULT_CPU_MILLIS = 1000
"""What a job reserves when it does not say, in milli-CPUs."""

PROTOCOL_VERSION = 1
"""Version of the agent protocol this code speaks."""

MIN_PROTOCOL_VERSION = 1
"""Oldest version of the agent protocol the server accepts."""


def margin(ttl: timedelta) -> timedelta:
    """Returns the slack kept on each side of a lease of ``ttl``: 1 s + ttl/50.

    It covers clock rates that differ by 1 % and late scheduling. The agent is
    done by ``ttl - margin``, the server waits for ``ttl + margin``.
    """
    return timedelta(seconds=1) + ttl / 50


def longest_heartbeat(ttl: timedelta) -> timedelta:
    """Returns the longest heartbeat interval an agent may have to take a lease of ``ttl``."""
    return ttl / HEARTBEATS_PER_TTL


def longest_grace(ttl: timedelta) -> timedelta:
    """Returns the bound below which a grace leaves room for two heartbeats in ``ttl``.

    A job is stopped ``grace`` before its deadline of ``ttl - margin``; were that
    sooner than two intervals, one late heartbeat would stop a healthy job.
    """
    interval = min(DEFAULT_HEARTBEAT_INTERVAL, longest_heartbeat(ttl))
    return ttl - margin(ttl) - 2 * interval


def default_grace(ttl: timedelta) -> timedelta:
    """Returns the grace of a job that names none: 10 s, or half of what a short ttl has room for."""
    return min(DEFAULT_GRACE, longest_grace(ttl) / 2)
