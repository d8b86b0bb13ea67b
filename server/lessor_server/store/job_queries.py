"""Reads of jobs: where they stand, and their attempts.

A job's state is the table it stands in, so every read of a job is one statement
over all of them: one snapshot, in which exactly one of them has the job. What is
kept by lease (progress, how far a log goes) is read apart: only the lease tells
in which day's partition it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Integer,
    Select,
    SmallInteger,
    Table,
    Text,
    case,
    cast,
    func,
    literal_column,
    null,
    select,
    true,
    union_all,
)
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.sql.selectable import LateralFromClause

from lessor.lifecycle import LeasePhase
from lessor_server.domain.states import JobState
from lessor_server.store import tables as t
from lessor_server.store.database import Database
from lessor_server.store.partitions import day_of_job, day_of_lease, job_bounds, lease_bounds
from lessor_server.store.reads import Within, asked_for, of_any_day, rows_by_day


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job and where it stands, read in one snapshot.

    Three lots of columns, each NULL as a whole when the job has no such row:
    what it waits as (``waiting_…``), its live lease (``live_…``), the row that
    made it terminal (``final_…``), and the last attempt that ended (``last_…``).
    """

    number: int
    spec: bytes
    submitted_at: datetime
    retry_of: int | None
    waiting_attempts: int | None
    waiting_failures: int | None
    waiting_losses: int | None
    not_before: datetime | None
    """Set only while a retry waits for its backoff."""
    live_lease_id: int | None
    live_attempt: int | None
    live_phase: int | None
    live_failures: int | None
    live_losses: int | None
    live_agent: str | None
    live_gpu_uuids: list[str] | None
    live_started_at: datetime | None
    live_cancel_requested: bool | None
    final_state: int | None
    final_attempt: int | None
    final_failures: int | None
    final_losses: int | None
    final_outcome: int | None
    final_exit_code: int | None
    final_signal: int | None
    final_error: bytes | None
    final_result: bytes | None
    final_ended_at: datetime | None
    last_lease_id: int | None
    last_outcome: int | None
    last_exit_code: int | None
    last_signal: int | None
    last_error: bytes | None
    last_agent: str | None
    last_gpu_uuids: list[str] | None
    last_started_at: datetime | None
    progress_fraction: float | None
    progress_message: str | None
    progress_metrics: dict[str, float] | None
    progress_updated_at: datetime | None


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """One attempt of a job, ended or live."""

    attempt: int
    lease_id: int
    phase: int
    outcome: int | None
    agent: str | None
    gpu_uuids: list[str]
    granted_at: datetime | None
    started_at: datetime | None
    ended_at: datetime | None
    exit_code: int | None
    signal: int
    error: bytes | None
    log_bytes: int
    logs_truncated_at: int | None
    result: bytes | None


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a job stands, and no more."""

    number: int
    state: JobState
    attempt: int


def final_state_of(number: ColumnElement[int], within: Within | None = None) -> ColumnElement[int]:
    """The terminal state of job ``number`` as a number; NULL: it is not terminal."""
    ended = t.attempt.alias("ended")
    final = select(ended.c.final_state).where(ended.c.job_id == number, ended.c.final_state.is_not(None))
    if within is not None:
        final = final.where(within(ended.c.job_id))
    return final.correlate_except(ended).scalar_subquery()


def state_of(number: ColumnElement[int], within: Within | None = None) -> ColumnElement[int]:
    """The state of job ``number`` as a number, each table looked into only when the one before had nothing.

    Scalar subqueries, not EXISTS: the planner may answer EXISTS by hashing a whole table.
    """
    held = t.lease.alias("held")
    phase = select(held.c.phase).where(held.c.job_id == number, held.c.member == 0).correlate_except(held)
    by_phase = case(
        (phase.scalar_subquery() < int(LeasePhase.RUNNING), int(JobState.LEASED)),
        (phase.scalar_subquery() >= int(LeasePhase.RUNNING), int(JobState.RUNNING)),
    )
    waiting: list[ColumnElement[int | None]] = []
    for table in (t.ready, t.delayed):
        line = table.alias(f"in_{table.name}")
        waiting.append(
            select(literal_column(str(int(JobState.QUEUED)), Integer))
            .where(line.c.job_id == number)
            .correlate_except(line)
            .scalar_subquery()
        )
    return func.coalesce(final_state_of(number, within), by_phase, *waiting, type_=Integer)


@cache
def job_rows_query(within: Within = of_any_day) -> Select[Any]:
    """The statement of :func:`read_jobs`, without progress; see :func:`rows_by_day`."""
    job = t.job
    of_the_day = within(t.attempt.c.job_id)

    # Each of them is one look by the key, which no statistics can turn into a scan of the table.
    def at_most_one(table: Table, *rules: ColumnElement[bool]) -> LateralFromClause:
        return select(table).where(*rules).limit(1).lateral(f"its_{table.name}")

    ready = at_most_one(t.ready, t.ready.c.job_id == job.c.id)
    delayed = at_most_one(t.delayed, t.delayed.c.job_id == job.c.id)
    live = at_most_one(t.lease, t.lease.c.job_id == job.c.id, t.lease.c.member == 0)
    final = (
        select(t.attempt)
        .where(t.attempt.c.job_id == job.c.id, of_the_day, t.attempt.c.final_state.is_not(None))
        .limit(1)
        .lateral("final")
    )
    # lease_id 0: the job ended while it waited; that row is no attempt.
    last = (
        select(t.attempt)
        .where(t.attempt.c.job_id == job.c.id, of_the_day, t.attempt.c.lease_id > 0)
        .order_by(t.attempt.c.lease_id.desc())
        .limit(1)
        .lateral("last")
    )
    live_agent, last_agent = t.agent.alias("live_agent"), t.agent.alias("last_agent")
    return (
        select(
            job.c.id,
            job.c.spec,
            job.c.submitted_at,
            job.c.retry_of,
            func.coalesce(ready.c.attempts, delayed.c.attempts),
            func.coalesce(ready.c.failures, delayed.c.failures),
            func.coalesce(ready.c.losses, delayed.c.losses),
            delayed.c.not_before,
            live.c.lease_id.label("live_lease_id"),
            live.c.attempt,
            live.c.phase,
            live.c.failures,
            live.c.losses,
            func.coalesce(live_agent.c.name, live.c.agent_id),
            live.c.gpu_uuids,
            live.c.started_at,
            live.c.cancel_requested,
            final.c.final_state,
            final.c.attempt,
            final.c.failures,
            final.c.losses,
            final.c.outcome,
            final.c.exit_code,
            final.c.signal,
            final.c.error,
            final.c.result,
            final.c.ended_at,
            last.c.lease_id.label("last_lease_id"),
            last.c.outcome,
            last.c.exit_code,
            last.c.signal,
            last.c.error,
            func.coalesce(last_agent.c.name, last.c.agent_id),
            last.c.gpu_uuids,
            last.c.started_at,
        )
        .select_from(
            job.outerjoin(ready, true())
            .outerjoin(delayed, true())
            .outerjoin(live, true())
            .outerjoin(final, true())
            .outerjoin(last, true())
            .outerjoin(live_agent, live_agent.c.id == live.c.agent_id)
            .outerjoin(last_agent, last_agent.c.id == last.c.agent_id)
        )
        .where(asked_for(job.c.id), within(job.c.id))
    )


@cache
def progress_query(within: Within = of_any_day) -> Select[Any]:
    """The statement that finds the progress of leases; see :func:`rows_by_day`."""
    news = t.progress.c
    return select(news.job_id, news.lease_id, news.fraction, news.message, news.metrics, news.updated_at).where(
        asked_for(news.lease_id), within(news.lease_id)
    )


_NO_NEWS = (None, None, None, None)


async def read_jobs(database: Database, numbers: Collection[int]) -> dict[int, JobRow]:
    """Returns number → job, of those that exist: each from one snapshot, and its progress from a later one."""
    found = await rows_by_day(database, job_rows_query, numbers, day_of_job, job_bounds)
    leases = {row[0]: row["live_lease_id"] or row["last_lease_id"] for row in found}
    asked = [lease_id for lease_id in leases.values() if lease_id is not None]
    told = await rows_by_day(database, progress_query, asked, day_of_lease, lease_bounds)
    news = {row[1]: tuple(row)[2:] for row in told}
    return {row[0]: JobRow(*row, *news.get(leases[row[0]], _NO_NEWS)) for row in found}


@cache
def standings_query(within: Within = of_any_day) -> Select[Any]:
    """The statement of :func:`read_standings`; see :func:`rows_by_day`. At least one row, perhaps without a job."""
    number = t.job.c.id
    live, ready, delayed = t.lease.alias("live"), t.ready.alias("r"), t.delayed.alias("d")
    ended = t.attempt.alias("a")
    final = select(ended.c.attempt).where(ended.c.job_id == number, ended.c.final_state.is_not(None))
    attempt = func.coalesce(
        final.where(within(ended.c.job_id)).scalar_subquery(),
        select(live.c.attempt).where(live.c.job_id == number, live.c.member == 0).scalar_subquery(),
        select(ready.c.attempts).where(ready.c.job_id == number).scalar_subquery(),
        select(delayed.c.attempts).where(delayed.c.job_id == number).scalar_subquery(),
        type_=Integer,
    )
    taken = select(cast(func.pg_current_snapshot(), Text).label("snapshot"), func.now().label("at")).subquery("taken")
    standing = select(number.label("number"), state_of(number, within).label("state"), attempt.label("attempt"))
    found = standing.where(asked_for(number), within(number)).subquery("found")
    return select(taken.c.snapshot, taken.c.at, found.c.number, found.c.state, found.c.attempt).select_from(
        taken.outerjoin(found, true())
    )


@dataclass(frozen=True, slots=True)
class Standings:
    """Where some jobs stand, and in which snapshot."""

    by_number: dict[int, Standing]
    snapshot: str
    """As Postgres writes it: ``xmin:xmax:running``."""
    at: datetime


async def read_standings(database: Database, numbers: Collection[int]) -> Standings:
    """Returns where the jobs of ``numbers`` (at least one) stand, those that exist, all from one snapshot."""
    found = await rows_by_day(database, standings_query, numbers, day_of_job, job_bounds, max_days=1)
    standings = {
        row["number"]: Standing(row["number"], JobState(row["state"]), row["attempt"])
        for row in found
        if row["state"] is not None
    }
    return Standings(standings, found[0]["snapshot"], found[0]["at"])


@cache
def attempts_query(within: Within = of_any_day) -> Select[Any]:
    """The statement of :func:`read_attempts`; see :func:`rows_by_day`. A job without attempts gives a row of NULLs."""
    number, agent, ended, lease = t.job.c.id, t.agent, t.attempt.c, t.lease.c
    history = select(
        ended.attempt,
        ended.lease_id,
        literal_column(str(int(LeasePhase.ENDED)), SmallInteger).label("phase"),
        ended.outcome,
        ended.agent_id,
        ended.gpu_uuids,
        ended.granted_at,
        ended.started_at,
        ended.ended_at,
        ended.exit_code,
        ended.signal,
        ended.error,
        ended.log_bytes,
        ended.logs_truncated_at,
        ended.result,
    ).where(ended.job_id == number, within(ended.job_id), ended.lease_id > 0)
    # How a draining lease ended is told when its log is complete, not before.
    live = select(
        lease.attempt,
        lease.lease_id,
        lease.phase,
        cast(null(), SmallInteger),
        lease.agent_id,
        lease.gpu_uuids,
        lease.granted_at,
        lease.started_at,
        cast(null(), TIMESTAMP(timezone=True)),
        cast(null(), Integer),
        literal_column("0", Integer),
        cast(null(), lease.error.type),
        literal_column("0", BigInteger),
        cast(null(), BigInteger),
        cast(null(), lease.result.type),
    ).where(lease.job_id == number, lease.member == 0)
    every = union_all(history.correlate(t.job), live.correlate(t.job)).lateral("every")
    columns = {column.name: column for column in every.c}
    columns["agent_id"] = func.coalesce(agent.c.name, every.c.agent_id).label("agent")
    return (
        select(*columns.values())
        .select_from(t.job.outerjoin(every, true()).outerjoin(agent, agent.c.id == every.c.agent_id))
        .where(asked_for(number), within(number))
        .order_by(every.c.lease_id)
    )


@cache
def log_heads_query(within: Within = of_any_day) -> Select[Any]:
    """The statement that finds how far the logs of leases go; see :func:`rows_by_day`."""
    head = t.log_head.c
    return select(head.lease_id, head.end_offset).where(asked_for(head.lease_id), within(head.lease_id))


async def read_attempts(database: Database, number: int) -> list[AttemptRow] | None:
    """Returns all attempts of a job, oldest first; None: there is no such job."""
    found = await rows_by_day(database, attempts_query, [number], day_of_job, job_bounds)
    if not found:
        return None
    attempts = [AttemptRow(*row) for row in found if row["lease_id"] is not None]
    leases = [attempt.lease_id for attempt in attempts]
    heads = await rows_by_day(database, log_heads_query, leases, day_of_lease, lease_bounds)
    written = {row["lease_id"]: row["end_offset"] for row in heads}
    # Bytes may be stored after an attempt was given up; log_bytes is what was there when it ended.
    return [replace(each, log_bytes=max(each.log_bytes, written.get(each.lease_id, 0))) for each in attempts]


# ---------------------------------------------------------------- what watchers filter by


@dataclass(frozen=True, slots=True)
class JobAttributes:
    """What watchers filter jobs by. Immutable, as the job is."""

    queue_id: int
    labels: Mapping[str, str]


@cache
def attributes_query(within: Within = of_any_day) -> Select[Any]:
    """The statement of :func:`read_attributes`; see :func:`rows_by_day`."""
    job = t.job.c
    return select(job.id, job.queue_id, job.labels).where(asked_for(job.id), within(job.id))


async def read_attributes(database: Database, numbers: Collection[int]) -> dict[int, JobAttributes]:
    """Returns number → attributes, of those jobs that exist."""
    found = await rows_by_day(database, attributes_query, numbers, day_of_job, job_bounds)
    return {row[0]: JobAttributes(row[1], row[2]) for row in found}
