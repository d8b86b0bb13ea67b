"""The waiting jobs as the leader knows them: one line per queue and shape, between two reads of the database.

What is submitted on this replica joins its line at once; anything else that
makes jobs wait (a retry, another replica's submit) has the lines read anew. A
line may miss a job for as long as the next read is away, and may hold one that
was cancelled or taken: the claim leaves that out.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lessor_server.bells import Bells
from lessor_server.planner.model import Candidate, Grant, Group
from lessor_server.services.reading import Reading
from lessor_server.store.catalog import Catalog
from lessor_server.store.database import Database
from lessor_server.store.fleet_queries import load_groups

_READ_CANDIDATES = 20_000
"""Of all lines together, as far as each gets its least."""
_READ_PER_LINE = (20, 5000)
"""Candidates read of a line: at least, at most."""
_LONGEST_LINE = 20_000
"""A line that grows longer is cut to half; the rest is read when its turn comes."""
_REST = 5
"""A read is followed by a rest of so many times what it took."""


class Arrival(NamedTuple):
    """A job that was just stored as waiting."""

    job_id: int
    queue_id: int
    shape_id: int
    priority: int


class _Line:
    """Waiting jobs of one queue and shape, in the order they go."""

    __slots__ = ("candidates", "complete")

    def __init__(self, candidates: list[Candidate], *, complete: bool) -> None:
        self.candidates = candidates
        self.complete = complete
        """It holds all that wait; else more are in the database, behind the last."""

    def join(self, candidate: Candidate) -> None:
        order, line = candidate.order, self.candidates
        if line and order <= line[-1].order:
            place = bisect_left(line, order, key=lambda other: other.order)
            if line[place].job_id != candidate.job_id:
                line.insert(place, candidate)
        elif self.complete:
            line.append(candidate)
        if len(line) > _LONGEST_LINE:
            del line[_LONGEST_LINE // 2 :]
            self.complete = False


class Lines:
    """All lines. Used by the planning task alone, but for :meth:`arrived`."""

    def __init__(self, database: Database, catalog: Catalog, bells: Bells) -> None:
        self._database = database
        self._catalog = catalog
        self._bells = bells
        self._lines: dict[tuple[int, int], _Line] | None = None
        """None: nothing is known."""
        self._arrived_meanwhile: list[Arrival] | None = None
        """While a read is under way: it may or may not find them."""
        self._stale = True
        self._waiting_seen = 0
        self._reading = Reading()
        self._count = 0

    def drop(self) -> None:
        """Forgets everything: another replica led meanwhile, or a claim has an unknown outcome."""
        self._lines = None

    def arrived(self, arrivals: Iterable[Arrival]) -> None:
        """Takes jobs that were just committed here, and wakes the planner."""
        if self._arrived_meanwhile is not None:
            self._arrived_meanwhile.extend(arrivals)
        elif self._lines is not None:
            self._join(arrivals)
        self._bells.planning.ring()

    def _join(self, arrivals: Iterable[Arrival]) -> None:
        assert self._lines is not None
        lines = self._lines
        key, line = (0, 0), None
        for job_id, queue_id, shape_id, priority in arrivals:
            if line is None or key != (queue_id, shape_id):
                key = (queue_id, shape_id)
                line = lines.get(key)
                if line is None:
                    line = lines[key] = _Line([], complete=True)
            line.join(Candidate(job_id, priority, job_id))

    @property
    def empty(self) -> bool:
        """Nothing is known to wait."""
        return not self._lines

    def due_in_s(self) -> float:
        """Returns in how many seconds the lines are to be read anew; 0: now."""
        if self._lines is None:
            return 0.0
        stale = self._stale or self._bells.waiting.count != self._waiting_seen
        return self._reading.due_in_s(stale=stale, rest=_REST)

    async def read(self) -> None:
        """Reads what waits.

        Raises:
            DatabaseUnavailable: The lines stay as they were.
        """
        self._waiting_seen = self._bells.waiting.count
        self._stale = False
        self._arrived_meanwhile = []
        least, most = _READ_PER_LINE
        per_line = min(max(_READ_CANDIDATES // max(1, self._count), least), most)
        try:
            with self._reading.timed():
                groups = await load_groups(self._database, self._catalog, per_line)
            self._lines = {
                (group.queue_id, group.shape_id): _Line(
                    list(group.candidates), complete=group.waiting <= len(group.candidates)
                )
                for group in groups
            }
        finally:
            arrived, self._arrived_meanwhile = self._arrived_meanwhile, None
            if self._lines is not None:
                self._join(arrived)
        self._count = len(self._lines)

    async def groups(self, per_group: int) -> list[Group]:
        """Returns the lines for the planner, the first ``per_group`` jobs of each."""
        lines = self._lines or {}
        shapes = await self._catalog.shapes({shape_id for _, shape_id in lines})
        return [
            Group(
                queue_id,
                shape_id,
                shapes[shape_id],
                tuple(line.candidates[:per_group]),
                len(line.candidates) + (not line.complete),
            )
            for (queue_id, shape_id), line in lines.items()
        ]

    def granted(self, grants: Sequence[Grant], claimed: int) -> None:
        """Takes planned jobs out of their lines.

        Args:
            grants: As planned: the first of each line.
            claimed: How many the claim gave; where some are missing, the lines are read anew.
        """
        self._stale = self._stale or claimed < len(grants)
        if self._lines is None:
            return
        counts: dict[tuple[int, int], int] = {}
        for grant in grants:
            key = (grant.queue_id, grant.shape_id)
            counts[key] = counts.get(key, 0) + 1
        planned = {grant.job_id for grant in grants}
        for key, count in counts.items():
            line = self._lines[key]
            # Jobs that joined since the plan was made may stand between them.
            head = line.candidates[:count]
            if all(candidate.job_id in planned for candidate in head):
                del line.candidates[:count]
            else:
                line.candidates = [c for c in line.candidates if c.job_id not in planned]
            if not line.candidates:
                self._stale = self._stale or not line.complete
                del self._lines[key]
