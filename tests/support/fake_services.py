"""A small Lessor server in memory, for tests of the client side.

It keeps just enough of the contract: jobs move only when a test moves them
(:meth:`FakeServer.start`, :meth:`FakeServer.log`, :meth:`FakeServer.end`, …).
:attr:`FakeServer.faults` makes calls fail before or after their work is done.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from lessor.ids import encode_job_id
from lessor.v1 import (
    errors_pb2,
    fleet_service_pb2,
    fleet_service_pb2_grpc,
    job_pb2,
    job_service_pb2,
    job_service_pb2_grpc,
)
from tests.support.fake_world import FakeWorld

TERMINAL = {job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED}

CODES = {
    "INVALID_FIELD": code_pb2.INVALID_ARGUMENT,
    "JOB_NOT_FOUND": code_pb2.NOT_FOUND,
    "QUEUE_NOT_FOUND": code_pb2.NOT_FOUND,
    "QUEUE_EXISTS": code_pb2.ALREADY_EXISTS,
    "AGENT_NOT_FOUND": code_pb2.NOT_FOUND,
    "ATTEMPT_NOT_FOUND": code_pb2.NOT_FOUND,
    "JOB_NOT_TERMINAL": code_pb2.FAILED_PRECONDITION,
    "REQUEST_ID_REUSED": code_pb2.FAILED_PRECONDITION,
    "CURSOR_EXPIRED": code_pb2.OUT_OF_RANGE,
    "PROTOCOL_UNSUPPORTED": code_pb2.FAILED_PRECONDITION,
    "AGENT_IDENTITY_IN_USE": code_pb2.FAILED_PRECONDITION,
    "PROTOCOL_VIOLATION": code_pb2.FAILED_PRECONDITION,
    "DATABASE_UNAVAILABLE": code_pb2.UNAVAILABLE,
    "CONTENDED": code_pb2.UNAVAILABLE,
    "STOPPING": code_pb2.UNAVAILABLE,
    "TOO_LARGE": code_pb2.RESOURCE_EXHAUSTED,
}


def abort(context: grpc.ServicerContext, reason: str, message: str, **violations: str) -> None:
    """Ends the call with a reason of ErrorReason, as the server does."""
    details = []
    for detail in (
        error_details_pb2.ErrorInfo(reason=reason, domain="lessor"),
        error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(field=name.replace("__", "."), description=text)
                for name, text in violations.items()
            ]
        ),
    ):
        packed = any_pb2.Any()
        packed.Pack(detail)
        details.append(packed)
    status = status_pb2.Status(code=CODES[reason], message=message, details=details)
    context.abort_with_status(rpc_status.to_status(status))


@dataclass
class Fault:
    """One failure of one call of ``rpc``."""

    rpc: str
    reason: str = "STOPPING"
    after: bool = False
    """True: the work is done, only the answer is lost. In a stream: after ``messages``."""
    messages: int = 0
    code: grpc.StatusCode | None = None
    """Instead of ``reason``: a bare status, as gRPC itself makes it."""
    hold: threading.Event | None = None
    """Waited for before failing."""


@dataclass
class FakeServer(FakeWorld, job_service_pb2_grpc.JobServiceServicer, fleet_service_pb2_grpc.FleetServiceServicer):
    """Both services of a :class:`FakeWorld`."""

    requests: list[tuple[str, Any]] = field(default_factory=list)
    """Every request received, in order: (rpc, message)."""
    faults: list[Fault] = field(default_factory=list)
    on_submit: Callable[[str], None] | None = None
    """Called with the id of each new job, in a thread of its own."""
    on_cancel: Callable[[str], None] | None = None
    explanation: job_service_pb2.Explanation | None = None
    oldest_cursor: int = 0
    """A cursor below it has expired."""
    drained_state: fleet_service_pb2.AgentState.ValueType = fleet_service_pb2.AGENT_STATE_DRAINING
    """What is told of an agent that has been drained."""
    address: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.by_request: dict[str, list[str]] = {}
        self.by_key: dict[tuple[str, str], str] = {}
        self.stopped = False

    def count(self, rpc: str) -> int:
        return sum(1 for name, _ in self.requests if name == rpc)

    # -- plumbing -----------------------------------------------------------

    def _enter(self, rpc: str, request: Any, context: grpc.ServicerContext) -> Fault | None:
        with self.news:
            self.requests.append((rpc, request))
            self.news.notify_all()
            fault = next((fault for fault in self.faults if fault.rpc == rpc), None)
            if fault is not None:
                self.faults.remove(fault)
        if fault is not None and not fault.after and not fault.messages:
            self._fail(fault, context)
        return fault

    def _fail(self, fault: Fault, context: grpc.ServicerContext) -> None:
        if fault.hold is not None:
            fault.hold.wait(30)
        if fault.code is not None:
            context.abort(fault.code, "from gRPC itself")
        abort(context, fault.reason, f"a {fault.reason} for this test")

    def _leave(self, fault: Fault | None, context: grpc.ServicerContext) -> None:
        if fault is not None:
            self._fail(fault, context)

    def _job(self, job_id: str, context: grpc.ServicerContext) -> job_pb2.Job:
        if job_id not in self.jobs:
            abort(context, "JOB_NOT_FOUND", f"no job {job_id!r}")
        return self.jobs[job_id]

    def _add(self, spec: job_pb2.JobSpec, retry_of: str = "") -> str:
        job_id = encode_job_id(len(self.jobs) + 1)
        job = job_pb2.Job(id=job_id, spec=spec, state=job_pb2.JOB_STATE_QUEUED, retry_of=retry_of)
        job.spec.name = spec.name or spec.command.argv[0].rpartition("/")[2]
        job.spec.queue = spec.queue or "default"
        job.spec.runtime = spec.runtime or "process"
        job.submit_time.GetCurrentTime()
        self.jobs[job_id] = job
        self.change(job_id, job_pb2.JOB_STATE_QUEUED)
        if self.on_submit is not None:
            self.script(partial(self.on_submit, job_id))
        return job_id

    # -- JobService ---------------------------------------------------------

    def SubmitJob(self, request, context):  # type: ignore[no-untyped-def]
        fault = self._enter("SubmitJob", request, context)
        spec = request.spec
        if (spec.queue or "default") not in self.queue_rows:
            abort(context, "QUEUE_NOT_FOUND", f"no queue {spec.queue!r}")
        if spec.priority > 1000:
            abort(context, "INVALID_FIELD", "invalid", spec__priority="must be at most 1000")
        with self.news:
            existing = True
            key = (spec.queue, spec.dedupe_key)
            if request.request_id in self.by_request:
                [job_id] = self.by_request[request.request_id]
            elif spec.dedupe_key and key in self.by_key:
                job_id = self.by_key[key]
            else:
                existing = False
                job_id = self._add(spec)
                self.by_key[key] = job_id
                if request.request_id:
                    self.by_request[request.request_id] = [job_id]
        self._leave(fault, context)
        return job_service_pb2.SubmitJobResponse(job_id=job_id, existing=existing)

    def SubmitJobs(self, request, context):  # type: ignore[no-untyped-def]
        fault = self._enter("SubmitJobs", request, context)
        with self.news:
            existing = request.request_id in self.by_request
            if not existing:
                self.by_request[request.request_id] = [self._add(spec) for spec in request.specs]
        self._leave(fault, context)
        return job_service_pb2.SubmitJobsResponse(job_ids=self.by_request[request.request_id], existing=existing)

    def GetJob(self, request, context):  # type: ignore[no-untyped-def]
        fault = self._enter("GetJob", request, context)
        self._leave(fault, context)
        with self.news:
            return job_service_pb2.GetJobResponse(job=self._job(request.job_id, context))

    def ListJobs(self, request, context):  # type: ignore[no-untyped-def]
        self._enter("ListJobs", request, context)
        found = [
            job
            for job in reversed(self.jobs.values())
            if (not request.states or job.state in request.states)
            and (not request.queue or job.spec.queue == request.queue)
            and (not request.name or job.spec.name == request.name)
            and all(job.spec.labels.get(key) == value for key, value in request.labels.items())
            and (
                not request.HasField("submitted_after")
                or job.submit_time.ToNanoseconds() >= request.submitted_after.ToNanoseconds()
            )
        ]
        start = int(request.page_token or 0)
        end = start + (request.page_size or 100)
        return job_service_pb2.ListJobsResponse(
            jobs=found[start:end], next_page_token=str(end) if end < len(found) else ""
        )

    def WatchJobs(self, request, context) -> Iterator[job_service_pb2.WatchJobsResponse]:  # type: ignore[no-untyped-def]
        fault = self._enter("WatchJobs", request, context)
        if request.cursor and int(request.cursor) < self.oldest_cursor:
            abort(context, "CURSOR_EXPIRED", "the cursor is too old")
        with self.news:
            position = int(request.cursor) if request.cursor else len(self.changes)
            snapshot = [
                job_service_pb2.JobChange(job_id=job_id, state=job.state, attempt=job.attempt)
                for job_id in request.job_ids
                if (job := self.jobs.get(job_id)) is not None
            ]
            if request.include_progress:
                for job_id in request.job_ids:
                    if job_id in self.jobs and self.jobs[job_id].HasField("progress"):
                        snapshot.append(
                            job_service_pb2.JobChange(
                                job_id=job_id,
                                state=self.jobs[job_id].state,
                                attempt=self.jobs[job_id].attempt,
                                progress=self.jobs[job_id].progress,
                            )
                        )
        sent = 0
        yield job_service_pb2.WatchJobsResponse(changes=snapshot, cursor=str(position))
        while context.is_active() and not self.stopped:
            sent += 1
            if fault is not None and sent >= fault.messages:
                self._fail(fault, context)
            with self.news:
                if len(self.changes) <= position and not self.stopped:
                    self.news.wait(0.1)
                fresh = self.changes[position:]
                position = len(self.changes)
            fresh = [
                change
                for change in fresh
                if (not request.job_ids or change.job_id in request.job_ids)
                and (not request.queue or self.jobs[change.job_id].spec.queue == request.queue)
                and (request.include_progress or not change.HasField("progress"))
            ]
            if fresh:
                yield job_service_pb2.WatchJobsResponse(changes=fresh, cursor=str(position))
            else:
                sent -= 1
        if self.stopped:
            abort(context, "STOPPING", "stopping")

    def CancelJobs(self, request, context):  # type: ignore[no-untyped-def]
        self._enter("CancelJobs", request, context)
        results = []
        for job_id in request.job_ids:
            job = self.jobs.get(job_id)
            if job is None:
                results.append(job_service_pb2.CANCEL_RESULT_NOT_FOUND)
            elif job.state in TERMINAL:
                results.append(job_service_pb2.CANCEL_RESULT_ALREADY_TERMINAL)
            elif job.state == job_pb2.JOB_STATE_QUEUED:
                self.end(job_id, job_pb2.JOB_STATE_CANCELLED)
                results.append(job_service_pb2.CANCEL_RESULT_CANCELLED)
            else:
                job.cancel_requested = True
                results.append(job_service_pb2.CANCEL_RESULT_REQUESTED)
                if self.on_cancel is not None:
                    self.script(partial(self.on_cancel, job_id))
        return job_service_pb2.CancelJobsResponse(results=results)

    def RetryJob(self, request, context):  # type: ignore[no-untyped-def]
        self._enter("RetryJob", request, context)
        job = self._job(request.job_id, context)
        if job.state not in TERMINAL:
            abort(context, "JOB_NOT_TERMINAL", f"job {job.id} has not ended")
        return job_service_pb2.RetryJobResponse(job_id=self._add(job.spec, retry_of=job.id))

    def StreamLogs(self, request, context) -> Iterator[job_service_pb2.StreamLogsResponse]:  # type: ignore[no-untyped-def]
        fault = self._enter("StreamLogs", request, context)
        job = self._job(request.job_id, context)
        if request.attempt > job.attempt:
            abort(context, "ATTEMPT_NOT_FOUND", f"job {job.id} has no attempt {request.attempt}")
        attempt = request.attempt or job.attempt or 1
        offset = request.offset
        if request.tail_lines:
            whole = b"".join(chunk.data for chunk in self.logs[job.id, attempt])
            offset = len(whole) - len(b"".join(whole.splitlines(keepends=True)[-request.tail_lines :]))
        sent = 0
        while context.is_active():
            with self.news:
                chunks = [chunk for chunk in self.logs[job.id, attempt] if chunk.offset + len(chunk.data) > offset]
                complete = (job.id, attempt) in self.logs_complete
                over = job.state in TERMINAL
                later = job.attempt > attempt
                if self.stopped:
                    abort(context, "STOPPING", "stopping")
            for chunk in chunks:
                piece = job_service_pb2.StreamLogsResponse()
                piece.CopyFrom(chunk)
                skip = max(0, offset - chunk.offset)
                piece.data = chunk.data[skip:]
                piece.offset = chunk.offset + skip
                if fault is not None and sent >= fault.messages:
                    self._fail(fault, context)
                yield piece
                sent += 1
                offset = chunk.offset + len(chunk.data)
            if chunks:
                continue
            if fault is not None and sent >= fault.messages and fault.messages:
                self._fail(fault, context)
            if not request.follow:
                return
            if complete or over:
                if request.attempt or (over and not later):
                    return
                if later:
                    attempt, offset = attempt + 1, 0
                    continue
            with self.news:
                self.news.wait(0.05)

    def ListAttempts(self, request, context):  # type: ignore[no-untyped-def]
        self._enter("ListAttempts", request, context)
        job = self._job(request.job_id, context)
        return job_service_pb2.ListAttemptsResponse(attempts=self.attempts[job.id])

    def ExplainJob(self, request, context):  # type: ignore[no-untyped-def]
        self._enter("ExplainJob", request, context)
        job = self._job(request.job_id, context)
        explanation = self.explanation or job_service_pb2.Explanation(
            reason=job_service_pb2.PENDING_REASON_NO_AGENT_CONNECTED,
            message="no agent is connected",
            remedy="start one with `lessor agent`",
            numbers={"agents": 0},
        )
        return job_service_pb2.ExplainJobResponse(state=job.state, explanations=[explanation])

    # -- FleetService -------------------------------------------------------

    def _agent(self, ref: str, context: grpc.ServicerContext) -> fleet_service_pb2.Agent:
        for agent in self.agent_rows.values():
            if ref in (agent.id, agent.name):
                return agent
        abort(context, "AGENT_NOT_FOUND", f"no agent {ref!r}")
        raise AssertionError

    def _queue(self, name: str, context: grpc.ServicerContext) -> fleet_service_pb2.Queue:
        if name not in self.queue_rows:
            abort(context, "QUEUE_NOT_FOUND", f"no queue {name!r}")
        return self.queue_rows[name]

    def ListAgents(self, request, context):  # type: ignore[no-untyped-def]
        self._enter("ListAgents", request, context)
        return fleet_service_pb2.ListAgentsResponse(agents=self.agent_rows.values())

    def GetAgent(self, request, context):  # type: ignore[no-untyped-def]
        self._enter("GetAgent", request, context)
        return fleet_service_pb2.GetAgentResponse(agent=self._agent(request.agent, context))

    def ListGpus(self, request, context):  # type: ignore[no-untyped-def]
        if request.agent:
            self._agent(request.agent, context)
        return fleet_service_pb2.ListGpusResponse(
            gpus=[gpu for gpu in self.gpu_rows if not request.agent or gpu.agent == request.agent]
        )

    def ListLeases(self, request, context):  # type: ignore[no-untyped-def]
        self._enter("ListLeases", request, context)
        start = int(request.page_token or 0)
        more = start + 1 < len(self.lease_rows)
        return fleet_service_pb2.ListLeasesResponse(
            leases=self.lease_rows[start : start + 1], next_page_token=str(start + 1) if more else ""
        )

    def DrainAgent(self, request, context):  # type: ignore[no-untyped-def]
        agent = self._agent(request.agent, context)
        agent.drained, agent.state = True, self.drained_state
        return fleet_service_pb2.DrainAgentResponse(agent=agent)

    def UndrainAgent(self, request, context):  # type: ignore[no-untyped-def]
        agent = self._agent(request.agent, context)
        agent.drained, agent.state = False, fleet_service_pb2.AGENT_STATE_ACTIVE
        return fleet_service_pb2.UndrainAgentResponse(agent=agent)

    def CreateQueue(self, request, context):  # type: ignore[no-untyped-def]
        fault = self._enter("CreateQueue", request, context)
        if request.queue.name in self.queue_rows:
            abort(context, "QUEUE_EXISTS", f"there is a queue {request.queue.name!r}")
        self.queue_rows[request.queue.name] = request.queue
        self._leave(fault, context)
        return fleet_service_pb2.CreateQueueResponse(queue=request.queue)

    def UpdateQueue(self, request, context):  # type: ignore[no-untyped-def]
        queue = self._queue(request.name, context)
        if request.HasField("paused"):
            queue.paused = request.paused
        for limit in ("max_running", "max_gpus"):
            if request.HasField(limit):
                if getattr(request, limit) < 0:
                    queue.ClearField(limit)
                else:
                    setattr(queue, limit, getattr(request, limit))
        return fleet_service_pb2.UpdateQueueResponse(queue=queue)

    def GetQueue(self, request, context):  # type: ignore[no-untyped-def]
        return fleet_service_pb2.GetQueueResponse(queue=self._queue(request.name, context))

    def ListQueues(self, request, context):  # type: ignore[no-untyped-def]
        self._enter("ListQueues", request, context)
        return fleet_service_pb2.ListQueuesResponse(queues=self.queue_rows.values())

    # -- serving ------------------------------------------------------------

    def serve(self, address: str = "127.0.0.1:0") -> None:
        self.stopped = False
        self._server = grpc.server(
            futures.ThreadPoolExecutor(32),
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 16 * 2**20)],
        )
        job_service_pb2_grpc.add_JobServiceServicer_to_server(self, self._server)
        fleet_service_pb2_grpc.add_FleetServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(address)
        self.address = f"127.0.0.1:{port}"
        self._server.start()

    def stop(self, grace_s: float | None = None) -> None:
        with self.news:
            self.stopped = True
            self.news.notify_all()
        self._server.stop(grace_s).wait(10)

    def __enter__(self) -> Self:
        self.serve()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops and raises what a script raised."""
        deadline = time.monotonic() + 10
        for thread in self.scripts:
            thread.join(max(0, deadline - time.monotonic()))
        self.stop()
        if self.script_errors:
            raise self.script_errors[0]


def all_reasons() -> list[str]:
    """The names of ErrorReason without prefix, but for UNSPECIFIED."""
    return [name.removeprefix("ERROR_REASON_") for name in errors_pb2.ErrorReason.keys()][1:]  # noqa: SIM118
