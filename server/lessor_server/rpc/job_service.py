"""JobService: from requests to the services and back. Nothing is decided here."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol

from lessor.ids import encode_job_id
from lessor.v1 import job_pb2, job_service_pb2, job_service_pb2_grpc
from lessor_server.rpc.handlers import Context
from lessor_server.services.explanation import Explainer
from lessor_server.services.job_reader import JobReader, job_number, job_numbers
from lessor_server.services.job_view import timestamp
from lessor_server.services.log_reader import LogReader
from lessor_server.services.watch import Watches, WatchRequest
from lessor_server.store.catalog import Catalog
from lessor_server.store.submit import Submitted


class JobWrites(Protocol):
    """What JobService needs of the write side. All of it raises LessorServerError."""

    async def submit(
        self, principal: str, request_id: str, specs: Sequence[job_pb2.JobSpec], *, single: bool = False
    ) -> Submitted:
        """Stores jobs, all or none; returning means committed."""

    async def cancel(self, job_numbers: Sequence[int]) -> list[int]:
        """Asks for jobs to be cancelled. Returns a CancelResult number per job, in order."""

    async def retry(self, principal: str, request_id: str, job_number: int) -> int:
        """Submits a new job from a terminal job's spec. Returns the new job's number."""


def principal_of(context: Context) -> str:
    """Returns who calls. Without credentials everybody is the same."""
    return "anonymous"


class JobServicer(job_service_pb2_grpc.JobServiceServicer):
    """Serves JobService."""

    def __init__(
        self,
        writes: JobWrites,
        reader: JobReader,
        watches: Watches,
        logs: LogReader,
        explainer: Explainer,
        catalog: Catalog,
    ) -> None:
        self._writes = writes
        self._reader = reader
        self._watches = watches
        self._logs = logs
        self._explainer = explainer
        self._catalog = catalog

    async def SubmitJob(
        self, request: job_service_pb2.SubmitJobRequest, context: Context
    ) -> job_service_pb2.SubmitJobResponse:
        """Submits one job."""
        submitted = await self._writes.submit(principal_of(context), request.request_id, [request.spec], single=True)
        return job_service_pb2.SubmitJobResponse(
            job_id=encode_job_id(submitted.job_numbers[0]), existing=submitted.existing
        )

    async def SubmitJobs(
        self, request: job_service_pb2.SubmitJobsRequest, context: Context
    ) -> job_service_pb2.SubmitJobsResponse:
        """Submits many jobs in one transaction."""
        submitted = await self._writes.submit(principal_of(context), request.request_id, request.specs)
        return job_service_pb2.SubmitJobsResponse(
            job_ids=[encode_job_id(number) for number in submitted.job_numbers], existing=submitted.existing
        )

    async def GetJob(self, request: job_service_pb2.GetJobRequest, context: Context) -> job_service_pb2.GetJobResponse:
        """Returns one job."""
        return job_service_pb2.GetJobResponse(job=await self._reader.get(job_number(request.job_id)))

    async def ListJobs(
        self, request: job_service_pb2.ListJobsRequest, context: Context
    ) -> job_service_pb2.ListJobsResponse:
        """Returns one page of jobs."""
        return await self._reader.list(request)

    async def WatchJobs(
        self, request: job_service_pb2.WatchJobsRequest, context: Context
    ) -> AsyncGenerator[job_service_pb2.WatchJobsResponse, None]:
        """Streams changes of jobs."""
        wanted = WatchRequest(
            numbers=job_numbers(request.job_ids),
            queue_id=await self._catalog.queue_id(request.queue) if request.queue else None,
            labels=dict(request.labels),
            cursor=request.cursor,
            include_progress=request.include_progress,
        )
        async with aclosing(self._watches.watch(wanted)) as responses:
            async for response in responses:
                yield response

    async def CancelJobs(
        self, request: job_service_pb2.CancelJobsRequest, context: Context
    ) -> job_service_pb2.CancelJobsResponse:
        """Asks for jobs to be cancelled."""
        results = await self._writes.cancel(job_numbers(request.job_ids))
        return job_service_pb2.CancelJobsResponse(
            results=[job_service_pb2.CancelResult.ValueType(result) for result in results]
        )

    async def RetryJob(
        self, request: job_service_pb2.RetryJobRequest, context: Context
    ) -> job_service_pb2.RetryJobResponse:
        """Submits a terminal job's spec again."""
        number = await self._writes.retry(principal_of(context), request.request_id, job_number(request.job_id))
        return job_service_pb2.RetryJobResponse(job_id=encode_job_id(number))

    async def StreamLogs(
        self, request: job_service_pb2.StreamLogsRequest, context: Context
    ) -> AsyncGenerator[job_service_pb2.StreamLogsResponse, None]:
        """Streams a job's log."""
        pieces = self._logs.stream(
            job_number(request.job_id),
            attempt=request.attempt,
            offset=request.offset,
            tail_lines=request.tail_lines,
            follow=request.follow,
        )
        async with aclosing(pieces):
            async for piece in pieces:
                yield job_service_pb2.StreamLogsResponse(
                    attempt=piece.attempt,
                    offset=piece.offset,
                    stream=job_pb2.LogStream.ValueType(piece.stream),
                    data=piece.data,
                    time=timestamp(piece.read_at),
                )

    async def ListAttempts(
        self, request: job_service_pb2.ListAttemptsRequest, context: Context
    ) -> job_service_pb2.ListAttemptsResponse:
        """Returns all attempts of a job."""
        return job_service_pb2.ListAttemptsResponse(attempts=await self._reader.attempts(job_number(request.job_id)))

    async def ExplainJob(
        self, request: job_service_pb2.ExplainJobRequest, context: Context
    ) -> job_service_pb2.ExplainJobResponse:
        """Says why a job is not running."""
        return await self._explainer.explain(job_number(request.job_id))
