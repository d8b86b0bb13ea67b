"""The planning loop: read, plan, claim, tell. Only the leader runs it.

Everything a cycle needs is read anew from the database, so a new leader, or one
whose last claim has an unknown outcome, has nothing to rebuild.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from datetime import datetime

import asyncpg

from lessor_server.bells import Bells
from lessor_server.domain.errors import DatabaseUnavailable, LessorServerError
from lessor_server.maintenance.leadership import Leadership
from lessor_server.planner.cycle import plan
from lessor_server.planner.model import Grant, Policy
from lessor_server.sessions.delivery import Delivery
from lessor_server.store.catalog import Catalog
from lessor_server.store.database import Database
from lessor_server.store.fleet_queries import load_fleet, load_groups, load_queues

logger = logging.getLogger(__name__)

_POLL_S = 1.0
_CANDIDATES_PER_GROUP = 500
_AFTER_TROUBLE_S = 0.25


class Planning:
    """Places waiting jobs while this replica leads."""

    def __init__(
        self,
        database: Database,
        catalog: Catalog,
        leadership: Leadership,
        delivery: Delivery,
        bells: Bells,
        *,
        policy: Policy | None = None,
        now: datetime | None = None,
    ) -> None:
        """``now`` stands still for tests; None: the database's clock."""
        self._database = database
        self._catalog = catalog
        self._leadership = leadership
        self._delivery = delivery
        self._bells = bells
        self._policy = policy or Policy()
        self._now = now
        self._doubtful = False
        """A claim of this term has an unknown outcome."""

    async def run(self) -> None:
        """Plans until cancelled; rests while another replica leads."""
        while True:
            await self._leadership.gained.wait()
            seen = self._bells.planning.count
            try:
                more = await self.step()
            except LessorServerError as error:
                logger.warning("planning waits for the database", extra={"event": "plan", "error": error.message})
                await asyncio.sleep(_AFTER_TROUBLE_S)
                continue
            if not more:
                await self._bells.planning.wait(seen, _POLL_S)

    async def step(self) -> bool:
        """Runs one cycle. Returns whether another may place more at once.

        Raises:
            DatabaseUnavailable: Nothing was placed, or the term was renewed so that it will not be.
        """
        if self._doubtful:
            await self._leadership.renew_term()
            self._doubtful = False
        epoch = self._leadership.epoch
        if epoch is None:
            return False
        groups = await load_groups(self._database, self._catalog, _CANDIDATES_PER_GROUP)
        if not groups:
            return False
        queues = await load_queues(self._database)
        fleet = await load_fleet(self._database)
        planned = plan(fleet, groups, queues, self._policy)
        if not planned.grants:
            return False
        rows = await self._claim(epoch, planned.grants)
        if rows:
            self._delivery.grants(rows, asyncio.get_running_loop().time())
            for row in rows:
                self._bells.logs.ring(row["job_id"])
            # Those for agents of other replicas are delivered there.
            self._bells.changed(room=False)
        # What did not come back was cancelled, is being cancelled, or its agent
        # said hello in between. Where nothing came back, planning the same again
        # at once would only spin.
        return bool(rows) and (not planned.complete or len(rows) < len(planned.grants))

    async def _claim(self, epoch: int, grants: Sequence[Grant]) -> list[asyncpg.Record]:
        try:
            return await self._database.fetch(
                "claim",
                epoch=epoch,
                now=self._now,
                job_ids=[g.job_id for g in grants],
                session_ids=[g.session_id for g in grants],
                epochs=[g.epoch for g in grants],
                gpu_uuids=[",".join(g.gpu_uuids) for g in grants],
            )
        except DatabaseUnavailable:
            # It may still commit: in a new term it cannot, and the next cycle reads what is so.
            self._doubtful = True
            raise
        except asyncpg.UniqueViolationError:
            # A job or a GPU that the plan took for free is held: never store it, say so
            # loudly, and plan anew on what is there.
            logger.exception("a plan would have given something twice", extra={"event": "claim_refused"})
            self._doubtful = True
            return []
