"""The planning loop: look, plan, claim, tell. Only the leader runs it.

It plans on what it knows of the fleet and of the waiting jobs (:mod:`.picture`,
:mod:`.lines`); the claim checks under locks what may have changed. A new leader,
and one whose last claim has an unknown outcome, forgets both and reads anew.
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
from lessor_server.planner.cycle import plan_on
from lessor_server.planner.model import Grant, Policy
from lessor_server.services.lines import Lines
from lessor_server.services.picture import Picture
from lessor_server.sessions.delivery import Delivery
from lessor_server.store.claims import Offer, claim
from lessor_server.store.database import Database

logger = logging.getLogger(__name__)

_POLL_S = 1.0
_AFTER_TROUBLE_S = 0.25
_SOON_S = 0.001


class Planning:
    """Places waiting jobs while this replica leads."""

    def __init__(
        self,
        database: Database,
        leadership: Leadership,
        picture: Picture,
        lines: Lines,
        delivery: Delivery,
        bells: Bells,
        *,
        policy: Policy,
        now: datetime | None = None,
    ) -> None:
        """``policy`` is that of ``picture``. ``now`` stands still for tests; None: the database's clock."""
        self._database = database
        self._leadership = leadership
        self._picture = picture
        self._lines = lines
        self._delivery = delivery
        self._bells = bells
        self._policy = policy
        self._now = now
        self._term: int | None = None
        """The term that picture and lines belong to."""
        self._doubtful = False
        """A claim of this term has an unknown outcome."""
        self._blocked = False
        """Jobs found no room in the last cycle."""

    async def run(self) -> None:
        """Plans until cancelled; rests while another replica leads."""
        while True:
            await self._leadership.gained.wait()
            seen = self._bells.planning.count
            try:
                rest_s = await self.step()
            except LessorServerError as error:
                logger.warning("planning waits for the database", extra={"event": "plan", "error": error.message})
                await asyncio.sleep(_AFTER_TROUBLE_S)
                continue
            if rest_s > 0:
                await self._bells.planning.wait(seen, rest_s)

    async def step(self) -> float:
        """Runs one cycle. Returns after how many seconds another may place more, though no bell rings; 0: at once.

        Raises:
            DatabaseUnavailable: Nothing was placed, or the term was renewed so that it will not be.
        """
        if self._doubtful:
            await self._leadership.renew_term()
            self._doubtful = False
        epoch = self._leadership.epoch
        if epoch != self._term:
            self._picture.drop()
            self._lines.drop()
            self._term = epoch
        if epoch is None:
            return _POLL_S
        await self._look()
        if self._lines.empty:
            self._blocked = False
            return self._next_look_s()
        if (left_s := self._picture.settled_in_s()) > 0:
            self._blocked = True
            return min(left_s, self._next_look_s())
        return await self._plan(epoch)

    async def _look(self) -> None:
        """Reads what is due. A small fleet is read while nothing waits too: the first job need not wait for it."""
        if self._lines.due_in_s() == 0:
            await self._lines.read()
        if (self._picture.is_small or not self._lines.empty) and self._picture.due_in_s(blocked=self._blocked) == 0:
            await self._picture.read()

    def _next_look_s(self) -> float:
        due_s = self._lines.due_in_s()
        if self._picture.is_small or not self._lines.empty:
            due_s = min(due_s, self._picture.due_in_s(blocked=self._blocked))
        return min(_POLL_S, max(due_s, _SOON_S))

    async def _plan(self, epoch: int) -> float:
        groups = await self._lines.groups(self._policy.max_grants)
        ground, queues = self._picture.ground, self._picture.queues
        if ground is None or any(group.queue_id not in queues for group in groups):
            # A queue was made since.
            await self._picture.read()
            return 0
        planned = plan_on(ground, groups, queues, self._policy)
        self._blocked = bool(planned.unplaced)
        if not planned.grants:
            return self._next_look_s()
        rows = await self._claim(epoch, planned.grants)
        shapes = {group.shape_id: group.shape for group in groups}
        self._lines.granted(planned.grants, len(rows))
        self._picture.granted(planned.grants, {row["job_id"]: row["lease_id"] for row in rows}, shapes)
        if not rows:
            # All was cancelled, or the agents have said hello in between: planning
            # the same again at once would only spin.
            return self._next_look_s()
        self._delivery.grants(rows, asyncio.get_running_loop().time())
        for row in rows:
            self._bells.logs.ring(row["job_id"])
        # Those for agents of other replicas are delivered there.
        self._bells.changed()
        return self._next_look_s() if planned.complete and len(rows) == len(planned.grants) else 0

    async def _claim(self, epoch: int, grants: Sequence[Grant]) -> list[asyncpg.Record]:
        offers = [Offer(grant.job_id, grant.session_id, grant.epoch, grant.gpu_uuids) for grant in grants]
        try:
            return await claim(self._database, epoch, offers, self._now)
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
