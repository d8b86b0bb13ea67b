"""Lists of jobs by filter, newest first.

The driving table is chosen by the filter: filtering a view over all jobs takes
seconds where a walk along an index takes a millisecond.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import (
    CTE,
    BigInteger,
    Boolean,
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
from lessor_server.domain.states import TERMINAL, JobState
from lessor_server.store import tables as t
from lessor_server.store.database import Database
from lessor_server.store.job_queries import final_state_of, state_of
from lessor_server.store.partitions import day_of, day_of_job, first_job_at, job_bounds
from lessor_server.store.reads import of_some_days, rows_within

MAX_EXAMINED = 5_000
"""Jobs that one call of :func:`find_jobs` looks at, at most, per table."""

MAX_LOOKED_UP = 1_000
"""The same where a job is looked up in another table to know whether it matches, which costs four times as much."""

_SUBMIT_SLACK = timedelta(seconds=1)
"""A job's number is drawn after its submit_time is fixed, within the same statement."""

_DAWN, _DUSK = datetime(1970, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
"""No job is submitted outside of these; times beyond them have no job number."""

_FIRST, _BEYOND = 0, (1 << 63) - 1

_WEEK = 7


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
    def by_time(self) -> bool:
        """Whether it has bounds of the submit time."""
        return self.submitted_after is not None or self.submitted_before is not None

    @property
    def kind(self) -> FilterKind:
        """What decides which statement finds the jobs."""
        states = frozenset[JobState]() if self.states == frozenset(JobState) else self.states
        return FilterKind(states, self.queue_id is not None, bool(self.labels), bool(self.name), self.by_time)


@dataclass(frozen=True, slots=True)
class FilterKind:
    """What is filtered by, without the values. One statement for each."""

    states: frozenset[JobState]
    """Empty: all."""
    by_queue: bool
    by_labels: bool
    by_name: bool
    by_time: bool

    @property
    def drives_by_job(self) -> bool:
        """Whether the list is read from ``job`` itself, which holds what jobs are, but not where they stand."""
        # Nearly all jobs have succeeded: to filter them by what they are is to look at them all.
        mostly = JobState.SUCCEEDED in self.states and (self.by_queue or self.by_labels or self.by_name)
        return not self.states or mostly

    @property
    def examine(self) -> int | None:
        """How many jobs a call looks at, at most; None: every one that it looks at matches."""
        by_attributes = self.by_labels or self.by_name or self.by_time
        if not self.states:
            return MAX_EXAMINED if by_attributes else None
        # Attempts do not tell the queue.
        if self.drives_by_job or by_attributes or (self.by_queue and self.states & TERMINAL):
            return min(MAX_LOOKED_UP, MAX_EXAMINED)
        return MAX_EXAMINED if self.by_queue or JobState.SUCCEEDED in self.states else None


@dataclass(frozen=True, slots=True)
class Found:
    """One page of job numbers."""

    numbers: list[int]
    """Newest first."""
    resume_before: int | None
    """Jobs older than this number are still to be looked at; None: there are none."""


def _bounds(column: ColumnElement[int]) -> ColumnElement[bool]:
    return and_(
        of_some_days(column),
        column < bindparam("before", type_=BigInteger),
        column >= bindparam("lowest", type_=BigInteger),
    )


def _limited(query: Select[Any], number: ColumnElement[int]) -> Select[Any]:
    return query.where(_bounds(number)).order_by(number.desc()).limit(bindparam("examine", type_=Integer))


_FITS = literal_column("true", Boolean).label("fits")


def _sources(states: frozenset[JobState]) -> list[Select[Any]]:
    """One bounded, ordered walk per table that holds jobs of these states; none holds a job twice.

    Their columns are id, queue_id (NULL: not known) and fits (whether the job is in one of the states).
    """
    found: list[Select[Any]] = []
    if JobState.QUEUED in states:
        for table in (t.ready, t.delayed):
            found.append(_limited(select(table.c.job_id.label("id"), table.c.queue_id, _FITS), table.c.job_id))
    if states & {JobState.LEASED, JobState.RUNNING}:
        query = select(t.lease.c.job_id.label("id"), t.lease.c.queue_id, _FITS).where(t.lease.c.member == 0)
        if JobState.RUNNING not in states:
            query = query.where(t.lease.c.phase <= int(LeasePhase.ACCEPTED))
        if JobState.LEASED not in states:
            query = query.where(t.lease.c.phase >= int(LeasePhase.RUNNING))
        found.append(_limited(query, t.lease.c.job_id))
    number, final_state = t.attempt.c.job_id, t.attempt.c.final_state
    no_queue = cast(null(), Integer).label("queue_id")
    if JobState.SUCCEEDED in states:
        fits = final_state.in_(_listed(states & TERMINAL)).label("fits")
        found.append(_limited(select(number.label("id"), no_queue, fits).where(final_state.is_not(None)), number))
        return found
    for state in sorted(states & TERMINAL):
        # A literal: the index is partial, and a parameter would not prove that it applies.
        ended = select(number.label("id"), no_queue, _FITS).where(final_state == literal_column(str(int(state))))
        found.append(_limited(ended, number))
    return found


def _listed(states: frozenset[JobState]) -> list[ColumnElement[int]]:
    return [literal_column(str(int(state)), Integer) for state in sorted(states)]


def _merged(sources: Sequence[Select[Any]]) -> Select[Any]:
    if len(sources) == 1:
        return sources[0]
    branches = [select(source.subquery()) for source in sources]
    union: CompoundSelect[Any] = union_all(*branches)
    merged = union.subquery("merged")
    return select(merged).order_by(merged.c.id.desc()).limit(bindparam("examine", type_=Integer))


def _of_job(number: ColumnElement[int], what: ColumnElement[Any]) -> ColumnElement[Any]:
    """``what`` of the job ``number``, looked up row by row, so that a walk stops where the page is full."""
    return select(what).where(t.job.c.id == number, _bounds(t.job.c.id)).scalar_subquery()


def _rules(kind: FilterKind) -> list[ColumnElement[bool]]:
    """What must hold of a row of ``job``, its queue apart."""
    rules: list[ColumnElement[bool]] = []
    if kind.by_labels:
        rules.append(t.job.c.labels.contains(bindparam("labels", type_=JSONB)))
    if kind.by_name:
        rules.append(t.job.c.name == bindparam("name", type_=Text))
    if kind.by_time:
        at = t.job.c.submitted_at
        rules.append(func.coalesce(at >= bindparam("after", type_=TIMESTAMP(timezone=True)), literal_column("true")))
        rules.append(func.coalesce(at < bindparam("until", type_=TIMESTAMP(timezone=True)), literal_column("true")))
    return rules


def _jobs_walked(kind: FilterKind) -> tuple[CTE, list[ColumnElement[bool]]]:
    """Returns a walk along ``job`` and what must hold of its rows."""
    rules = _rules(kind)
    walk = select(t.job.c.id, (and_(*rules) if rules else literal_column("true", Boolean)).label("fits"))
    if kind.by_queue:
        walk = walk.where(t.job.c.queue_id == bindparam("queue_id", type_=Integer))
    examined = _limited(walk, t.job.c.id).cte("examined")
    passes: list[ColumnElement[bool]] = [examined.c.fits] if rules else []
    if kind.states:
        state = final_state_of if kind.states <= TERMINAL else state_of
        passes.append(state(examined.c.id, _bounds).in_(_listed(kind.states)))
    return examined, passes


def _places_walked(kind: FilterKind) -> tuple[CTE, list[ColumnElement[bool]]]:
    """Returns a walk along the tables in which jobs of these states stand, and what must hold of its rows."""
    examined = _merged(_sources(kind.states)).cte("examined")
    number: ColumnElement[int] = examined.c.id
    passes: list[ColumnElement[bool]] = [examined.c.fits] if JobState.SUCCEEDED in kind.states else []
    if kind.by_queue:
        of_queue = func.coalesce(examined.c.queue_id, _of_job(number, t.job.c.queue_id))
        passes.append(of_queue == bindparam("queue_id", type_=Integer))
    if rules := _rules(kind):
        passes.append(_of_job(number, and_(*rules)))
    return examined, passes


@cache
def find_query(kind: FilterKind) -> CompoundSelect[Any]:
    """The statement of :func:`find_jobs` for one kind of filter, for one span of days.

    It walks the ids of the driving tables, newest first, ``examine`` at most, and
    stops when ``wanted`` of them pass. Its last row (id NULL) tells how far the
    walk came when it did not find that many. Both look at one walk, which is
    kept in the order it was made; nothing after it sorts.
    """
    examined, passes = _jobs_walked(kind) if kind.drives_by_job else _places_walked(kind)
    number: ColumnElement[int] = examined.c.id
    found = select(number.label("id")).where(*passes).limit(bindparam("wanted", type_=Integer)).cte("found")
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
        "examine": page_size + 1 if wanted.kind.examine is None else wanted.kind.examine,
    }
    if wanted.queue_id is not None:
        parameters["queue_id"] = wanted.queue_id
    if wanted.labels:
        parameters["labels"] = json.dumps(dict(wanted.labels))
    if wanted.name:
        parameters["name"] = wanted.name
    if wanted.by_time:
        parameters["after"] = wanted.submitted_after
        parameters["until"] = wanted.submitted_before
    return parameters


def query_for(wanted: JobFilter) -> CompoundSelect[Any]:
    """Returns the statement that finds ``wanted``."""
    return find_query(wanted.kind)


async def find_jobs(
    database: Database, wanted: JobFilter, before: int | None, page_size: int, now: datetime | None = None
) -> Found:
    """Returns the numbers of the newest jobs that match, at most ``page_size`` (>= 1), older than ``before``.

    Looks at a bounded number of jobs: the page may be short, even empty, while
    there is more to look at. Each span of days that it has to look at is a
    snapshot of its own. ``now`` is where most lists begin; None: this host's clock.
    """
    parameters = find_parameters(wanted, before, page_size)
    today = day_of(now or datetime.now(UTC))
    numbers: list[int] = []
    for first, beyond in _spans(parameters["before"], parameters["lowest"], today):
        rows = await rows_within(database, query_for(wanted), parameters, first, beyond)
        numbers += sorted((row[0] for row in rows if row[0] is not None), reverse=True)
        if len(numbers) > page_size:
            return Found(numbers[:page_size], numbers[page_size - 1])
        reached, walked = next((row[1], row[2]) for row in rows if row[0] is None)
        if walked == parameters["examine"]:
            return Found(numbers, reached)
        parameters["examine"] -= walked
        parameters["wanted"] = page_size + 1 - len(numbers)
    return Found(numbers, None)


def _spans(before: int, lowest: int, today: int) -> Iterator[tuple[int, int]]:
    """Yields the bounds of spans that together hold all numbers from ``lowest`` to ``before``, newest first.

    First a day, which fills most pages, then a week, then all the rest. A
    statement is planned for each, so they are whole days: others look at the same.
    """
    if before <= lowest:
        return
    newest = min(day_of_job(before - 1), today)
    first, beyond = job_bounds(newest)
    # Jobs of the days to come, by this clock, are those of a database whose clock is ahead.
    yield first, beyond if before <= beyond else _BEYOND
    week_before = job_bounds(newest - _WEEK)[0]
    for earlier in (week_before, _FIRST):
        if first <= lowest:
            return
        yield earlier, first
        first = earlier
