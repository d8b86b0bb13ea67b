"""After a silence of the whole fleet: what has ended meanwhile is told before anything is run again.

While no agent is heard, the jobs of leases that expire wait, and their ends may
lie with agents that could not tell. The first agent that is back has all its room
free, so that it would be given work which another has finished and is about to
tell of. So nothing is granted until all that were heard before are heard again,
for a few seconds at most. A silence in which no lease expired leaves nothing to
wait for; nor does that of a part of the fleet, whose work the rest takes over at
once.
"""

from __future__ import annotations

import logging
from collections.abc import Set
from datetime import timedelta

from lessor import timing

logger = logging.getLogger(__name__)

SETTLE_S = timing.FLEET_SETTLES / timedelta(seconds=1)
"""An agent that lost its server tries again within so many seconds."""


class Settling:
    """Whether the fleet is coming back from a silence. Used by the leader's planner; a new leader knows of none."""

    def __init__(self) -> None:
        self._heard: Set[str] = frozenset()
        """Agents that were heard when the fleet was last as it should be."""
        self._losses = 0
        """How many expiries there had been then."""
        self._silent = False
        self._until_s: float | None = None

    def look(self, fresh: Set[str], losses: int, now_s: float) -> None:
        """Takes note of the fleet.

        Args:
            fresh: Ids of the agents that are heard.
            losses: A count that grows whenever leases expire.
            now_s: The time of any clock that only goes on, in seconds.
        """
        if not fresh:
            self._silent, self._until_s = bool(self._heard), None
            return
        if self._silent and losses != self._losses:
            self._until_s = now_s + SETTLE_S
            logger.warning(
                "agents are back after a silence of all: nothing is granted before the others are, or for some seconds",
                extra={"event": "settle", "back": len(fresh), "before": len(self._heard)},
            )
        self._silent = False
        if self.left_s(now_s) == 0 or self._heard <= fresh:
            self._heard, self._losses, self._until_s = fresh, losses, None

    def left_s(self, now_s: float) -> float:
        """Returns for how many seconds at most nothing is to be granted; 0: the fleet is as it should be."""
        return 0.0 if self._until_s is None else max(0.0, self._until_s - now_s)
