"""The asynchronous client. The synchronous one drives it: there is no second implementation."""

from __future__ import annotations

import builtins
import uuid
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Protocol, Self, TypeAlias, Unpack

from lessor.address import resolve_address
from lessor.errors import InvalidArgument, LessorError, QueueExists
from lessor.sdk.checks import int32, int64, text, texts
from lessor.sdk.connection import Connection, Patience
from lessor.sdk.draining import wait_until_idle
from lessor.sdk.enums import CancelResult, JobState, from_number
from lessor.sdk.fleet import Agent, Gpu, Lease, Queue
from lessor.sdk.following import stream_logs, wait_for_end, watch_changes
from lessor.sdk.jobs import Attempt, Explained, Job, JobChange, LogChunk, Submission
from lessor.sdk.specs import DurationLike, JobFields, JobSpec
from lessor.sdk.wire import time_message
from lessor.units import parse_duration
from lessor.v1 import fleet_service_pb2, job_pb2, job_service_pb2


class HasId(Protocol):
    """A Job or a Submission."""

    @property
    def id(self) -> str:
        """The job's id."""


JobRef: TypeAlias = str | HasId
"""A job: its full id, a Submission, or a Job."""

NO_LIMIT = -1
"""Takes a queue's limit away, in ``update_queue``."""


class AsyncClient:
    """Talks to a Lessor server from asyncio.

    Use it as an ``async with`` block, or :meth:`close` it. It connects at its
    first call and belongs to the event loop of that call. A process should run
    gRPC in one event loop only: do not use it beside a :class:`lessor.Client`.

    Every call is tried again while the server is unavailable, until its timeout;
    a submit keeps its ``request_id`` meanwhile and so makes one job. Errors are
    those of :mod:`lessor.errors`.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        timeout: DurationLike = 30,
        connect_timeout: DurationLike | None = None,
    ) -> None:
        """Prepares a client; nothing is sent yet.

        Args:
            address: ``host:port``. Default: LESSOR_ADDRESS, else 127.0.0.1:7780.
            timeout: For each call with its retries, and how long a stream may
                stay cut before it fails.
            connect_timeout: The same until the server has answered for the first
                time. Default: ``timeout``.

        Raises:
            InvalidArgument: The address or a timeout cannot be understood.
        """
        self._connection = Connection(
            resolve_address(address),
            Patience(
                timeout=parse_duration(timeout, field="timeout"),
                connect_timeout=None
                if connect_timeout is None
                else parse_duration(connect_timeout, field="connect_timeout"),
            ),
        )

    @property
    def address(self) -> str:
        """The server's address, ``host:port``."""
        return str(self._connection.address)

    async def close(self) -> None:
        """Closes the connection; open iterators end. May be called twice."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def submit(
        self, job: JobSpec | str | Sequence[str], *, request_id: str | None = None, **job_fields: Unpack[JobFields]
    ) -> Submission:
        """Submits one job; when it returns, the job survives any crash.

        ``submit(["python", "train.py"], gpus=1, memory="4GiB")``, or a JobSpec.

        Args:
            job: A JobSpec, or the command: program and arguments.
            request_id: Names the request: the same one within 7 days returns the
                same job. Default: a fresh one.
            **job_fields: Fields of the job beside its command; see JobFields.

        Raises:
            InvalidArgument: A field is wrong; ``violations`` names it.
            QueueNotFound: No such queue.
            RequestIdReused: The request_id was used for another job.
            TooLarge: The spec is larger than the server takes.
        """
        request = job_service_pb2.SubmitJobRequest(
            request_id=_request_id(request_id), spec=_spec(job, job_fields).to_proto()
        )
        response = await self._connection.call(self._connection.jobs.SubmitJob, request)
        return Submission(response.job_id, response.existing)

    async def submit_many(
        self, jobs: Iterable[JobSpec | str | Sequence[str]], *, request_id: str | None = None
    ) -> builtins.list[Submission]:
        """Submits many jobs (at most 10 000) in one transaction: all of them or none. In the order given.

        Raises:
            InvalidArgument: A field of one of them is wrong.
            QueueNotFound: One of their queues does not exist.
        """
        request = job_service_pb2.SubmitJobsRequest(
            request_id=_request_id(request_id), specs=[_spec(job, {}).to_proto() for job in jobs]
        )
        response = await self._connection.call(self._connection.jobs.SubmitJobs, request)
        return [Submission(job_id, response.existing) for job_id in response.job_ids]

    async def get(self, job: JobRef) -> Job:
        """Returns the job as it stands.

        Raises:
            JobNotFound: No such job.
        """
        request = job_service_pb2.GetJobRequest(job_id=job_id_of(job))
        response = await self._connection.call(self._connection.jobs.GetJob, request)
        return Job.from_proto(response.job)

    async def list(
        self,
        *,
        states: Iterable[JobState] = (),
        queue: str = "",
        labels: Mapping[str, str] | None = None,
        name: str = "",
        submitted_after: datetime | None = None,
        submitted_before: datetime | None = None,
        limit: int | None = None,
        page_size: int = 100,
    ) -> AsyncGenerator[Job, None]:
        """Iterates over jobs, newest first, page by page. All given filters must match.

        Args:
            states: Any of these; none: all.
            queue: This queue; empty: all.
            labels: These labels, all of them.
            name: Exactly this name; empty: all.
            submitted_after: Submitted at or after.
            submitted_before: Submitted before.
            limit: At most so many jobs; None: all of them.
            page_size: Jobs per call, 1–1000.
        """
        request = job_service_pb2.ListJobsRequest(
            states=[job_pb2.JobState.ValueType(state) for state in states],
            queue=text("queue", queue),
            labels=texts("labels", labels),
            name=text("name", name),
            submitted_after=time_message(submitted_after, field="submitted_after"),
            submitted_before=time_message(submitted_before, field="submitted_before"),
            page_size=int32("page_size", page_size),
        )
        left = limit
        while left is None or left > 0:
            request.page_size = page_size if left is None else min(page_size, left)
            page = await self._connection.call(self._connection.jobs.ListJobs, request)
            for job in page.jobs[:left]:
                yield Job.from_proto(job)
            if left is not None:
                left -= len(page.jobs)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def watch(
        self,
        jobs: JobRef | Iterable[JobRef] = (),
        *,
        queue: str = "",
        labels: Mapping[str, str] | None = None,
        cursor: str = "",
        include_progress: bool = False,
    ) -> AsyncGenerator[JobChange, None]:
        """Iterates over changes of jobs as they commit, without end; resumes after disconnects.

        With ``jobs`` given, the first changes tell where each of them stands. A
        change may come twice; none is skipped.

        Args:
            jobs: This job, or these (at most 10 000); none: all.
            queue: Jobs of this queue; empty: all.
            labels: Jobs with these labels.
            cursor: Of a change seen before: go on after it. Empty: from now.
            include_progress: Also the latest progress of ``jobs`` (1 to 100).

        Raises:
            CursorExpired: Changes were missed for good and no ``jobs`` were
                given whose standing could be told afresh: list, then watch again.
        """
        request = job_service_pb2.WatchJobsRequest(
            job_ids=job_ids_of(jobs),
            queue=text("queue", queue),
            labels=texts("labels", labels),
            cursor=text("cursor", cursor),
            include_progress=include_progress,
        )
        changes = watch_changes(self._connection, request)
        try:
            async for change in changes:
                yield change
        finally:
            await changes.aclose()

    async def wait(
        self,
        jobs: JobRef | Iterable[JobRef],
        *,
        timeout: DurationLike | None = None,  # noqa: ASYNC109
        recheck: DurationLike = 30,
    ) -> builtins.list[Job]:
        """Returns the jobs, in the order given, once all of them are terminal.

        Args:
            jobs: One job or many.
            timeout: Give up after so long, but not before each job was looked at
                once: 0 tells which have ended. Default: never.
            recheck: Without news for so long, ask for the jobs anyway.

        Raises:
            JobNotFound: One of them does not exist.
            WaitTimeout: The timeout passed; names the jobs still going and holds
                those that ended.
        """
        return await wait_for_end(
            self._connection,
            job_ids_of(jobs),
            self.get,
            give_up_after=None if timeout is None else parse_duration(timeout, field="timeout"),
            recheck=parse_duration(recheck, field="recheck"),
        )

    async def logs(
        self, job: JobRef, *, attempt: int = 0, offset: int = 0, tail: int = 0, follow: bool = False
    ) -> AsyncGenerator[LogChunk, None]:
        """Iterates over a job's log, each byte once, across disconnects.

        Args:
            job: Whose.
            attempt: This attempt only; 0: the latest, and with ``follow`` also
                those after it.
            offset: Begin at this byte of the first attempt read.
            tail: Begin this many lines before the end instead.
            follow: Go on until the job is terminal and its log complete.

        Raises:
            JobNotFound: No such job.
            AttemptNotFound: It has no such attempt.
        """
        request = job_service_pb2.StreamLogsRequest(
            job_id=job_id_of(job),
            attempt=int32("attempt", attempt),
            offset=int64("offset", offset),
            tail_lines=int32("tail", tail),
            follow=follow,
        )
        chunks = stream_logs(self._connection, request)
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            await chunks.aclose()

    async def attempts(self, job: JobRef) -> builtins.list[Attempt]:
        """Returns all attempts of a job, oldest first.

        Raises:
            JobNotFound: No such job.
        """
        request = job_service_pb2.ListAttemptsRequest(job_id=job_id_of(job))
        response = await self._connection.call(self._connection.jobs.ListAttempts, request)
        return [Attempt.from_proto(attempt) for attempt in response.attempts]

    async def cancel(self, jobs: JobRef | Iterable[JobRef]) -> dict[str, CancelResult]:
        """Asks for jobs to be cancelled; returns job id → what became of it.

        A waiting job is CANCELLED at once. A running one is asked to stop; one
        that exits 0 meanwhile has SUCCEEDED. An unknown id is NOT_FOUND here, no
        exception.
        """
        job_ids = list(dict.fromkeys(job_ids_of(jobs)))
        request = job_service_pb2.CancelJobsRequest(job_ids=job_ids)
        response = await self._connection.call(self._connection.jobs.CancelJobs, request)
        return {
            job_id: from_number(CancelResult, result) or CancelResult.REQUESTED
            for job_id, result in zip(job_ids, response.results, strict=True)
        }

    async def retry(self, job: JobRef, *, request_id: str | None = None) -> Submission:
        """Submits a new job from a terminal job's spec; the old one stays as it is.

        Raises:
            JobNotFound: No such job.
            JobNotTerminal: It has not ended yet.
        """
        request = job_service_pb2.RetryJobRequest(job_id=job_id_of(job), request_id=_request_id(request_id))
        response = await self._connection.call(self._connection.jobs.RetryJob, request)
        return Submission(response.job_id, existing=False)

    async def explain(self, job: JobRef) -> Explained:
        """Returns why a job is not running, in numbers.

        Raises:
            JobNotFound: No such job.
        """
        request = job_service_pb2.ExplainJobRequest(job_id=job_id_of(job))
        return Explained.from_proto(await self._connection.call(self._connection.jobs.ExplainJob, request))

    async def agents(self) -> builtins.list[Agent]:
        """Returns all agents, by name."""
        request = fleet_service_pb2.ListAgentsRequest()
        response = await self._connection.call(self._connection.fleet.ListAgents, request)
        return [Agent.from_proto(agent) for agent in response.agents]

    async def agent(self, agent: str) -> Agent:
        """Returns one agent, by id or name.

        Raises:
            AgentNotFound: No such agent.
        """
        request = fleet_service_pb2.GetAgentRequest(agent=text("agent", agent))
        return Agent.from_proto((await self._connection.call(self._connection.fleet.GetAgent, request)).agent)

    async def gpus(self, agent: str = "") -> builtins.list[Gpu]:
        """Returns the GPUs of one agent (id or name), or of all, by agent and index.

        Raises:
            AgentNotFound: No such agent.
        """
        request = fleet_service_pb2.ListGpusRequest(agent=text("agent", agent))
        response = await self._connection.call(self._connection.fleet.ListGpus, request)
        return [Gpu.from_proto(gpu) for gpu in response.gpus]

    async def leases(self, agent: str = "") -> AsyncGenerator[Lease, None]:
        """Iterates over the live leases of one agent (id or name), or of all, oldest first.

        Raises:
            AgentNotFound: No such agent.
        """
        request = fleet_service_pb2.ListLeasesRequest(agent=text("agent", agent), page_size=1000)
        while True:
            page = await self._connection.call(self._connection.fleet.ListLeases, request)
            for lease in page.leases:
                yield Lease.from_proto(lease)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def drain(
        self,
        agent: str,
        *,
        wait: bool = False,
        timeout: DurationLike | None = None,  # noqa: ASYNC109
    ) -> Agent:
        """Stops placing jobs on an agent (id or name). What runs there goes on.

        Once it returns, no lease is made there any more.

        Args:
            agent: Whose.
            wait: Return only when no lease is live there: every job it had has
                ended, and its whole log is stored or its attempt says where it was
                cut; or it stands elsewhere. Of an agent whose ``state`` is
                DISCONNECTED then, the host may still hold what it ran, frozen or
                running: nobody there could be asked.
            timeout: Wait no longer; the agent stays drained. Default: for ever.

        Raises:
            AgentNotFound: No such agent.
            FailedPrecondition: With ``wait``: somebody put it back (undrained it) meanwhile.
            WaitTimeout: Jobs were still running there; names them.
        """
        patience = None if timeout is None else parse_duration(timeout, field="timeout")
        request = fleet_service_pb2.DrainAgentRequest(agent=text("agent", agent))
        drained = Agent.from_proto((await self._connection.call(self._connection.fleet.DrainAgent, request)).agent)
        if not wait:
            return drained
        return await wait_until_idle(self._connection, drained, self.agent, self.leases, give_up_after=patience)

    async def undrain(self, agent: str) -> Agent:
        """Takes a drain back.

        Raises:
            AgentNotFound: No such agent.
        """
        request = fleet_service_pb2.UndrainAgentRequest(agent=text("agent", agent))
        return Agent.from_proto((await self._connection.call(self._connection.fleet.UndrainAgent, request)).agent)

    async def queues(self) -> builtins.list[Queue]:
        """Returns all queues, by name."""
        request = fleet_service_pb2.ListQueuesRequest()
        response = await self._connection.call(self._connection.fleet.ListQueues, request)
        return [Queue.from_proto(queue) for queue in response.queues]

    async def queue(self, name: str) -> Queue:
        """Returns one queue.

        Raises:
            QueueNotFound: No such queue.
        """
        request = fleet_service_pb2.GetQueueRequest(name=text("name", name))
        return Queue.from_proto((await self._connection.call(self._connection.fleet.GetQueue, request)).queue)

    async def create_queue(
        self, name: str, *, paused: bool = False, max_running: int | None = None, max_gpus: int | None = None
    ) -> Queue:
        """Makes a queue; a limit of None is none.

        Raises:
            QueueExists: There is one of that name.
            InvalidArgument: The name or a limit is not allowed.
        """
        _check_limits(0, max_running=max_running, max_gpus=max_gpus)
        queue = fleet_service_pb2.Queue(
            name=text("name", name), paused=paused, max_running=max_running, max_gpus=max_gpus
        )

        async def made_by_first_try(error: LessorError) -> fleet_service_pb2.CreateQueueResponse | None:
            if not isinstance(error, QueueExists):
                return None
            request = fleet_service_pb2.GetQueueRequest(name=name)
            there = (await self._connection.call(self._connection.fleet.GetQueue, request)).queue
            wanted = Queue.from_proto(queue)
            found = Queue.from_proto(there)
            same = (found.paused, found.max_running, found.max_gpus) == (paused, wanted.max_running, wanted.max_gpus)
            return fleet_service_pb2.CreateQueueResponse(queue=there) if same else None

        response = await self._connection.call(
            self._connection.fleet.CreateQueue,
            fleet_service_pb2.CreateQueueRequest(queue=queue),
            recover=made_by_first_try,
        )
        return Queue.from_proto(response.queue)

    async def update_queue(
        self, name: str, *, paused: bool | None = None, max_running: int | None = None, max_gpus: int | None = None
    ) -> Queue:
        """Changes what is given; None leaves it as it is, a limit of NO_LIMIT (-1) takes it away.

        Raises:
            QueueNotFound: No such queue.
        """
        _check_limits(NO_LIMIT, max_running=max_running, max_gpus=max_gpus)
        request = fleet_service_pb2.UpdateQueueRequest(
            name=text("name", name), paused=paused, max_running=max_running, max_gpus=max_gpus
        )
        return Queue.from_proto((await self._connection.call(self._connection.fleet.UpdateQueue, request)).queue)


def job_id_of(job: JobRef) -> str:
    """Returns the id of a job given as id, Submission or Job."""
    job_id = job if isinstance(job, str) else job.id
    if not job_id:
        raise InvalidArgument(violations={"job": "is empty; give a job's id"})
    return text("job", job_id)


def _request_id(given: str | None) -> str:
    """Returns the request_id that was given, else a fresh one."""
    return text("request_id", given) if given else str(uuid.uuid4())


def job_ids_of(jobs: JobRef | Iterable[JobRef]) -> builtins.list[str]:
    """Returns the ids of one job or of many."""
    refs: Iterable[JobRef] = [jobs] if isinstance(jobs, str) or not isinstance(jobs, Iterable) else jobs
    return [job_id_of(job) for job in refs]


def _spec(job: JobSpec | str | Sequence[str], job_fields: JobFields) -> JobSpec:
    if not isinstance(job, JobSpec):
        return JobSpec.of(job, **job_fields)
    if job_fields:
        given = ", ".join(job_fields)
        raise InvalidArgument(
            f"a JobSpec and the fields {given} were given", remedy="dataclasses.replace(spec, …) changes a spec"
        )
    return job


def _check_limits(least: int, **limits: int | None) -> None:
    for name, limit in limits.items():
        if limit is not None and not least <= limit < 2**31:
            none = "None" if least == 0 else "-1"
            raise InvalidArgument(violations={name: f"{limit} is not a limit; give 0 or more, or {none} for no limit"})
