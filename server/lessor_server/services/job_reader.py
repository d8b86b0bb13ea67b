"""Looking at jobs: one, a page of them, their attempts."""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from collections.abc import Collection, Sequence
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from lessor.ids import decode_job_id, encode_job_id
from lessor.v1 import job_pb2, job_service_pb2
from lessor_server.domain.errors import InvalidField, JobNotFound
from lessor_server.domain.states import JobState
from lessor_server.services.job_view import attempt_proto, job_proto
from lessor_server.store.catalog import Catalog
from lessor_server.store.database import Database
from lessor_server.store.job_list_queries import Found, JobFilter, find_jobs
from lessor_server.store.job_queries import read_attempts, read_jobs

DEFAULT_PAGE_SIZE = 100

MAX_PAGE_BYTES = 3 << 20
"""Clients take messages of 4 MiB unless they say otherwise; a page of large specs is shorter."""

_JOBS_PER_READ = 100
_SHORT_CHARS = 200

_TOKEN = struct.Struct(">q8s")


def job_number(job_id: str, field: str = "job_id") -> int:
    """Returns the number of a public id.

    Raises:
        InvalidField: The text is no job id; ``field`` is named.
    """
    try:
        return decode_job_id(job_id)
    except ValueError as error:
        raise InvalidField([(field, str(error))]) from None


def job_numbers(job_ids: Collection[str], field: str = "job_ids") -> list[int]:
    """Returns the numbers of public ids, in their order.

    Raises:
        InvalidField: Some of the texts are no job ids; each is named.
    """
    numbers: list[int] = []
    faults: list[tuple[str, str]] = []
    for index, job_id in enumerate(job_ids):
        try:
            numbers.append(decode_job_id(job_id))
        except ValueError as error:
            faults.append((f"{field}[{index}]", str(error)))
    if faults:
        raise InvalidField(faults)
    return numbers


class JobReader:
    """Reads jobs of one database."""

    def __init__(self, database: Database, catalog: Catalog) -> None:
        self._database = database
        self._catalog = catalog

    async def get(self, number: int) -> job_pb2.Job:
        """Returns the job, as one snapshot shows it.

        Raises:
            JobNotFound: There is none of this number.
        """
        row = (await read_jobs(self._database, [number])).get(number)
        job = job_proto(row) if row else None
        if job is None:
            raise JobNotFound(encode_job_id(number))
        return job

    async def list(self, request: job_service_pb2.ListJobsRequest) -> job_service_pb2.ListJobsResponse:
        """Returns one page, newest first. See :func:`find_jobs` for what is bounded.

        Raises:
            QueueNotFound: The queue asked for does not exist.
            InvalidField: The page token is not one, or of other filters; a time is out of range.
        """
        before = _read_token(request) if request.page_token else None
        wanted = await self._filter(request)
        page_size = request.page_size or DEFAULT_PAGE_SIZE
        found = await find_jobs(self._database, wanted, before, page_size)
        jobs, resume_before = await self._page(found, wanted)
        response = job_service_pb2.ListJobsResponse(jobs=jobs)
        if resume_before is not None:
            response.next_page_token = _token(resume_before, _digest(request))
        return response

    async def _page(self, found: Found, wanted: JobFilter) -> tuple[Sequence[job_pb2.Job], int | None]:
        """Returns the jobs that were found, as many as a message may hold, and where the next page begins."""
        jobs: list[job_pb2.Job] = []
        size_bytes = 0
        for start in range(0, len(found.numbers), _JOBS_PER_READ):
            numbers = found.numbers[start : start + _JOBS_PER_READ]
            read = await read_jobs(self._database, numbers)
            for number in numbers:
                job = job_proto(read[number]) if number in read else None
                # It may have moved on since it was found: the page holds no job that does not match.
                if job is None or (wanted.states and JobState(job.state) not in wanted.states):
                    continue
                size_bytes += job.ByteSize()
                if jobs and size_bytes > MAX_PAGE_BYTES:
                    return jobs, number + 1
                jobs.append(job)
        return jobs, found.resume_before

    async def attempts(self, number: int) -> Sequence[job_pb2.Attempt]:
        """Returns all attempts of a job, oldest first; a live one comes last.

        Raises:
            JobNotFound: There is no such job.
        """
        found = await read_attempts(self._database, number)
        if found is None:
            raise JobNotFound(encode_job_id(number))
        return _fitted([attempt_proto(row) for row in found])

    async def _filter(self, request: job_service_pb2.ListJobsRequest) -> JobFilter:
        queue_id = await self._catalog.queue_id(request.queue) if request.queue else None
        return JobFilter(
            states=frozenset(JobState(state) for state in request.states),
            queue_id=queue_id,
            labels=dict(request.labels),
            name=request.name,
            submitted_after=_time(request, "submitted_after"),
            submitted_before=_time(request, "submitted_before"),
        )


def _fitted(attempts: Sequence[job_pb2.Attempt]) -> Sequence[job_pb2.Attempt]:
    """Makes the attempts fit into a message: the oldest errors are told without traceback, then in short."""
    size_bytes = sum(attempt.ByteSize() for attempt in attempts)
    for shorten in (_without_traceback, _with_short_message):
        for attempt in attempts:
            if size_bytes <= MAX_PAGE_BYTES:
                return attempts
            before = attempt.ByteSize()
            shorten(attempt)
            size_bytes -= before - attempt.ByteSize()
    return attempts


def _without_traceback(attempt: job_pb2.Attempt) -> None:
    if attempt.HasField("error"):
        attempt.error.ClearField("traceback")


def _with_short_message(attempt: job_pb2.Attempt) -> None:
    if len(attempt.error.message) > _SHORT_CHARS:
        attempt.error.message = attempt.error.message[: _SHORT_CHARS - 1] + "…"


def _time(request: job_service_pb2.ListJobsRequest, field: str) -> datetime | None:
    if not request.HasField(field):  # type: ignore[arg-type]
        return None
    value: Timestamp = getattr(request, field)
    try:
        return value.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise InvalidField(
            [(field, f"{value.seconds} s {value.nanos} ns is not a time of the years 1 to 9999")]
        ) from None


def _digest(request: job_service_pb2.ListJobsRequest) -> bytes:
    """Returns 8 bytes that tell the filters of one list from those of another."""
    filters = job_service_pb2.ListJobsRequest()
    filters.CopyFrom(request)
    filters.ClearField("page_size")
    filters.ClearField("page_token")
    states = sorted(set(filters.states))
    del filters.states[:]
    filters.states.extend(states)
    return hashlib.blake2b(filters.SerializeToString(deterministic=True), digest_size=8).digest()


def _token(before: int, digest: bytes) -> str:
    return base64.urlsafe_b64encode(_TOKEN.pack(before, digest)).decode("ascii").rstrip("=")


def _read_token(request: job_service_pb2.ListJobsRequest) -> int:
    text = request.page_token
    try:
        before, digest = _TOKEN.unpack(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (binascii.Error, ValueError, struct.error):
        raise InvalidField(
            [("page_token", f"{text!r} is not a token of this server: pass next_page_token as it came")]
        ) from None
    if digest != _digest(request):
        raise InvalidField([("page_token", "it belongs to a list with other filters: keep them, or begin anew")])
    number: int = before
    return number
