"""Lists of jobs by filter, newest first.

The driving table is chosen by the states asked for: filtering a view over all
jobs takes seconds where a walk along an index takes a millisecond.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Integer,
    Select,
    Text,
    and_,
    bindparam,
    cast,
    func,
    literal_column,
    null,
    select,
    union_all,
)
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP
from sqlalchemy.sql.selectable import CompoundSelect

from lessor.lifecycle import LeasePhase
from lessor_server.domain.states import JobState
from lessor_server.store import tables as t
from lessor_server.store.database import Database
from lessor_server.store.job_queries import state_of
from lessor_server.store.partitions import first_job_at
from lessor_server.store.reads import rows

MAX_EXAMINED = 5_000
"""Jobs that one call of :func:`find_jobs` looks at, at most, per table."""

_SUBMIT_SLACK = timedelta(seconds=1)
"""A job's number is drawn after its submit_time is fixed, within the same statement."""

_DAWN, _DUSK = datetime(1970, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
"""No job is submitted outside of these; times beyond them have no job number."""

_FIRST, _BEYOND = 0, (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs to find; all that is given must hold."""

    states: frozenset[JobState] = frozenset()
    """Any of these; empty: all."""
    queue_id: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    name: str = ""
    submitted_after: datetime | None = None
    """At or after."""
    submitted_before: datetime | None = None

    @property
    def residual(self) -> bool:
        """Whether rows of the driving tables may have to be passed over."""
        by_state = JobState.SUCCEEDED in self.states and self.states != frozenset(JobState)
        by_queue = self.queue_id is not None and not self.drives_by_job
        by_time = self.submitted_after is not None or self.submitted_before is not None
        return bool(self.labels or self.name or by_state or by_queue or by_time)

    @property
    def drives_by_job(self) -> bool:
        """Whether the list is read from ``job`` itself: no smaller table holds the jobs that succeeded."""
        return not self.states or JobState.SUCCEEDED in self.states


@dataclass(frozen=True, slots=True)
class Found:
    """One page of job numbers."""

    numbers: list[int]
    """Newest first."""
    resume_before: int | None
    """Jobs older than this number are still to be looked at; None: there are none."""


def _bounds(column: ColumnElement[int]) -> ColumnElement[bool]:
    return and_(
        column < bindparam("before", type_=BigInteger),
        column >= bindparam("lowest", type_=BigInteger),
    )


def _limited(query: Select[Any], number: ColumnElement[int]) -> Select[Any]:
    return query.where(_bounds(number)).order_by(number.desc()).limit(bindparam("examine", type_=Integer))


def _sources(states: frozenset[JobState]) -> list[Select[Any]]:
    """One bounded, ordered walk per table that holds jobs of these states; none holds a job twice."""
    found: list[Select[Any]] = []
    if JobState.QUEUED in states:
        for table in (t.ready, t.delayed):
            found.append(_limited(select(table.c.job_id.label("id"), table.c.queue_id), table.c.job_id))
    if states & {JobState.LEASED, JobState.RUNNING}:
        query = select(t.lease.c.job_id.label("id"), t.lease.c.queue_id).where(t.lease.c.member == 0)
        if JobState.RUNNING not in states:
            query = query.where(t.lease.c.phase <= int(LeasePhase.ACCEPTED))
        if JobState.LEASED not in states:
            query = query.where(t.lease.c.phase >= int(LeasePhase.RUNNING))
        found.append(_limited(query, t.lease.c.job_id))
    for state in sorted(states & {JobState.FAILED, JobState.CANCELLED}):
        # A literal: the index is partial, and a parameter would not prove that it applies.
        ended = select(t.attempt.c.job_id.label("id"), cast(null(), Integer).label("queue_id")).where(
            t.attempt.c.final_state == literal_column(str(int(state)))
        )
        found.append(_limited(ended, t.attempt.c.job_id))
    return found


def _merged(sources: Sequence[Select[Any]]) -> Select[Any]:
    if len(sources) == 1:
        return sources[0]
    branches = [select(source.subquery()) for source in sources]
    union: CompoundSelect[Any] = union_all(*branches)
    merged = union.subquery("merged")
    return select(merged).order_by(merged.c.id.desc()).limit(bindparam("examine", type_=Integer))


def _of_job(number: ColumnElement[int], what: ColumnElement[Any]) -> ColumnElement[Any]:
    """``what`` of the job ``number``, looked up row by row, so that a walk stops where the page is full."""
    return select(what).where(t.job.c.id == number).scalar_subquery()


@cache
def find_query(
    states: frozenset[JobState], by_queue: bool, by_labels: bool, by_name: bool, by_time: bool
) -> CompoundSelect[Any]:
    """The statement of :func:`find_jobs` for one kind of filter.

    It walks the ids of the driving tables, newest first, ``examine`` at most, and
    stops when ``wanted`` of them pass. Its last row (id NULL) tells how far the
    walk came when it did not find that many. Both look at one walk, which is
    kept in the order it was made; nothing after it sorts.
    """
    driven_by_job = not states or JobState.SUCCEEDED in states
    if driven_by_job:
        walk = select(t.job.c.id, t.job.c.queue_id)
        if by_queue:
            walk = walk.where(t.job.c.queue_id == bindparam("queue_id", type_=Integer))
        walk = _limited(walk, t.job.c.id)
    else:
        walk = _merged(_sources(states))
    examined = walk.cte("examined")
    number: ColumnElement[int] = examined.c.id
    passing = select(number.label("id"))
    if by_queue and not driven_by_job:
        of_queue = func.coalesce(examined.c.queue_id, _of_job(number, t.job.c.queue_id))
        passing = passing.where(of_queue == bindparam("queue_id", type_=Integer))
    rules: list[ColumnElement[bool]] = []
    if by_labels:
        rules.append(t.job.c.labels.contains(bindparam("labels", type_=JSONB)))
    if by_name:
        rules.append(t.job.c.name == bindparam("name", type_=Text))
    if by_time:
        at = t.job.c.submitted_at
        rules.append(func.coalesce(at >= bindparam("after", type_=TIMESTAMP(timezone=True)), True))
        rules.append(func.coalesce(at < bindparam("until", type_=TIMESTAMP(timezone=True)), True))
    if rules:
        passing = passing.where(_of_job(number, and_(*rules)))
    if states and driven_by_job and states != frozenset(JobState):
        listed = [literal_column(str(int(state)), Integer) for state in sorted(states)]
        passing = passing.where(state_of(number).in_(listed))
    found = passing.limit(bindparam("wanted", type_=Integer)).cte("found")
    too_few = select(func.count()).select_from(found).scalar_subquery() < bindparam("wanted", type_=Integer)
    reach = select(
        cast(null(), BigInteger), func.min(number).label("reached"), func.count(number).label("walked")
    ).where(too_few)
    return union_all(select(found.c.id, cast(null(), BigInteger), cast(null(), BigInteger)), reach)


def _clamped(at: datetime) -> datetime:
    return min(max(at, _DAWN), _DUSK)


def find_parameters(wanted: JobFilter, before: int | None, page_size: int) -> dict[str, Any]:
    """Returns the parameters of :func:`find_query`."""
    lowest, highest = _FIRST, _BEYOND
    if wanted.submitted_after is not None:
        lowest = first_job_at(_clamped(wanted.submitted_after))
    if wanted.submitted_before is not None:
        highest = first_job_at(_clamped(wanted.submitted_before) + _SUBMIT_SLACK)
    parameters: dict[str, Any] = {
        "before": min(highest, _BEYOND if before is None else before),
        "lowest": lowest,
        "wanted": page_size + 1,
        "examine": MAX_EXAMINED if wanted.residual else page_size + 1,
    }
    if wanted.queue_id is not None:
        parameters["queue_id"] = wanted.queue_id
    if wanted.labels:
        parameters["labels"] = dict(wanted.labels)
    if wanted.name:
        parameters["name"] = wanted.name
    if wanted.submitted_after is not None or wanted.submitted_before is not None:
        parameters["after"] = wanted.submitted_after
        parameters["until"] = wanted.submitted_before
    return parameters


def query_for(wanted: JobFilter) -> CompoundSelect[Any]:
    """Returns the statement that finds ``wanted``."""
    by_time = wanted.submitted_after is not None or wanted.submitted_before is not None
    return find_query(wanted.states, wanted.queue_id is not None, bool(wanted.labels), bool(wanted.name), by_time)


async def find_jobs(database: Database, wanted: JobFilter, before: int | None, page_size: int) -> Found:
    """Returns the numbers of the newest jobs that match, at most ``page_size`` (>= 1), older than ``before``.

    Looks at a bounded number of jobs: the page may be short, even empty, while
    there is more to look at.
    """
    parameters = find_parameters(wanted, before, page_size)
    found = await rows(database, query_for(wanted), parameters)
    numbers = sorted((row[0] for row in found if row[0] is not None), reverse=True)
    if len(numbers) > page_size:
        return Found(numbers[:page_size], numbers[page_size - 1])
    reached, walked = next((row[1], row[2]) for row in found if row[0] is None)
    walked_all = walked < parameters["examine"]
    return Found(numbers, None if walked_all else reached)
