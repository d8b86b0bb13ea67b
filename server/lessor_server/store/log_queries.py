"""Reads of logs: where an attempt's log stands, and its chunks page by page."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import BigInteger, Integer, Select, bindparam, func, literal_column, select, true, union_all

from lessor_server.store import tables as t
from lessor_server.store.database import Database
from lessor_server.store.reads import rows

PAGE_BYTES = 1 << 20
"""A page holds about this many bytes, at most one chunk more."""

_PAGE_CHUNKS = 2048
"""And this many chunks, however small they are."""


@dataclass(frozen=True, slots=True)
class AttemptKey:
    """An attempt and its lease."""

    attempt: int
    lease_id: int


@dataclass(frozen=True, slots=True)
class LogStanding:
    """Where the log of a lease stands, and what its job has besides. One snapshot."""

    end_offset: int
    """Bytes stored of this lease's log."""
    live: bool
    """The lease has not ended: more may come."""
    terminal: bool
    """The job has ended."""
    following: AttemptKey | None
    """The job's next attempt after this lease."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of a log."""

    start_offset: int
    stream: int
    data: bytes
    read_at: datetime

    @property
    def end_offset(self) -> int:
        """Offset after its last byte."""
        return self.start_offset + len(self.data)


def _attempts_of_job() -> Any:
    number = bindparam("number", type_=BigInteger)
    ended = select(t.attempt.c.attempt, t.attempt.c.lease_id).where(
        t.attempt.c.job_id == number, t.attempt.c.lease_id > 0
    )
    live = select(t.lease.c.attempt, t.lease.c.lease_id).where(t.lease.c.job_id == number, t.lease.c.member == 0)
    return union_all(ended, live).subquery("every")


@cache
def _attempt_keys_query() -> Select[Any]:
    every = _attempts_of_job()
    return (
        select(every.c.attempt, every.c.lease_id)
        .select_from(t.job.outerjoin(every, true()))
        .where(t.job.c.id == bindparam("number", type_=BigInteger))
        .order_by(every.c.lease_id)
    )


async def read_attempt_keys(database: Database, number: int) -> list[AttemptKey] | None:
    """Returns the attempts of a job, oldest first; None: there is no such job."""
    found = await rows(database, _attempt_keys_query(), {"number": number})
    if not found:
        return None
    return [AttemptKey(row[0], row[1]) for row in found if row[1] is not None]


@cache
def _standing_query() -> Select[Any]:
    number, lease_id = bindparam("number", type_=BigInteger), bindparam("lease_id", type_=BigInteger)
    every = _attempts_of_job()
    following = select(every).where(every.c.lease_id > lease_id).order_by(every.c.lease_id).limit(1).subquery("next")
    end_offset = select(t.log_head.c.end_offset).where(t.log_head.c.lease_id == lease_id).scalar_subquery()
    live = (
        select(literal_column("true"))
        .select_from(t.lease)
        .where(t.lease.c.job_id == number, t.lease.c.member == 0, t.lease.c.lease_id == lease_id)
        .scalar_subquery()
    )
    terminal = (
        select(literal_column("true"))
        .select_from(t.attempt)
        .where(t.attempt.c.job_id == number, t.attempt.c.final_state.is_not(None))
        .scalar_subquery()
    )
    one = select(
        func.coalesce(end_offset, 0).label("end_offset"),
        func.coalesce(live, False).label("live"),
        func.coalesce(terminal, False).label("terminal"),
    ).subquery("one")
    return select(one, following.c.attempt, following.c.lease_id).select_from(one.outerjoin(following, true()))


async def read_log_standing(database: Database, number: int, lease_id: int) -> LogStanding:
    """Returns where the log of ``lease_id`` (0: of none yet) of job ``number`` stands."""
    (row,) = await rows(database, _standing_query(), {"number": number, "lease_id": lease_id})
    following = AttemptKey(row[3], row[4]) if row[4] is not None else None
    return LogStanding(row[0], row[1], row[2], following)


@cache
def _chunks_query() -> Select[Any]:
    chunk, lease_id, offset = (
        t.log_chunk,
        bindparam("lease_id", type_=BigInteger),
        bindparam("offset", type_=BigInteger),
    )
    around = t.log_chunk.alias("around")
    first = (
        select(around.c.start_offset)
        .where(around.c.lease_id == lease_id, around.c.start_offset <= offset)
        .order_by(around.c.start_offset.desc())
        .limit(1)
        .scalar_subquery()
    )
    return (
        select(chunk.c.start_offset, chunk.c.stream, chunk.c.data, chunk.c.read_at)
        .where(
            chunk.c.lease_id == lease_id,
            chunk.c.start_offset >= func.coalesce(first, offset),
            chunk.c.start_offset < offset + PAGE_BYTES,
        )
        .order_by(chunk.c.start_offset)
        .limit(_PAGE_CHUNKS)
    )


async def read_chunks(database: Database, lease_id: int, offset: int) -> list[Chunk]:
    """Returns one page of a log from the byte ``offset`` on, in order; the first chunk is cut to begin there.

    Empty: nothing is stored from there on.
    """
    found = await rows(database, _chunks_query(), {"lease_id": lease_id, "offset": offset})
    chunks = [Chunk(*tuple(row)) for row in found]
    if chunks and chunks[0].start_offset < offset:
        first = chunks[0]
        skip = offset - first.start_offset
        rest = [Chunk(offset, first.stream, first.data[skip:], first.read_at)] if skip < len(first.data) else []
        chunks[:1] = rest
    return chunks


@cache
def _chunks_before_query() -> Select[Any]:
    chunk = t.log_chunk
    lease_id, offset = bindparam("lease_id", type_=BigInteger), bindparam("offset", type_=BigInteger)
    return (
        select(chunk.c.start_offset, chunk.c.stream, chunk.c.data, chunk.c.read_at)
        .where(chunk.c.lease_id == lease_id, chunk.c.start_offset < offset)
        .order_by(chunk.c.start_offset.desc())
        .limit(bindparam("chunks", type_=Integer))
    )


async def read_chunks_before(database: Database, lease_id: int, offset: int, count: int) -> list[Chunk]:
    """Returns the last ``count`` chunks that begin before the byte ``offset``, last first."""
    parameters = {"lease_id": lease_id, "offset": offset, "chunks": count}
    return [Chunk(*tuple(row)) for row in await rows(database, _chunks_before_query(), parameters)]
