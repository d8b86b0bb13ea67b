"""The storm brake: lease time stands still while most agents are silent at once.

When more than half of the fleet stops renewing in the same moment, the fault is
far more likely ours (a network, an overloaded server or database) than theirs,
and expiring their leases would run again what still runs. So the leader lets
lease time stand: nothing comes due, and whoever renews is on time again. Standing
still is always safe, the server only waits longer; but it must end, or the work of
a fleet that is really gone would never be given to anybody else.

A session is *silent* when it holds leases and has missed two heartbeat intervals.
An agent takes only leases that hold four of its intervals, so that is at least
half a ttl and both margins before the first of them runs out.
"""

from __future__ import annotations

import logging
from datetime import timedelta

from lessor import timing

logger = logging.getLogger(__name__)

_MS = timedelta(milliseconds=1)

FEW = timing.STORM_MIN_SESSIONS // 2
"""With so few silent sessions every storm is over, however small the fleet: the others need not be counted."""


class StormBrake:
    """Decides whether lease time stands still. It belongs to the leader; replicas that follow do not ask it.

    An *episode* begins with a storm and ends when at most half as many sessions are
    silent as make one. Lease time stands still for at most ``limit`` in an episode, all
    leaders of it taken together: the row ``leader`` carries what was used up
    (``stood_ms``), so a leader that dies does not hand a fresh limit to the next.
    """

    def __init__(self, limit: timedelta = timing.STORM_BRAKE_MAX) -> None:
        """``limit`` is the longest stand of one episode, in time of the leader; zero turns the brake off."""
        self._limit_ms = limit // _MS
        self.holds = False
        """Whether lease time stands still now."""
        self.stood_ms = 0
        """How long it has stood in the present episode, in milliseconds; 0: there is none."""
        self._told = False

    @property
    def is_off(self) -> bool:
        """Whether it never holds."""
        return self._limit_ms <= 0

    def begin_term(self, stood_ms: int) -> None:
        """Takes over from another leader, or from an earlier term.

        An episode that was under way is taken to go on until :meth:`see` says
        otherwise: the first tick of a term must not age anything by itself.

        Args:
            stood_ms: What the row ``leader`` says.
        """
        self.stood_ms = 0 if self.is_off else stood_ms
        self.holds = 0 < stood_ms < self._limit_ms
        self._told = False

    def see(self, silent: int, holding: int) -> None:
        """Takes note of the fleet.

        Args:
            silent: Sessions that hold leases and have missed two heartbeats.
            holding: Sessions that hold leases; not looked at if no more than :data:`FEW` are silent.
        """
        if self.is_off:
            return
        storm = max(timing.STORM_MIN_SESSIONS, timing.STORM_SHARE * holding)
        if silent > storm:
            if self.stood_ms < self._limit_ms and not self.holds:
                self.holds = True
                self._tell_begin(silent, holding)
            return
        self.holds = False
        if silent <= FEW or 2 * silent <= storm:
            self._recovered(silent, holding)

    def stood(self, elapsed_ms: int) -> None:
        """Counts time for which lease time stood still, once the database has it; not if it was let go meanwhile."""
        if not self.holds:
            return
        self.stood_ms += elapsed_ms
        if self.stood_ms >= self._limit_ms:
            self.holds = False
            logger.error(
                "lease time runs on: the silent agents did not come back in time, their leases will expire",
                extra={"event": "storm_brake_spent", "stood_ms": self.stood_ms},
            )

    def _tell_begin(self, silent: int, holding: int) -> None:
        if self._told:
            return
        self._told = True
        logger.error(
            "lease time stands still: most agents are silent at once; look at the network, the servers, the database",
            extra={
                "event": "storm_brake",
                "silent_sessions": silent,
                "holding_sessions": holding,
                "left_ms": self._limit_ms - self.stood_ms,
            },
        )

    def _recovered(self, silent: int, holding: int) -> None:
        if self.stood_ms or self._told:
            logger.warning(
                "the agents are back: the storm is over",
                extra={
                    "event": "storm_over",
                    "silent_sessions": silent,
                    "holding_sessions": holding,
                    "stood_ms": self.stood_ms,
                },
            )
        self.stood_ms = 0
        self._told = False
