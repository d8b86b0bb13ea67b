"""Log bytes and progress of attempts, committed in batches."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from lessor_server.store.database import Database

STDOUT = 1


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an attempt's log."""

    job_number: int
    lease_id: int
    agent_id: str
    offset: int
    """Of the first byte in the attempt's log, both streams together."""
    stream: int
    """LogStream number."""
    data: bytes
    read_at: datetime


@dataclass(frozen=True, slots=True)
class Position:
    """How much of an attempt's log is committed, in bytes."""

    lease_id: int
    end_offset: int = 0
    stdout_bytes: int = 0
    stderr_bytes: int = 0


async def append(database: Database, chunks: Sequence[Chunk]) -> dict[int, Position]:
    """Appends chunks; what does not begin where the log ends is left out.

    Returns lease_id → where its log stands now. An agent that sees less than it
    sent sends again from there; a chunk sent twice is stored once.

    Raises:
        DatabaseUnavailable: The outcome is unknown; repeating is safe.
    """
    runs: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        run = runs.setdefault(chunk.lease_id, [])
        if not run or chunk.offset == run[-1].offset + len(run[-1].data):
            run.append(chunk)
    kept = [chunk for run in runs.values() for chunk in run]
    sums = [
        (sum(len(c.data) for c in run if c.stream == STDOUT), sum(len(c.data) for c in run if c.stream != STDOUT))
        for run in runs.values()
    ]
    heads = [run[0] for run in runs.values()]
    rows = await database.fetch(
        "append_logs",
        run_job_ids=[c.job_number for c in heads],
        run_lease_ids=[c.lease_id for c in heads],
        run_agent_ids=[c.agent_id for c in heads],
        run_starts=[c.offset for c in heads],
        run_stdout_bytes=[stdout for stdout, _ in sums],
        run_stderr_bytes=[stderr for _, stderr in sums],
        lease_ids=[c.lease_id for c in kept],
        starts=[c.offset for c in kept],
        streams=[c.stream for c in kept],
        data=[c.data for c in kept],
        read_ats=[c.read_at for c in kept],
    )
    positions = {row["lease_id"]: Position(*row) for row in rows}
    left = [lease_id for lease_id in runs if lease_id not in positions]
    if left:
        positions.update(await read_positions(database, left))
    return positions


async def read_positions(database: Database, lease_ids: Sequence[int]) -> dict[int, Position]:
    """Returns lease_id → where its log stands, zero for one that has none."""
    rows = await database.fetch("read_log_heads", lease_ids=list(lease_ids))
    found = {row["lease_id"]: Position(*row) for row in rows}
    return {lease_id: found.get(lease_id, Position(lease_id)) for lease_id in lease_ids}


@dataclass(frozen=True, slots=True)
class ProgressRow:
    """The latest progress of a running attempt."""

    job_number: int
    lease_id: int
    agent_id: str
    fraction: float | None
    message: str
    metrics: Mapping[str, float]
    updated_at: datetime


async def save_progress(database: Database, updates: Sequence[ProgressRow]) -> set[int]:
    """Stores the latest progress per lease; an older one changes nothing. Returns the job numbers stored."""
    latest: dict[int, ProgressRow] = {}
    for update in updates:
        if update.lease_id not in latest or latest[update.lease_id].updated_at <= update.updated_at:
            latest[update.lease_id] = update
    chosen = list(latest.values())
    rows = await database.fetch(
        "save_progress",
        job_ids=[u.job_number for u in chosen],
        lease_ids=[u.lease_id for u in chosen],
        agent_ids=[u.agent_id for u in chosen],
        fractions=[u.fraction for u in chosen],
        messages=[u.message for u in chosen],
        metrics=[json.dumps(dict(u.metrics)) for u in chosen],
        updated_ats=[u.updated_at for u in chosen],
    )
    return {row["job_id"] for row in rows}
