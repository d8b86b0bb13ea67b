"""The reaper: ends what is overdue, while this replica leads."""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime, timedelta

import asyncpg

from lessor import timing
from lessor.v1 import job_pb2
from lessor_server.bells import Bells
from lessor_server.domain.errors import LessorServerError
from lessor_server.domain.states import JobState
from lessor_server.maintenance.leadership import Leadership
from lessor_server.maintenance.storm_brake import FEW
from lessor_server.store.database import Database
from lessor_server.store.reports import finish_drained

logger = logging.getLogger(__name__)

_MS = timedelta(milliseconds=1)
_MAX_LEASES_PER_STATEMENT = 1000
_EXPIRIES_PER_LOOK = 4
"""At most so many expire statements, and a second of lease time, lie between two looks for a storm."""
_LOOK_EVERY_MS = 1000
_SLOW_CHECKS_EVERY = 4
"""Ticks between looks at what is not urgent."""

LEASE_EXPIRED = job_pb2.JobError(
    error_class=job_pb2.ERROR_CLASS_INFRASTRUCTURE,
    type="LEASE_EXPIRED",
    message="the agent did not renew the lease in time",
    retryable=True,
).SerializeToString()

QUEUE_TIMEOUT = job_pb2.JobError(
    error_class=job_pb2.ERROR_CLASS_TIMEOUT,
    type="QUEUE_TIMEOUT",
    message="the job was not started within timeouts.queue",
    retryable=False,
).SerializeToString()


class Reaper:
    """Expires leases, wakes delayed jobs, enforces timeouts the agents cannot."""

    def __init__(self, database: Database, leadership: Leadership, bells: Bells, now: datetime | None = None) -> None:
        """``now`` stands still for tests; None: the database's clock."""
        self._database = database
        self._leadership = leadership
        self._bells = bells
        self._now = now
        self._ticks = 0
        self._looked_epoch: int | None = None
        self._looked_clock_ms = 0
        self._expiries_since_look = 0

    async def run(self) -> None:
        """Reaps until cancelled; rests while another replica leads."""
        while True:
            await self._leadership.gained.wait()
            try:
                await self.step()
            except LessorServerError as error:
                logger.warning("the reaper waits for the database", extra={"event": "reaper", "error": error.message})
            await asyncio.sleep(timing.LEADER_TICK.total_seconds())

    async def step(self) -> None:
        """Looks once at everything that may be overdue.

        Raises:
            DatabaseUnavailable: The next step looks again.
        """
        epoch = self._leadership.epoch
        if epoch is None:
            return
        changed = await self._expire(epoch)
        changed |= bool(await self._database.fetch("promote", epoch=epoch, now=self._now))
        changed |= await self._time_out_queued(epoch)
        if self._ticks % _SLOW_CHECKS_EVERY == 0:
            offer_ttl_ms = timing.OFFER_TTL // _MS
            asked = await self._database.fetch("ask_back", epoch=epoch, now=self._now, offer_ttl_ms=offer_ttl_ms)
            finished = await finish_drained(self._database, now=self._now)
            self._ring_logs(finished)
            changed |= bool(asked or finished)
        self._ticks += 1
        if changed:
            self._bells.changed(waiting=True, fleet=True, leases=True)

    async def _expire(self, epoch: int) -> bool:
        any_expired = False
        while True:
            if self._look_is_due(epoch):
                await self._look_for_storm(epoch)
            self._expiries_since_look += 1
            if self._leadership.brake.holds:
                # Lease time stands still. What was due before it did waits as well: in a storm nobody's silence tells.
                return any_expired
            rows = await self._database.fetch(
                "expire",
                epoch=epoch,
                now=self._now,
                min_wait_ms=(timing.MIN_TTL + timing.margin(timing.MIN_TTL)) // _MS,
                max_leases=_MAX_LEASES_PER_STATEMENT,
                error=LEASE_EXPIRED,
            )
            for row in rows:
                logger.warning(
                    "a lease expired",
                    extra={"event": "expire", "job_number": row["job_id"], "lease_id": row["lease_id"]},
                )
            self._ring_logs({row["job_id"] for row in rows})
            if rows:
                any_expired = True
                self._bells.expiries.ring()
            if len(rows) < _MAX_LEASES_PER_STATEMENT:
                return any_expired

    def _look_is_due(self, epoch: int) -> bool:
        """Returns whether the sessions must be looked at before anything may expire.

        By lease time and not only by turns: however long a turn took, no lease goes from
        being heard of to being lost without a look in between.
        """
        return not self._leadership.brake.is_off and (
            epoch != self._looked_epoch
            or self._expiries_since_look >= _EXPIRIES_PER_LOOK
            or self._leadership.clock_ms - self._looked_clock_ms >= _LOOK_EVERY_MS
        )

    async def _look_for_storm(self, epoch: int) -> None:
        clock_ms = self._leadership.clock_ms
        (row,) = await self._database.fetch("count_silent", intervals=timing.SESSION_FRESH_INTERVALS, few=FEW)
        if self._leadership.epoch != epoch:
            # The next term looks for itself.
            return
        self._leadership.brake.see(row["silent"], row["holding"])
        self._looked_epoch, self._looked_clock_ms, self._expiries_since_look = epoch, clock_ms, 0

    async def _time_out_queued(self, epoch: int) -> bool:
        rows: list[asyncpg.Record] = await self._database.fetch(
            "time_out_queued",
            epoch=epoch,
            now=self._now,
            outcome=job_pb2.OUTCOME_TIMED_OUT,
            final_state=JobState.FAILED,
            error=QUEUE_TIMEOUT,
        )
        self._ring_logs({row["job_id"] for row in rows})
        return bool(rows)

    def _ring_logs(self, job_numbers: set[int]) -> None:
        for number in job_numbers:
            self._bells.logs.ring(number)
