"""Storing submitted jobs, each request once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import asyncpg

from lessor_server.domain.errors import Contended, RequestIdReused
from lessor_server.store.database import Database, Transaction

_DEDUPE_TRIES = 5


@dataclass(frozen=True, slots=True, eq=False)
class JobTerms:
    """What many jobs have in common. It travels once for all jobs that have the same object."""

    queue_id: int
    shape_id: int
    priority: int
    ttl_ms: int
    start_timeout_ms: int | None
    queue_timeout_ms: int | None
    max_failures: int
    max_losses: int
    backoff_initial_ms: int
    backoff_max_ms: int
    retry_of: int | None = None


class JobRow(NamedTuple):
    """One job as it is stored."""

    terms: JobTerms
    name: str
    labels_json: str
    spec: bytes
    dedupe_key: str | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One submit, of one job or of many."""

    principal: str
    request_id: str
    fingerprint: bytes
    """Digest of what was asked for: a request_id stands for one thing."""
    jobs: Sequence[JobRow]


@dataclass(frozen=True, slots=True)
class Submitted:
    """What a request made, or had made before."""

    job_numbers: list[int]
    """In the order of the request's jobs."""
    existing: bool
    """An earlier request, or a dedupe key, answered for all of them."""


_NO_LABELS = "{}"


def _columns(requests: Iterable[tuple[int, Sequence[JobRow]]]) -> dict[str, Any]:
    """Returns the parameters that store jobs, from pairs of a request's number and its jobs.

    asyncpg takes half a microsecond for each item of an array. So what jobs share
    is sent once, with a number, and numbers and labels only where they differ.
    """
    numbers: dict[tuple[int, JobTerms], int] = {}
    term_numbers: list[int] = []
    jobs: list[JobRow] = []
    for request_index, rows in requests:
        for row in rows:
            term_numbers.append(numbers.setdefault((request_index, row.terms), len(numbers) + 1))
        jobs += rows
    terms = [terms for _, terms in numbers]
    _, names, labels, specs, _ = zip(*jobs, strict=True) if jobs else ((),) * 5
    return {
        "request_indexes": [request_index for request_index, _ in numbers],
        "queue_ids": [t.queue_id for t in terms],
        "shape_ids": [t.shape_id for t in terms],
        "priorities": [t.priority for t in terms],
        "ttls_ms": [t.ttl_ms for t in terms],
        "start_timeouts_ms": [t.start_timeout_ms for t in terms],
        "queue_timeouts_ms": [t.queue_timeout_ms for t in terms],
        "max_failures": [t.max_failures for t in terms],
        "max_losses": [t.max_losses for t in terms],
        "backoff_initials_ms": [t.backoff_initial_ms for t in terms],
        "backoff_maxes_ms": [t.backoff_max_ms for t in terms],
        "retries_of": [t.retry_of for t in terms],
        "term_numbers": term_numbers if len(terms) > 1 else [],
        "names": names,
        "labels": [] if labels.count(_NO_LABELS) == len(labels) else labels,
        "specs": specs,
    }


async def submit_batch(
    database: Database, requests: Sequence[Request], now: datetime | None = None
) -> list[Submitted | RequestIdReused]:
    """Stores requests without dedupe keys in one transaction, each once.

    Returns one answer per request, in order. A request whose id was used before
    is answered with what that made, or refused if that was something else.

    Raises:
        DatabaseUnavailable: The outcome is unknown; repeating is safe.
    """
    # Of equal keys in one batch one is proposed; the others read what it made.
    proposed: dict[tuple[str, str], Request] = {}
    for request in requests:
        proposed.setdefault((request.principal, request.request_id), request)
    batch = list(proposed.values())
    rows = await database.fetch(
        "submit",
        now=now,
        **_columns((index, request.jobs) for index, request in enumerate(batch, start=1)),
        principals=[r.principal for r in batch],
        request_ids=[r.request_id for r in batch],
        fingerprints=[r.fingerprint for r in batch],
    )
    new = {(row["principal"], row["request_id"]): list(row["job_ids"]) for row in rows}
    answers: dict[int, Submitted | RequestIdReused] = {}
    repeated: dict[int, Request] = {}
    for position, request in enumerate(requests):
        key = (request.principal, request.request_id)
        if key in new and proposed[key] is request:
            answers[position] = Submitted(new[key], existing=False)
        else:
            repeated[position] = request
    if repeated:
        earlier = await _read_requests(database, list(repeated.values()))
        for position, request in repeated.items():
            answers[position] = _answer_repeated(request, earlier[request.principal, request.request_id])
    return [answers[position] for position in range(len(requests))]


async def _read_requests(database: Database, requests: Sequence[Request]) -> dict[tuple[str, str], asyncpg.Record]:
    rows = await database.fetch(
        "read_requests",
        principals=[r.principal for r in requests],
        request_ids=[r.request_id for r in requests],
    )
    return {(row["principal"], row["request_id"]): row for row in rows}


def _answer_repeated(request: Request, row: asyncpg.Record) -> Submitted | RequestIdReused:
    if row["fingerprint"] != request.fingerprint:
        return RequestIdReused(request.request_id, f"{len(row['job_ids'])} other job(s)")
    return Submitted(list(row["job_ids"]), existing=True)


async def submit_deduped(
    database: Database, request: Request, now: datetime | None = None, moved_from: int | None = None
) -> Submitted:
    """Stores one request some of whose jobs have dedupe keys.

    A job whose key is taken is not stored; the holder of the key answers for it.

    Args:
        database: The store.
        request: The request.
        now: The time; None: the database's clock.
        moved_from: A terminal job whose keys this request takes over (a retry).

    Raises:
        RequestIdReused: The request_id was used for something else.
        Contended: The keys changed hands at every try.
        DatabaseUnavailable: The outcome is unknown; repeating is safe.
    """
    for _ in range(_DEDUPE_TRIES):
        try:
            async with database.transaction() as transaction:
                return await _submit_deduped(transaction, request, now, moved_from)
        except _AnsweredBeforeError:
            earlier = await _read_requests(database, [request])
            if row := earlier.get((request.principal, request.request_id)):
                answer = _answer_repeated(request, row)
                if isinstance(answer, RequestIdReused):
                    raise answer from None
                return answer
        except (_KeyGivenUpError, asyncpg.DeadlockDetectedError):
            continue
    raise Contended(f"of request {request.request_id}", _DEDUPE_TRIES)


class _AnsweredBeforeError(Exception):
    """The request_id is taken: roll back and read what it made."""


class _KeyGivenUpError(Exception):
    """A key was taken when we tried and free when we looked: try again."""


async def _submit_deduped(
    transaction: Transaction, request: Request, now: datetime | None, moved_from: int | None
) -> Submitted:
    jobs = request.jobs
    ids: list[int] = [
        row["id"]
        for row in await transaction.connection.fetch(
            "SELECT next_job_id($1) AS id FROM generate_series(1, $2)", now, len(jobs)
        )
    ]
    keys: dict[tuple[int, str], int] = {}
    for job, job_id in zip(jobs, ids, strict=True):
        if job.dedupe_key is not None:
            keys.setdefault((job.terms.queue_id, job.dedupe_key), job_id)
    if moved_from is not None:
        await transaction.connection.execute(
            "DELETE FROM dedupe WHERE job_id = $1 AND key = $2", moved_from, jobs[0].dedupe_key
        )
    won = {
        (row["queue_id"], row["key"])
        for row in await transaction.fetch(
            "claim_dedupe_keys",
            queue_ids=[q for q, _ in keys],
            keys=[k for _, k in keys],
            job_ids=list(keys.values()),
        )
    }
    lost = [key for key in keys if key not in won]
    for row in await transaction.fetch("read_dedupe_keys", queue_ids=[q for q, _ in lost], keys=[k for _, k in lost]):
        keys[row["queue_id"], row["key"]] = row["job_id"]
        lost.remove((row["queue_id"], row["key"]))
    if lost:
        raise _KeyGivenUpError
    answers = [
        job_id if job.dedupe_key is None else keys[job.terms.queue_id, job.dedupe_key]
        for job, job_id in zip(jobs, ids, strict=True)
    ]
    fresh = [(job, job_id) for job, job_id, answer in zip(jobs, ids, answers, strict=True) if job_id == answer]
    rows = await transaction.fetch(
        "submit_deduped",
        now=now,
        principal=request.principal,
        request_id=request.request_id,
        fingerprint=request.fingerprint,
        job_ids=answers,
        ids=[job_id for _, job_id in fresh],
        **_columns([(1, [job for job, _ in fresh])]),
        dedupe_keys=[job.dedupe_key for job, _ in fresh],
    )
    if not rows:
        raise _AnsweredBeforeError
    return Submitted(answers, existing=not fresh)
