"""Reads of jobs: where they stand, and their attempts.

A job's state is the table it stands in, so every read of a job is one statement
over all of them: one snapshot, in which exactly one of them has the job.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
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
    and_,
    any_,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    null,
    select,
    true,
    union_all,
)
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP
from sqlalchemy.sql.selectable import LateralFromClause

from lessor.lifecycle import LeasePhase
from lessor_server.domain.states import JobState
from lessor_server.store import tables as t
from lessor_server.store.database import Database
from lessor_server.store.reads import rows


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


def state_of(number: ColumnElement[int]) -> ColumnElement[int]:
    """The state of job ``number`` as a number, each table looked into only when the one before had nothing.

    Scalar subqueries, not EXISTS: the planner may answer EXISTS by hashing a whole table.
    """
    ended = t.attempt.alias("ended")
    held = t.lease.alias("held")
    final = (
        select(ended.c.final_state)
        .where(ended.c.job_id == number, ended.c.final_state.is_not(None))
        .correlate_except(ended)
        .scalar_subquery()
    )
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
    return func.coalesce(final, by_phase, *waiting, type_=Integer)


def _within(column: ColumnElement[int]) -> ColumnElement[bool]:
    """The numbers asked for; the bounds let Postgres leave out partitions, which it cannot do by the array."""
    return and_(
        column == any_(bindparam("numbers", type_=ARRAY(BigInteger))),
        column >= bindparam("lowest", type_=BigInteger),
        column <= bindparam("highest", type_=BigInteger),
    )


def _asked(numbers: Collection[int]) -> dict[str, Any]:
    return {"numbers": sorted(set(numbers)), "lowest": min(numbers), "highest": max(numbers)}


@cache
def job_rows_query() -> Select[Any]:
    """The statement of :func:`read_jobs`; parameters numbers, lowest, highest."""
    job = t.job

    # Each of them is one look by the key, which no statistics can turn into a scan of the table.
    def at_most_one(table: Table, *rules: ColumnElement[bool]) -> LateralFromClause:
        return select(table).where(*rules).limit(1).lateral(f"its_{table.name}")

    ready = at_most_one(t.ready, t.ready.c.job_id == job.c.id)
    delayed = at_most_one(t.delayed, t.delayed.c.job_id == job.c.id)
    live = at_most_one(t.lease, t.lease.c.job_id == job.c.id, t.lease.c.member == 0)
    final = (
        select(t.attempt)
        .where(t.attempt.c.job_id == job.c.id, t.attempt.c.final_state.is_not(None))
        .limit(1)
        .lateral("final")
    )
    # lease_id 0: the job ended while it waited; that row is no attempt.
    last = (
        select(t.attempt)
        .where(t.attempt.c.job_id == job.c.id, t.attempt.c.lease_id > 0)
        .order_by(t.attempt.c.lease_id.desc())
        .limit(1)
        .lateral("last")
    )
    news = (
        select(t.progress)
        .where(t.progress.c.lease_id == func.coalesce(live.c.lease_id, last.c.lease_id))
        .limit(1)
        .lateral("news")
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
            live.c.lease_id,
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
            last.c.lease_id,
            last.c.outcome,
            last.c.exit_code,
            last.c.signal,
            last.c.error,
            func.coalesce(last_agent.c.name, last.c.agent_id),
            last.c.gpu_uuids,
            last.c.started_at,
            news.c.fraction,
            news.c.message,
            news.c.metrics,
            news.c.updated_at,
        )
        .select_from(
            job.outerjoin(ready, true())
            .outerjoin(delayed, true())
            .outerjoin(live, true())
            .outerjoin(final, true())
            .outerjoin(last, true())
            .outerjoin(news, true())
            .outerjoin(live_agent, live_agent.c.id == live.c.agent_id)
            .outerjoin(last_agent, last_agent.c.id == last.c.agent_id)
        )
        .where(_within(job.c.id))
    )


async def read_jobs(database: Database, numbers: Collection[int]) -> dict[int, JobRow]:
    """Returns number → job, of those that exist, all from one snapshot."""
    if not numbers:
        return {}
    found = await rows(database, job_rows_query(), _asked(numbers))
    return {row[0]: JobRow(*row) for row in found}


@cache
def standings_query() -> Select[Any]:
    """The statement of :func:`read_standings`; parameters numbers, lowest, highest."""
    number = t.job.c.id
    live, ready, delayed = t.lease.alias("live"), t.ready.alias("r"), t.delayed.alias("d")
    ended = t.attempt.alias("a")
    attempt = func.coalesce(
        select(ended.c.attempt).where(ended.c.job_id == number, ended.c.final_state.is_not(None)).scalar_subquery(),
        select(live.c.attempt).where(live.c.job_id == number, live.c.member == 0).scalar_subquery(),
        select(ready.c.attempts).where(ready.c.job_id == number).scalar_subquery(),
        select(delayed.c.attempts).where(delayed.c.job_id == number).scalar_subquery(),
        type_=Integer,
    )
    taken = select(cast(func.pg_current_snapshot(), Text).label("snapshot"), func.now().label("at")).subquery("taken")
    standing = select(number.label("number"), state_of(number).label("state"), attempt.label("attempt"))
    found = standing.where(_within(number)).subquery("found")
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
    found = await rows(database, standings_query(), _asked(numbers))
    standings = {
        row.number: Standing(row.number, JobState(row.state), row.attempt) for row in found if row.state is not None
    }
    return Standings(standings, found[0].snapshot, found[0].at)


@cache
def attempts_query() -> Select[Any]:
    """The statement of :func:`read_attempts`; parameter number. A job without attempts gives one row of NULLs."""
    number = bindparam("number", type_=BigInteger)
    head, agent = t.log_head, t.agent
    ended = select(
        t.attempt.c.attempt,
        t.attempt.c.lease_id,
        literal_column(str(int(LeasePhase.ENDED)), SmallInteger).label("phase"),
        t.attempt.c.outcome,
        t.attempt.c.agent_id,
        t.attempt.c.gpu_uuids,
        t.attempt.c.granted_at,
        t.attempt.c.started_at,
        t.attempt.c.ended_at,
        t.attempt.c.exit_code,
        t.attempt.c.signal,
        t.attempt.c.error,
        t.attempt.c.log_bytes,
        t.attempt.c.logs_truncated_at,
        t.attempt.c.result,
    ).where(t.attempt.c.job_id == number, t.attempt.c.lease_id > 0)
    # How a draining lease ended is told when its log is complete, not before.
    live = select(
        t.lease.c.attempt,
        t.lease.c.lease_id,
        t.lease.c.phase,
        cast(null(), SmallInteger),
        t.lease.c.agent_id,
        t.lease.c.gpu_uuids,
        t.lease.c.granted_at,
        t.lease.c.started_at,
        cast(null(), TIMESTAMP(timezone=True)),
        cast(null(), Integer),
        literal_column("0", Integer),
        cast(null(), t.lease.c.error.type),
        literal_column("0", BigInteger),
        cast(null(), BigInteger),
        cast(null(), t.lease.c.result.type),
    ).where(t.lease.c.job_id == number, t.lease.c.member == 0)
    all_of_them = union_all(ended, live).subquery("every")
    written = select(head.c.end_offset).where(head.c.lease_id == all_of_them.c.lease_id).scalar_subquery()
    columns = {column.name: column for column in all_of_them.c}
    # Bytes may be stored after an attempt was given up; log_bytes is what was there when it ended.
    columns["log_bytes"] = func.greatest(all_of_them.c.log_bytes, func.coalesce(written, 0)).label("log_bytes")
    columns["agent_id"] = func.coalesce(agent.c.name, all_of_them.c.agent_id).label("agent")
    return (
        select(*columns.values())
        .select_from(t.job.outerjoin(all_of_them, true()).outerjoin(agent, agent.c.id == all_of_them.c.agent_id))
        .where(t.job.c.id == number)
        .order_by(all_of_them.c.lease_id)
    )


async def read_attempts(database: Database, number: int) -> list[AttemptRow] | None:
    """Returns all attempts of a job, oldest first; None: there is no such job."""
    found = await rows(database, attempts_query(), {"number": number})
    if not found:
        return None
    return [AttemptRow(*row) for row in found if row.lease_id is not None]


# ---------------------------------------------------------------- what watchers filter by


@dataclass(frozen=True, slots=True)
class JobAttributes:
    """What watchers filter jobs by. Immutable, as the job is."""

    queue_id: int
    labels: Mapping[str, str]


@cache
def _attributes_query() -> Select[Any]:
    return select(t.job.c.id, t.job.c.queue_id, t.job.c.labels).where(_within(t.job.c.id))


async def read_attributes(database: Database, numbers: Collection[int]) -> dict[int, JobAttributes]:
    """Returns number → attributes, of those jobs that exist."""
    if not numbers:
        return {}
    found = await rows(database, _attributes_query(), _asked(numbers))
    return {row[0]: JobAttributes(row[1], row[2]) for row in found}
