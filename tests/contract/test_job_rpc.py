"""JobService, RPC by RPC, as a blocking client in any language sees it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from lessor.ids import decode_job_id, encode_job_id
from lessor.v1 import job_pb2, job_service_pb2_grpc
from lessor.v1 import job_service_pb2 as pb
from lessor_server.rpc.job_service import JobServicer
from tests.contract.conftest import ServerThread

TIMEOUT_S = 30


@pytest.fixture(scope="module")
def grpc_stub_cls(grpc_channel: grpc.Channel) -> type[job_service_pb2_grpc.JobServiceStub]:
    return job_service_pb2_grpc.JobServiceStub


def spec(**fields: Any) -> job_pb2.JobSpec:
    return job_pb2.JobSpec(command=job_pb2.Command(argv=["/bin/true", "x"]), **fields)


def submit(stub: Any, **fields: Any) -> str:
    return str(stub.SubmitJob(pb.SubmitJobRequest(spec=spec(**fields)), timeout=TIMEOUT_S).job_id)


def reason(error: Any) -> str:
    status = rpc_status.from_call(error)
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "lessor"
    return str(info.reason)


def test_every_rpc_of_the_contract_is_served() -> None:
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["JobService"].methods}
    assert {name for name in methods if name in vars(JobServicer)} == methods


def test_a_submitted_job_can_be_read_with_defaults_filled_in(grpc_stub: Any) -> None:
    job_id = submit(grpc_stub, labels={"team": "a"}, priority=7)
    job = grpc_stub.GetJob(pb.GetJobRequest(job_id=job_id), timeout=TIMEOUT_S).job
    assert (job.id, job.state, job.attempt) == (job_id, job_pb2.JOB_STATE_QUEUED, 0)
    assert (job.spec.name, job.spec.queue, job.spec.runtime) == ("true", "default", "process")
    assert (job.spec.priority, dict(job.spec.labels), list(job.spec.command.argv)) == (
        7,
        {"team": "a"},
        ["/bin/true", "x"],
    )
    assert job.HasField("submit_time")


def test_a_repeated_request_returns_the_same_job(grpc_stub: Any) -> None:
    request = pb.SubmitJobRequest(request_id="once", spec=spec())
    first = grpc_stub.SubmitJob(request, timeout=TIMEOUT_S)
    again = grpc_stub.SubmitJob(request, timeout=TIMEOUT_S)
    assert (first.existing, again.existing, first.job_id) == (False, True, again.job_id)
    other = pb.SubmitJobRequest(request_id="once", spec=spec(priority=1))
    with pytest.raises(grpc.RpcError) as refused:
        grpc_stub.SubmitJob(other, timeout=TIMEOUT_S)
    assert (refused.value.code(), reason(refused.value)) == (grpc.StatusCode.FAILED_PRECONDITION, "REQUEST_ID_REUSED")


def test_a_batch_is_listed_newest_first(grpc_stub: Any) -> None:
    specs = [spec(labels={"batch": "one"}, name=f"n{n}") for n in range(5)]
    ids = list(grpc_stub.SubmitJobs(pb.SubmitJobsRequest(specs=specs), timeout=TIMEOUT_S).job_ids)
    assert [decode_job_id(job_id) for job_id in ids] == sorted(decode_job_id(job_id) for job_id in ids)
    request = pb.ListJobsRequest(labels={"batch": "one"}, page_size=2, states=[job_pb2.JOB_STATE_QUEUED])
    told: list[str] = []
    while True:
        page = grpc_stub.ListJobs(request, timeout=TIMEOUT_S)
        told += [job.id for job in page.jobs]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert told == ids[::-1]


def test_cancel_tells_what_became_of_each_job(grpc_stub: Any) -> None:
    job_id = submit(grpc_stub)
    request = pb.CancelJobsRequest(job_ids=[job_id, encode_job_id(5)])
    assert list(grpc_stub.CancelJobs(request, timeout=TIMEOUT_S).results) == [
        pb.CANCEL_RESULT_CANCELLED, pb.CANCEL_RESULT_NOT_FOUND,
    ]  # fmt: skip
    again = grpc_stub.CancelJobs(request, timeout=TIMEOUT_S)
    assert again.results[0] == pb.CANCEL_RESULT_ALREADY_TERMINAL
    job = grpc_stub.GetJob(pb.GetJobRequest(job_id=job_id), timeout=TIMEOUT_S).job
    assert (job.state, job.outcome) == (job_pb2.JOB_STATE_CANCELLED, job_pb2.OUTCOME_CANCELLED)
    assert job.HasField("end_time")


def test_a_retry_is_a_new_job_that_names_the_old(grpc_stub: Any) -> None:
    job_id = submit(grpc_stub, name="again")
    with pytest.raises(grpc.RpcError) as refused:
        grpc_stub.RetryJob(pb.RetryJobRequest(job_id=job_id), timeout=TIMEOUT_S)
    assert reason(refused.value) == "JOB_NOT_TERMINAL"
    grpc_stub.CancelJobs(pb.CancelJobsRequest(job_ids=[job_id]), timeout=TIMEOUT_S)
    new_id = grpc_stub.RetryJob(pb.RetryJobRequest(job_id=job_id), timeout=TIMEOUT_S).job_id
    job = grpc_stub.GetJob(pb.GetJobRequest(job_id=new_id), timeout=TIMEOUT_S).job
    assert (job.retry_of, job.spec.name, job.state) == (job_id, "again", job_pb2.JOB_STATE_QUEUED)


def changes(watch: Iterator[pb.WatchJobsResponse], count: int) -> list[tuple[str, int]]:
    told: list[tuple[str, int]] = []
    while len(told) < count:
        told += [(change.job_id, change.state) for change in next(watch).changes]
    return told


def test_a_watch_tells_changes_and_resumes_by_cursor(grpc_stub: Any) -> None:
    watch = grpc_stub.WatchJobs(pb.WatchJobsRequest(), timeout=TIMEOUT_S)
    cursor = next(watch).cursor
    job_id = submit(grpc_stub)
    assert changes(watch, 1) == [(job_id, job_pb2.JOB_STATE_QUEUED)]
    grpc_stub.CancelJobs(pb.CancelJobsRequest(job_ids=[job_id]), timeout=TIMEOUT_S)
    assert changes(watch, 1) == [(job_id, job_pb2.JOB_STATE_CANCELLED)]
    watch.cancel()
    resumed = grpc_stub.WatchJobs(pb.WatchJobsRequest(cursor=cursor), timeout=TIMEOUT_S)
    assert changes(resumed, 2) == [(job_id, job_pb2.JOB_STATE_QUEUED), (job_id, job_pb2.JOB_STATE_CANCELLED)]
    resumed.cancel()
    ended = grpc_stub.WatchJobs(pb.WatchJobsRequest(job_ids=[job_id]), timeout=TIMEOUT_S)
    assert changes(ended, 1) == [(job_id, job_pb2.JOB_STATE_CANCELLED)]
    ended.cancel()


def test_a_log_and_attempts_are_read(grpc_stub: Any, grpc_server: ServerThread) -> None:
    rows = grpc_server.rows

    async def ended() -> int:
        number = await rows.job()
        lease_id = await rows.attempt(number, final_state=4, exit_code=0, result=b"{}")
        await rows.log(lease_id, b"one\n", b"oops\n", b"two\n", streams=[1, 2, 1])
        return number

    job_id = encode_job_id(grpc_server.run(ended()))
    request = pb.StreamLogsRequest(job_id=job_id, follow=True)
    assert [(c.attempt, c.offset, c.stream, c.data) for c in grpc_stub.StreamLogs(request, timeout=TIMEOUT_S)] == [
        (1, 0, job_pb2.LOG_STREAM_STDOUT, b"one\n"),
        (1, 4, job_pb2.LOG_STREAM_STDERR, b"oops\n"),
        (1, 9, job_pb2.LOG_STREAM_STDOUT, b"two\n"),
    ]
    tail = pb.StreamLogsRequest(job_id=job_id, tail_lines=1)
    assert [c.data for c in grpc_stub.StreamLogs(tail, timeout=TIMEOUT_S)] == [b"two\n"]
    (attempt,) = grpc_stub.ListAttempts(pb.ListAttemptsRequest(job_id=job_id), timeout=TIMEOUT_S).attempts
    assert (attempt.attempt, attempt.exit_code, attempt.log_bytes, attempt.outcome) == (1, 0, 13, 1)
    with pytest.raises(grpc.RpcError) as refused:
        next(grpc_stub.StreamLogs(pb.StreamLogsRequest(job_id=job_id, attempt=2), timeout=TIMEOUT_S))
    assert reason(refused.value) == "ATTEMPT_NOT_FOUND"


def test_a_waiting_job_is_explained(grpc_stub: Any) -> None:
    answer = grpc_stub.ExplainJob(pb.ExplainJobRequest(job_id=submit(grpc_stub)), timeout=TIMEOUT_S)
    assert answer.state == job_pb2.JOB_STATE_QUEUED
    assert answer.explanations[0].reason == pb.PENDING_REASON_NO_AGENT_CONNECTED
    assert answer.explanations[0].message


@pytest.mark.parametrize("call", ["GetJob", "ListAttempts", "ExplainJob", "RetryJob"])
def test_an_unknown_job_is_not_found(grpc_stub: Any, call: str) -> None:
    request = getattr(pb, f"{call}Request")(job_id=encode_job_id(5))
    with pytest.raises(grpc.RpcError) as refused:
        getattr(grpc_stub, call)(request, timeout=TIMEOUT_S)
    assert (refused.value.code(), reason(refused.value)) == (grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND")


def test_bad_submissions_leave_nothing_behind(grpc_stub: Any) -> None:
    bad = [
        (spec(queue="nowhere"), grpc.StatusCode.NOT_FOUND, "QUEUE_NOT_FOUND"),
        (spec(resources=job_pb2.Resources(gpu_count=-1)), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        (spec(name="a\0"), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        (
            job_pb2.JobSpec(command=job_pb2.Command(argv=["x" * 120_000] * 10)),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "TOO_LARGE",
        ),
    ]
    before = len(grpc_stub.ListJobs(pb.ListJobsRequest(page_size=1000), timeout=TIMEOUT_S).jobs)
    for body, code, why in bad:
        with pytest.raises(grpc.RpcError) as refused:
            grpc_stub.SubmitJobs(pb.SubmitJobsRequest(specs=[spec(), body]), timeout=TIMEOUT_S)
        assert (refused.value.code(), reason(refused.value)) == (code, why)
        assert "\n" not in (refused.value.details() or "")
    assert len(grpc_stub.ListJobs(pb.ListJobsRequest(page_size=1000), timeout=TIMEOUT_S).jobs) == before
