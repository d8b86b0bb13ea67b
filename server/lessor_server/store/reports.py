"""What agents say of their leases, committed in order.

One batch carries events of many agents. The order of events of one lease is
kept: phases first, then checkpoints, then ends; what moved nothing is told
apart from what is stale.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto
from typing import NamedTuple, TypeAlias

import asyncpg

from lessor.lifecycle import LeasePhase, Outcome
from lessor_server.store.database import Statements

Key: TypeAlias = tuple[int, int]
"""(job number, lease_id)"""

_REVIVE_TRIES = 3


class Verdict(Enum):
    """What became of a reported event."""

    RECORDED = auto()
    """It is committed, or was before."""
    STALE = auto()
    """The lease is over or was never: the agent is to stop and forget."""
    SUPERSEDED = auto()
    """It came in the name of an old epoch; the agent says it again after its next Hello."""


class Phase(NamedTuple):
    """The lease was accepted, or its workload runs."""

    phase: LeasePhase
    started_at: datetime | None = None


class Checkpoint(NamedTuple):
    """The workload can resume from here."""

    cursor: str


class End(NamedTuple):
    """The lease is over in the agent's word."""

    outcome: Outcome | None
    """None: released; what it then counts as depends on the phase it was in."""
    exit_code: int | None = None
    signal: int = 0
    error: bytes | None = None
    """Serialized JobError."""
    retryable: bool = True
    result: bytes | None = None
    final_log_offset: int = 0
    started_at: datetime | None = None
    ended_at: datetime | None = None


class Report(NamedTuple):
    """One event of one lease, in the name of one session."""

    job_number: int
    lease_id: int
    agent_id: str
    session_id: int
    epoch: int
    event: Phase | Checkpoint | End

    @property
    def key(self) -> Key:
        """(job number, lease_id)"""
        return self.job_number, self.lease_id


def report_bytes(report: Report) -> int:
    """Returns about how many bytes a report adds to a batch."""
    event = report.event
    if isinstance(event, End):
        return 256 + len(event.error or b"") + len(event.result or b"")
    return 256 + (len(event.cursor) if isinstance(event, Checkpoint) else 0)


@dataclass(frozen=True, slots=True)
class Committed:
    """What a batch did."""

    verdicts: list[Verdict]
    """One per report, in order."""
    moved: bool
    """A lease was accepted or its workload runs now."""
    ended: set[Key]
    """Leases that hold nothing any more: there is room, and perhaps a job that waits again."""
    may_wait_again: bool
    """One of them did not succeed."""
    draining_jobs: set[int]
    """Jobs whose end is stored and whose log is not complete yet."""


async def commit_reports(database: Statements, reports: Sequence[Report], now: datetime | None = None) -> Committed:
    """Commits a batch of reports.

    Raises:
        DatabaseUnavailable: The outcome is unknown; repeating is safe.
    """
    ends = {r.key: r for r in reports if isinstance(r.event, End)}
    if len(ends) == len(reports):
        # As most are under load: nothing but ends, each of another lease.
        return await _commit_ends(database, reports, now)
    moved = await _advance(database, [r for r in reports if isinstance(r.event, Phase) and r.key not in ends])
    saved = await _save_checkpoints(database, reports)
    ended, draining = await _end(database, list(ends.values()), now)
    unmoved = [
        r for r in reports
        if (isinstance(r.event, End) and r.key not in ended)
        or (isinstance(r.event, Phase) and r.key not in ends and r.key not in moved)
        or (isinstance(r.event, Checkpoint) and r.key not in saved)
    ]  # fmt: skip
    known = await _look_up(database, unmoved)
    doubtful = {id(r) for r in unmoved}
    verdicts = [_judge(r, known.get(r.key)) if id(r) in doubtful else Verdict.RECORDED for r in reports]
    finished = await finish_drained(database, sorted(draining), now) if draining else set()
    return Committed(
        verdicts=verdicts,
        moved=bool(moved),
        ended=ended,
        may_wait_again=any(isinstance(r.event, End) and r.event.outcome is not Outcome.SUCCEEDED for r in reports),
        draining_jobs=draining - finished,
    )


async def _commit_ends(database: Statements, reports: Sequence[Report], now: datetime | None) -> Committed:
    ended, draining = await _end(database, reports, now)
    verdicts = [Verdict.RECORDED] * len(reports)
    if len(ended) < len(reports):
        known = await _look_up(database, [r for r in reports if r.key not in ended])
        verdicts = [Verdict.RECORDED if r.key in ended else _judge(r, known.get(r.key)) for r in reports]
    finished = await finish_drained(database, sorted(draining), now) if draining else set()
    return Committed(
        verdicts=verdicts,
        moved=False,
        ended=ended,
        may_wait_again=any(r.event.outcome is not Outcome.SUCCEEDED for r in reports if isinstance(r.event, End)),
        draining_jobs=draining - finished,
    )


async def _advance(database: Statements, reports: Sequence[Report]) -> set[Key]:
    latest: dict[Key, Report] = {}
    for report in reports:
        assert isinstance(report.event, Phase)
        before = latest.get(report.key)
        if before is None or (isinstance(before.event, Phase) and report.event.phase >= before.event.phase):
            latest[report.key] = report
    if not latest:
        return set()
    chosen = list(latest.values())
    events = [r.event for r in chosen if isinstance(r.event, Phase)]
    rows = await database.fetch(
        "advance",
        job_ids=[r.job_number for r in chosen],
        lease_ids=[r.lease_id for r in chosen],
        session_ids=[r.session_id for r in chosen],
        epochs=[r.epoch for r in chosen],
        phases=[int(e.phase) for e in events],
        started_ats=[e.started_at for e in events],
    )
    return _keys(rows)


async def _save_checkpoints(database: Statements, reports: Sequence[Report]) -> set[Key]:
    latest = {r.job_number: r for r in reports if isinstance(r.event, Checkpoint)}
    for report in reports:
        if isinstance(report.event, Checkpoint) and report.lease_id >= latest[report.job_number].lease_id:
            latest[report.job_number] = report
    if not latest:
        return set()
    chosen = list(latest.values())
    rows = await database.fetch(
        "save_checkpoints",
        job_ids=[r.job_number for r in chosen],
        lease_ids=[r.lease_id for r in chosen],
        agent_ids=[r.agent_id for r in chosen],
        cursors=[r.event.cursor for r in chosen if isinstance(r.event, Checkpoint)],
    )
    stored = {row["job_id"] for row in rows}
    return {r.key for r in chosen if r.job_number in stored}


async def _end(database: Statements, reports: Sequence[Report], now: datetime | None) -> tuple[set[Key], set[int]]:
    """Returns the (job, lease) pairs ended, and the jobs among them that wait for log bytes."""
    if not reports:
        return set(), set()
    events = [r.event for r in reports if isinstance(r.event, End)]
    rows = await database.fetch(
        "end",
        now=now,
        agent_ids=[r.agent_id for r in reports],
        **_end_columns(reports),
        lowest_lease_id=min(r.lease_id for r in reports),
        highest_lease_id=max(r.lease_id for r in reports),
        jitters=[random.uniform(-1, 1) for _ in events],
    )
    ended = _keys(rows)
    draining = {row["job_id"] for row in rows if row["drained"]}
    left = [r for r in reports if r.key not in ended]
    released = [r for r in left if isinstance(r.event, End) and r.event.outcome is None]
    if released:
        ended |= _keys(
            await database.fetch(
                "truncate_drained",
                now=now,
                job_ids=[r.job_number for r in released],
                lease_ids=[r.lease_id for r in released],
                agent_ids=[r.agent_id for r in released],
            )
        )
    late = [r for r in left if isinstance(r.event, End) and r.event.outcome is not None]
    if late:
        revived = await _revive(database, late, now)
        ended |= revived
        draining |= {job for job, _ in revived}
    return ended, draining


async def _revive(database: Statements, reports: Sequence[Report], now: datetime | None) -> set[Key]:
    revived: set[Key] = set()
    for _ in range(_REVIVE_TRIES):
        left = [r for r in reports if r.key not in revived]
        if not left:
            break
        rows = await database.fetch(
            "revive",
            now=now,
            agent_ids=[r.agent_id for r in left],
            session_ids=[r.session_id for r in left],
            **_end_columns(left),
        )
        revived |= _keys(rows)
        # A job can move between ready and delayed while we look; one that waits
        # with our token is tried again, anything else is for the caller to judge.
        known = await _look_up(database, left)
        if not any(row["waits"] and row["recorded"] in (Outcome.LOST, Outcome.WITHDRAWN) for row in known.values()):
            break
    return revived


def _end_columns(reports: Sequence[Report]) -> dict[str, object]:
    events = [r.event for r in reports if isinstance(r.event, End)]
    return {
        "job_ids": [r.job_number for r in reports],
        "lease_ids": [r.lease_id for r in reports],
        "outcomes": [None if e.outcome is None else int(e.outcome) for e in events],
        "exit_codes": [e.exit_code for e in events],
        "signals": [e.signal for e in events],
        "errors": [e.error for e in events],
        "retryables": [e.retryable for e in events],
        "results": [e.result for e in events],
        "final_log_offsets": [e.final_log_offset for e in events],
        "started_ats": [e.started_at for e in events],
        "ended_ats": [e.ended_at for e in events],
    }


async def finish_drained(
    database: Statements, job_numbers: Sequence[int] | None = None, now: datetime | None = None
) -> set[int]:
    """Ends the leases whose outcome is stored and whose log is complete now.

    Args:
        database: The store.
        job_numbers: Jobs to look at; None: all.
        now: The time; None: the database's clock.

    Returns:
        The jobs whose lease ended.
    """
    rows = await database.fetch("finish_drained", now=now, job_ids=None if job_numbers is None else list(job_numbers))
    return {row["job_id"] for row in rows}


async def _look_up(database: Statements, reports: Sequence[Report]) -> dict[Key, asyncpg.Record]:
    if not reports:
        return {}
    rows = await database.fetch(
        "settle_reports",
        job_ids=[r.job_number for r in reports],
        lease_ids=[r.lease_id for r in reports],
        agent_ids=[r.agent_id for r in reports],
    )
    return {(row["job_id"], row["lease_id"]): row for row in rows}


def _judge(report: Report, row: asyncpg.Record | None) -> Verdict:
    """Tells an event that moved nothing: recorded before, said in an old epoch's name, or stale."""
    if row is None:
        return Verdict.STALE
    phase, recorded = row["phase"], row["recorded"]
    event = report.event
    if phase is not None:
        if isinstance(event, Phase) and phase < event.phase:
            return Verdict.SUPERSEDED
        return Verdict.RECORDED
    if recorded is None:
        return Verdict.STALE
    if recorded not in (Outcome.LOST, Outcome.WITHDRAWN):
        return Verdict.RECORDED
    # The server gave the lease up without the agent's word.
    if isinstance(event, End) and event.outcome in (None, Outcome.LOST, Outcome.REJECTED):
        return Verdict.RECORDED
    if isinstance(event, Checkpoint) and row["waits"]:
        return Verdict.RECORDED
    return Verdict.STALE


def _keys(rows: Iterable[asyncpg.Record]) -> set[Key]:
    return {(row["job_id"], row["lease_id"]) for row in rows}
