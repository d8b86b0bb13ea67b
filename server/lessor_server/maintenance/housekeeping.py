"""Housekeeping: partitions made ahead, old data dropped, leftovers removed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import asyncpg

from lessor_server.domain.errors import LessorServerError
from lessor_server.maintenance.leadership import Leadership
from lessor_server.store.database import Database, guarded
from lessor_server.store.partitions import drop_partition, ensure_partitions, expired_partitions

logger = logging.getLogger(__name__)

_EVERY_S = 600.0


@dataclass(frozen=True, slots=True)
class Retention:
    """How long what has ended is kept."""

    jobs: timedelta = timedelta(days=90)
    """Jobs, attempts and dedupe keys, counted from the submit; a day at a time."""
    requests: timedelta = timedelta(days=7)
    """request_ids, so that a repeated submit finds its job."""
    events: timedelta = timedelta(days=1)
    """Changes, so that a watcher can resume."""
    agents: timedelta = timedelta(days=30)
    """Agents that have not connected since and hold nothing."""


# Each statement looks at a bounded number of rows and is run until it finds none.
_REQUESTS = """
DELETE FROM request WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM request WHERE created_at < COALESCE($1::timestamptz, now()) - $2::interval LIMIT 10000
))
"""
_EVENTS = """
WITH old AS MATERIALIZED (
    SELECT xid, id FROM event WHERE at < COALESCE($1::timestamptz, now()) - $2::interval ORDER BY xid, id LIMIT 10000
),
gone AS (
    DELETE FROM event AS e USING old WHERE e.xid = old.xid AND e.id = old.id RETURNING e.xid, e.id
)
UPDATE event_floor AS f SET xid = last.xid, id = last.id
FROM (SELECT xid, id FROM gone ORDER BY xid DESC, id DESC LIMIT 1) AS last
"""
_DEDUPE = """
DELETE FROM dedupe AS d WHERE (d.queue_id, d.key) IN (
    SELECT k.queue_id, k.key
    FROM dedupe AS k
    JOIN attempt AS a ON a.job_id = k.job_id AND a.final_state IS NOT NULL
    WHERE k.job_id < (extract(epoch FROM COALESCE($1::timestamptz, now()) - $2::interval) * 1000)::bigint << 21
    LIMIT 10000
)
"""
_CHECKPOINTS = """
DELETE FROM checkpoint AS c WHERE c.job_id = ANY (ARRAY(
    SELECT c.job_id FROM checkpoint AS c
    JOIN attempt AS a ON a.job_id = c.job_id AND a.final_state IS NOT NULL
    LIMIT 10000
))
"""
_SESSIONS = """
DELETE FROM session AS s WHERE s.id = ANY (ARRAY(
    SELECT s.id FROM session AS s
    CROSS JOIN leader
    -- One that spoke a day ago may still bring a late end.
    WHERE s.renewed_at + 86400000 < leader.clock
        AND NOT EXISTS (SELECT FROM agent AS a WHERE a.session_id = s.id)
        AND NOT EXISTS (SELECT FROM lease AS l WHERE l.session_id = s.id)
    LIMIT 10000
))
"""
_AGENTS = """
DELETE FROM agent AS a WHERE a.id = ANY (ARRAY(
    SELECT a.id FROM agent AS a
    JOIN session AS s ON s.id = a.session_id
    CROSS JOIN leader AS l
    WHERE a.connected_at < COALESCE($1::timestamptz, now()) - $2::interval
        AND s.renewed_at + 1000 * extract(epoch FROM $2::interval) < l.clock
        AND NOT EXISTS (
            SELECT FROM session AS t JOIN lease AS e ON e.session_id = t.id WHERE t.agent_id = a.id
        )
    LIMIT 1000
))
-- Looked at again under the lock: an agent that says hello meanwhile stays.
AND a.connected_at < COALESCE($1::timestamptz, now()) - $2::interval
"""


class Housekeeping:
    """Keeps the store in order while this replica leads."""

    def __init__(
        self, database: Database, leadership: Leadership, retention: Retention, now: datetime | None = None
    ) -> None:
        """``now`` stands still for tests; None: the database's clock."""
        self._database = database
        self._leadership = leadership
        self._retention = retention
        self._now = now

    async def run(self) -> None:
        """Works now and every ten minutes, until cancelled."""
        while True:
            await self._leadership.gained.wait()
            try:
                await self.step()
            except LessorServerError as error:
                logger.warning("housekeeping waits for the database", extra={"event": "keep", "error": error.message})
            except asyncpg.PostgresError as error:
                logger.warning("housekeeping was refused", extra={"event": "keep", "error": str(error)})
            await asyncio.sleep(_EVERY_S)

    async def step(self) -> None:
        """Does all of it once.

        Raises:
            DatabaseUnavailable: What was done stands.
        """

        # First, because a key keeps the whole day of its job.
        await self._repeat(_DEDUPE, self._now, self._retention.jobs)

        async def partitions() -> None:
            async with self._database.pool.acquire() as connection:
                await ensure_partitions(connection, self._now)
                for names in await expired_partitions(connection, self._retention.jobs, self._now):
                    await _drop_day(connection, names)

        await guarded(partitions)
        await self._repeat(_REQUESTS, self._now, self._retention.requests)
        await self._repeat(_EVENTS, self._now, self._retention.events)
        await self._repeat(_CHECKPOINTS)
        await self._repeat(_AGENTS, self._now, self._retention.agents)
        await self._repeat(_SESSIONS)

    async def _repeat(self, text: str, *arguments: object) -> None:
        async def run() -> str:
            return await self._database.pool.execute(text, *arguments)

        while not (await guarded(run)).endswith(" 0"):
            pass


async def _drop_day(connection: asyncpg.Connection | Any, partitions: Sequence[tuple[str, str]]) -> None:
    """Drops one day of tables that belong together, in order; a reader in the way leaves the rest for the next time.

    Jobs go before their attempts: a job whose attempts are gone would stand nowhere.
    """
    for table, name in partitions:
        try:
            await drop_partition(connection, table, name)
        except asyncpg.PostgresError as error:
            # A reader in the way, most likely; the other days and the next time are not its concern.
            fields = {"event": "drop", "partition": name, "error": str(error)}
            logger.info("a partition cannot be dropped yet", extra=fields)
            return
        logger.info("a partition was dropped", extra={"event": "drop", "partition": name})
