"""Submitting, cancelling and repeating jobs."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from lessor.ids import encode_job_id
from lessor.v1 import job_pb2, job_service_pb2
from lessor_server.bells import Bells
from lessor_server.domain.errors import Contended, InvalidField, JobNotFound, JobNotTerminal, RequestIdReused
from lessor_server.domain.states import JobState
from lessor_server.services.lines import Arrival, Lines
from lessor_server.services.submission import REMEMBERED_TERMS, Submission, Submissions, Terms
from lessor_server.store.catalog import Catalog
from lessor_server.store.database import Database
from lessor_server.store.group_commit import GroupCommit
from lessor_server.store.submit import JobRow, JobTerms, Request, Submitted, submit_batch, submit_deduped

_CANCEL_TRIES = 5
_MAX_BATCH_BYTES = 16 << 20
"""Most bytes of one statement; a larger request goes alone."""

_GATHER_S = 0.004
"""A commit of one small request takes the database and this process half a millisecond, one more in it a tenth."""

_LARGE_JOBS = 100
"""A request of so many jobs takes some 2 ms of the database."""


class Jobs:
    """The writes of JobService. :meth:`start` it on the loop that uses it."""

    def __init__(
        self, database: Database, catalog: Catalog, bells: Bells, lines: Lines, *, now: datetime | None = None
    ) -> None:
        """``now`` stands still for tests; None: the database's clock."""
        self._database = database
        self._catalog = catalog
        self._bells = bells
        self._lines = lines
        self._now = now
        self._submissions = Submissions()
        self._stored_terms: dict[Terms, JobTerms] = {}
        # One worker each: what comes in during a commit rides the next one. A large request takes
        # as long as hundreds of small ones, which are not to wait for it.
        self._submits = self._committed_by("submit", gather_s=_GATHER_S)
        self._large_submits = self._committed_by("large submit")

    def _committed_by(self, name: str, gather_s: float = 0.0) -> GroupCommit[Request, Submitted]:
        return GroupCommit(
            name,
            self._flush_submits,
            max_items=1000,
            gather_s=gather_s,
            weight=_bytes_of,
            max_weight=_MAX_BATCH_BYTES,
        )

    def start(self) -> None:
        """Starts the group commits."""
        self._submits.start()
        self._large_submits.start()

    async def close(self) -> None:
        """Commits what was accepted, refuses what comes later."""
        await asyncio.gather(self._submits.close(), self._large_submits.close())

    async def submit(
        self, principal: str, request_id: str, specs: Sequence[job_pb2.JobSpec], *, single: bool = False
    ) -> Submitted:
        """Stores jobs: all or none, once per (principal, request_id). Returning means committed.

        Raises:
            InvalidField: Fields of a spec do not go together.
            QueueNotFound: A queue does not exist.
            TooLarge: A spec has more than 1 MiB.
            RequestIdReused: The request_id was used for something else.
            DatabaseUnavailable: The outcome is unknown; repeating with the same request_id is safe.
        """
        request_id = request_id or secrets.token_hex(16)
        submissions = await self._submissions.prepare_all(specs, single=single)
        jobs = await self._rows(submissions)
        request = Request(principal, request_id, _fingerprint([submission.said for submission in submissions]), jobs)
        if any(job.dedupe_key is not None for job in jobs):
            submitted = await submit_deduped(self._database, request, self._now)
            self._bells.changed(waiting=True)
            return submitted
        return await self._commit(request)

    async def _commit(self, request: Request) -> Submitted:
        """Commits a request; whoever asked may go away meanwhile."""
        commits = self._submits if len(request.jobs) < _LARGE_JOBS else self._large_submits
        return await commits.commit(request)

    async def _rows(self, submissions: Sequence[Submission]) -> list[JobRow]:
        """Returns the rows of jobs.

        Raises:
            QueueNotFound: A queue does not exist.
        """
        new = {submission.terms.shape for submission in submissions if submission.terms not in self._stored_terms}
        await self._catalog.store_shapes(new)
        rows: list[JobRow] = []
        for terms, name, labels_json, spec, dedupe_key, _ in submissions:
            stored = self._stored_terms.get(terms) or await self._store(terms)
            rows.append(JobRow(stored, name, labels_json, spec, dedupe_key))
        return rows

    async def _store(self, terms: Terms) -> JobTerms:
        stored = JobTerms(
            queue_id=await self._catalog.queue_id(terms.queue),
            shape_id=await self._catalog.shape_id(terms.shape),
            priority=terms.priority,
            ttl_ms=terms.ttl_ms,
            start_timeout_ms=terms.start_timeout_ms,
            queue_timeout_ms=terms.queue_timeout_ms,
            max_failures=terms.max_failures,
            max_losses=terms.max_losses,
            backoff_initial_ms=terms.backoff_initial_ms,
            backoff_max_ms=terms.backoff_max_ms,
        )
        if len(self._stored_terms) >= REMEMBERED_TERMS:
            self._stored_terms.clear()
        self._stored_terms[terms] = stored
        return stored

    async def _flush_submits(self, requests: Sequence[Request]) -> list[Submitted | RequestIdReused]:
        answers = await submit_batch(self._database, requests, self._now)
        # The planner is told first: it is what the caller waits for.
        self._lines.arrived(
            (
                Arrival(number, job.terms.queue_id, job.terms.shape_id, job.terms.priority)
                for request, answer in zip(requests, answers, strict=True)
                if isinstance(answer, Submitted) and not answer.existing
                for job, number in zip(request.jobs, answer.job_numbers, strict=True)
            )
        )
        self._bells.changed()
        return answers

    async def cancel(self, job_numbers: Sequence[int]) -> list[int]:
        """Asks for jobs to be cancelled. Returns a CancelResult number per job, in order.

        A job changes tables while we look: each place is tried in a statement of
        its own, until one hits.

        Raises:
            Contended: A job was never where we looked.
            DatabaseUnavailable: The outcome is unknown; repeating is safe.
        """
        results: dict[int, int] = {}
        for _ in range(_CANCEL_TRIES):
            await self._cancel_waiting(_missing(job_numbers, results), results)
            await self._cancel_leased(_missing(job_numbers, results), results)
            await self._look_for_ended(_missing(job_numbers, results), results)
            if not _missing(job_numbers, results):
                self._bells.changed(leases=True)
                return [results[number] for number in job_numbers]
        raise Contended(encode_job_id(_missing(job_numbers, results)[0]), _CANCEL_TRIES)

    async def _cancel_waiting(self, numbers: list[int], results: dict[int, int]) -> None:
        rows = await self._database.fetch(
            "cancel_waiting",
            job_ids=numbers,
            now=self._now,
            outcome=job_pb2.OUTCOME_CANCELLED,
            final_state=JobState.CANCELLED,
            error=None,
        )
        results.update((row["job_id"], job_service_pb2.CANCEL_RESULT_CANCELLED) for row in rows)
        for row in rows:
            self._bells.logs.ring(row["job_id"])

    async def _cancel_leased(self, numbers: list[int], results: dict[int, int]) -> None:
        rows = await self._database.fetch("cancel_leased", job_ids=numbers)
        results.update((row["job_id"], job_service_pb2.CANCEL_RESULT_REQUESTED) for row in rows)

    async def _look_for_ended(self, numbers: list[int], results: dict[int, int]) -> None:
        rows = await self._database.query(
            "SELECT n.id, j.id IS NULL AS unknown, a.job_id IS NOT NULL AS ended FROM unnest($1::bigint[]) AS n (id) "
            "LEFT JOIN job AS j ON j.id = n.id LEFT JOIN attempt AS a ON a.job_id = n.id AND a.final_state IS NOT NULL",
            numbers,
        )
        for row in rows:
            if row["unknown"]:
                results[row["id"]] = job_service_pb2.CANCEL_RESULT_NOT_FOUND
            elif row["ended"]:
                results[row["id"]] = job_service_pb2.CANCEL_RESULT_ALREADY_TERMINAL

    async def retry(self, principal: str, request_id: str, job_number: int) -> int:
        """Submits a new job from a terminal job's spec; a dedupe key moves to the new one.

        Returns the new job's number.

        Raises:
            JobNotFound: There is no such job.
            JobNotTerminal: It has not ended.
            RequestIdReused: The request_id was used for something else.
            DatabaseUnavailable: The outcome is unknown; repeating with the same request_id is safe.
        """
        rows = await self._database.query(
            "SELECT j.spec, a.final_state FROM job AS j "
            "LEFT JOIN attempt AS a ON a.job_id = j.id AND a.final_state IS NOT NULL WHERE j.id = $1",
            job_number,
        )
        if not rows:
            raise JobNotFound(encode_job_id(job_number))
        if rows[0]["final_state"] is None:
            raise JobNotTerminal(encode_job_id(job_number), await self._state(job_number))
        spec = job_pb2.JobSpec.FromString(rows[0]["spec"])
        try:
            submissions = await self._submissions.prepare_all([spec], single=True, stored=True)
        except InvalidField as error:
            raise InvalidField([(f"job {encode_job_id(job_number)}: {f}", d) for f, d in error.violations]) from None
        request = Request(
            principal,
            request_id or secrets.token_hex(16),
            _fingerprint([b"retry", str(job_number).encode()]),
            [job._replace(terms=replace(job.terms, retry_of=job_number)) for job in await self._rows(submissions)],
        )
        if request.jobs[0].dedupe_key is not None:
            submitted = await submit_deduped(self._database, request, self._now, moved_from=job_number)
            self._bells.changed(waiting=True)
        else:
            submitted = await self._commit(request)
        return submitted.job_numbers[0]

    async def _state(self, job_number: int) -> JobState:
        rows = await self._database.query("SELECT phase FROM lease WHERE job_id = $1", job_number)
        if not rows:
            return JobState.QUEUED
        return JobState.LEASED if rows[0]["phase"] <= 2 else JobState.RUNNING


def _bytes_of(request: Request) -> int:
    # What a job costs beside its spec, in the same measure: some 10,000 small jobs fill a batch.
    return sum(1500 + len(job.spec) for job in request.jobs)


def _missing(numbers: Sequence[int], results: dict[int, int]) -> list[int]:
    return sorted({number for number in numbers if number not in results})


def _fingerprint(parts: Sequence[bytes]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()
