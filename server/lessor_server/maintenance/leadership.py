"""Leadership: one replica at a time plans and reaps, and counts lease time.

The row ``leader`` says who: its epoch names a term, its beat shows that the
holder lives. A replica that sees the same beat for 1.5 s of its own clock takes
over; whatever the old leader still commits carries the old epoch and finds no
row. Lease time advances only here: by what passed on the leader's own monotonic
clock, at most 1 s a tick, so that an outage or a jump never ages a lease; and not
at all while the storm brake holds (:mod:`.storm_brake`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from lessor import timing
from lessor_server.domain.errors import LessorServerError
from lessor_server.maintenance.storm_brake import StormBrake
from lessor_server.store.database import Database

logger = logging.getLogger(__name__)

_SHORTEST_REST_S = 0.01
"""A timer that rings a little early is set again for this long."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """A beat of another replica, and since when it stands still."""

    epoch: int
    beat: int
    since_s: float


class Leadership:
    """Runs for leader and, while it leads, advances lease time."""

    def __init__(
        self, database: Database, replica: str, monotonic: Callable[[], float], brake: StormBrake | None = None
    ) -> None:
        """
        Args:
            database: The store.
            replica: Name of this server process.
            monotonic: Seconds on a clock that never goes back.
            brake: Whether lease time is to stand still; None: one with the usual limit.
        """
        self._database = database
        self.brake = brake or StormBrake()
        """Told by whoever looks at the sessions, asked at every tick."""
        self._replica = replica
        self._monotonic = monotonic
        self._seen: _Seen | None = None
        self._last_tick_s = 0.0
        self.epoch: int | None = None
        """The term this replica leads in; None: another leads, or nobody."""
        self.clock_ms = 0
        """Lease time at the last tick of this replica."""
        self.gained = asyncio.Event()
        """Set while this replica leads."""

    async def run(self) -> None:
        """Ticks until cancelled."""
        while True:
            await self.step()
            await asyncio.sleep(self.rest_s())

    def rest_s(self) -> float:
        """Returns after how many seconds to step again: a tick, or sooner if the leader's time to speak is up then."""
        rest_s = timing.LEADER_TICK.total_seconds()
        if self.epoch is None and self._seen is not None:
            overdue_in_s = self._seen.since_s + timing.LEADER_TAKEOVER.total_seconds() - self._monotonic()
            if overdue_in_s > 0:
                rest_s = min(rest_s, max(overdue_in_s, _SHORTEST_REST_S))
        return rest_s

    async def step(self) -> None:
        """Advances lease time if this replica leads, else looks whether it should."""
        try:
            if self.epoch is None:
                await self._campaign()
            else:
                await self._tick(self.epoch)
        except LessorServerError as error:
            # Whether a tick was committed is not known; counting its time again
            # could age leases, so it is not counted at all.
            self._last_tick_s = self._monotonic()
            logger.warning("the leader row is out of reach", extra={"event": "leader", "error": error.message})

    async def _tick(self, epoch: int) -> None:
        now_s = self._monotonic()
        elapsed_s = now_s - self._last_tick_s
        elapsed_ms = int(min(elapsed_s, timing.LEADER_TICK_MAX.total_seconds()) * 1000)
        stood_ms = elapsed_ms if self.brake.holds else 0
        rows = await self._database.fetch(
            "tick", epoch=epoch, elapsed_ms=elapsed_ms - stood_ms, stood_ms=self.brake.stood_ms + stood_ms
        )
        if not rows:
            # Unless a new term of ours began while this tick was on its way.
            if self.epoch == epoch:
                self._lose()
            return
        # The part of a millisecond that was not counted is counted next time.
        self._last_tick_s = now_s - (elapsed_s * 1000 % 1) / 1000
        self.brake.stood(stood_ms)
        self.clock_ms = rows[0]["clock"]

    async def _campaign(self) -> None:
        (row,) = await self._database.fetch("read_leader")
        now_s = self._monotonic()
        seen = self._seen
        if seen is None or (seen.epoch, seen.beat) != (row["epoch"], row["beat"]):
            self._seen = seen = _Seen(row["epoch"], row["beat"], now_s)
        vacant = row["holder"] == ""
        if not vacant and now_s - seen.since_s < timing.LEADER_TAKEOVER.total_seconds():
            return
        rows = await self._database.fetch("take_over", holder=self._replica, seen_epoch=seen.epoch, seen_beat=seen.beat)
        if not rows:
            return
        # The first tick of a term adds nothing: how long nobody led is not known.
        self._last_tick_s = self._monotonic()
        self.epoch = rows[0]["epoch"]
        self.clock_ms = rows[0]["clock"]
        self.brake.begin_term(rows[0]["stood_ms"])
        self.gained.set()
        logger.info("this replica leads", extra={"event": "lead", "epoch": self.epoch})

    def _lose(self) -> None:
        logger.warning("another replica leads", extra={"event": "lead_lost", "epoch": self.epoch})
        self.epoch = None
        self._seen = None
        self.gained.clear()

    async def renew_term(self) -> None:
        """Begins a new term of this leader: a claim of the old term whose outcome is unknown can no longer commit.

        Raises:
            DatabaseUnavailable: The old term stands.
        """
        if self.epoch is None:
            return
        rows = await self._database.fetch("renew_term", epoch=self.epoch, holder=self._replica)
        if rows:
            self.epoch = rows[0]["epoch"]
        else:
            self._lose()

    async def resign(self) -> None:
        """Lets another replica take over at once."""
        if self.epoch is not None:
            await self._database.fetch("resign", epoch=self.epoch)
            self.epoch = None
            self.gained.clear()
