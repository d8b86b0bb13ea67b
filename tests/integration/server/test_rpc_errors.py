"""What a caller sees when a call goes wrong, through a real server and a real channel."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from lessor.ids import encode_job_id
from lessor.v1 import agent_service_pb2 as agents_pb
from lessor.v1 import agent_service_pb2_grpc, errors_pb2, fleet_service_pb2_grpc, job_pb2, job_service_pb2_grpc
from lessor.v1 import fleet_service_pb2 as fleet_pb
from lessor.v1 import job_service_pb2 as pb
from lessor_server.bells import Bells
from lessor_server.domain import errors
from lessor_server.domain.states import JobState
from lessor_server.rpc.endpoint import SERVICES, Endpoint
from lessor_server.rpc.errors import STATUS_CODES, to_status
from lessor_server.rpc.validation import MAX_SPECS
from lessor_server.store.catalog import Catalog
from lessor_server.store.database import Database
from lessor_server.store.submit import Submitted
from tests.support.rows import Rows, spec
from tests.support.waiting import until

EVERY_ERROR: list[errors.LessorServerError] = [
    errors.InvalidField([("spec.name", "must be short")]),
    errors.JobNotFound("j1"),
    errors.QueueNotFound("q"),
    errors.AgentNotFound("a"),
    errors.AttemptNotFound("j1", 3, 2),
    errors.QueueExists("q"),
    errors.JobNotTerminal("j1", JobState.RUNNING),
    errors.RequestIdReused("r", "a batch of 3 jobs"),
    errors.CursorExpired("c", errors.CursorFault.TOO_OLD),
    errors.ProtocolUnsupported(0, 1, 1),
    errors.AgentIdentityInUse("a", "host", 1),
    errors.ProtocolViolation("a", "sent nonsense"),
    errors.DatabaseUnavailable("gone"),
    errors.Contended("j1", 5),
    errors.Stopping(),
    errors.TooLarge("spec", 2, 1),
]


class Writes:
    """The write side: does as told by the test."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.submitted: list[tuple[str, str, list[job_pb2.JobSpec], bool]] = []
        self.entered = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.finished = asyncio.Event()

    async def _do(self) -> None:
        self.entered.set()
        await self.go_on.wait()
        self.finished.set()
        if self.error is not None:
            raise self.error

    async def submit(
        self, principal: str, request_id: str, specs: Sequence[job_pb2.JobSpec], *, single: bool = False
    ) -> Submitted:
        await self._do()
        self.submitted.append((principal, request_id, list(specs), single))
        return Submitted(list(range(1, len(specs) + 1)), False)

    async def cancel(self, job_numbers: Sequence[int]) -> list[int]:
        await self._do()
        return [pb.CANCEL_RESULT_REQUESTED] * len(job_numbers)

    async def retry(self, principal: str, request_id: str, job_number: int) -> int:
        await self._do()
        return job_number + 1


class Agents(agent_service_pb2_grpc.AgentServiceServicer):
    """Keeps what agents say; an agent that says goodbye is answered."""

    def __init__(self) -> None:
        self.heard: list[str | None] = []
        self.error: Exception | None = None

    # An async method that writes to its context is as good as the generator that the stubs know of.
    async def Connect(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        if self.error is not None:
            raise self.error
        async for request in request_iterator:
            self.heard.append(request.WhichOneof("message"))
            if request.WhichOneof("message") == "goodbye":
                await context.write(agents_pb.ConnectResponse(reconnect=agents_pb.Reconnect(reason="bye")))


class Served:
    """An endpoint, and stubs that talk to it."""

    def __init__(self, endpoint: Endpoint, writes: Writes, agents: Agents, channel: aio.Channel, port: int) -> None:
        self.endpoint = endpoint
        self.writes = writes
        self.agents = agents
        self.channel = channel
        self.port = port
        self.jobs = job_service_pb2_grpc.JobServiceStub(channel)
        self.fleet = fleet_service_pb2_grpc.FleetServiceStub(channel)
        # The type stubs know no stream-stream call that is written to later.
        self.agent: Any = agent_service_pb2_grpc.AgentServiceStub(channel)
        self.stopped = False

    async def stop(self, grace_s: float = 5) -> None:
        if not self.stopped:
            self.stopped = True
            await self.endpoint.stop(grace_s)


@pytest.fixture
async def served(database: Database, catalog: Catalog, bells: Bells) -> AsyncGenerator[Served, None]:
    writes, agents = Writes(), Agents()
    endpoint = Endpoint(database, catalog, bells, writes, agents)
    port = await endpoint.start("127.0.0.1", 0)
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        made = Served(endpoint, writes, agents, channel, port)
        yield made
    await made.stop(0)


async def refused(call: Any) -> aio.AioRpcError:
    with pytest.raises(aio.AioRpcError) as failure:
        async with asyncio.timeout(60):
            await call
    return failure.value


def detail(error: Any, kind: type[Any]) -> Any:
    """The one detail of this kind; None: there is none."""
    status = rpc_status.from_call(error)
    found = []
    for packed in status.details if status else ():
        if packed.Is(kind.DESCRIPTOR):
            value = kind()
            packed.Unpack(value)
            found.append(value)
    assert len(found) <= 1
    return found[0] if found else None


def violations(error: Any) -> dict[str, str]:
    return {v.field: v.description for v in detail(error, error_details_pb2.BadRequest).field_violations}


# ---------------------------------------------------------------- errors


def leaves(kind: type[errors.LessorServerError]) -> set[type[errors.LessorServerError]]:
    return {leaf for sub in kind.__subclasses__() for leaf in leaves(sub)} or {kind}


def test_every_error_has_a_status_and_every_reason_an_error() -> None:
    assert set(STATUS_CODES) == leaves(errors.LessorServerError) - {errors.SchemaMismatch}
    assert {type(error) for error in EVERY_ERROR} == set(STATUS_CODES)
    reasons = {name.removeprefix("ERROR_REASON_") for name in errors_pb2.ErrorReason.keys()}  # noqa: SIM118 - no dict
    reasons.remove("UNSPECIFIED")
    assert {error.reason for error in STATUS_CODES} == reasons


def test_each_status_is_the_one_the_contract_names() -> None:
    documented = {
        "INVALID_FIELD": "INVALID_ARGUMENT", "JOB_NOT_FOUND": "NOT_FOUND", "QUEUE_NOT_FOUND": "NOT_FOUND",
        "QUEUE_EXISTS": "ALREADY_EXISTS", "AGENT_NOT_FOUND": "NOT_FOUND", "ATTEMPT_NOT_FOUND": "NOT_FOUND",
        "JOB_NOT_TERMINAL": "FAILED_PRECONDITION", "REQUEST_ID_REUSED": "FAILED_PRECONDITION",
        "CURSOR_EXPIRED": "OUT_OF_RANGE", "PROTOCOL_UNSUPPORTED": "FAILED_PRECONDITION",
        "AGENT_IDENTITY_IN_USE": "FAILED_PRECONDITION", "PROTOCOL_VIOLATION": "FAILED_PRECONDITION",
        "DATABASE_UNAVAILABLE": "UNAVAILABLE", "CONTENDED": "UNAVAILABLE", "STOPPING": "UNAVAILABLE",
        "TOO_LARGE": "RESOURCE_EXHAUSTED",
    }  # fmt: skip
    assert {error.reason: code.name for error, code in STATUS_CODES.items()} == documented


@pytest.mark.parametrize("error", EVERY_ERROR, ids=lambda error: error.reason)
async def test_an_error_arrives_with_its_reason_and_details(served: Served, error: errors.LessorServerError) -> None:
    served.writes.error = error
    seen = await refused(served.jobs.SubmitJob(pb.SubmitJobRequest(spec=spec())))
    assert seen.code() is STATUS_CODES[type(error)]
    assert seen.details() == " ".join(error.message.split())
    info = detail(seen, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain, dict(info.metadata)) == (error.reason, "lessor", error.details)
    retry = detail(seen, error_details_pb2.RetryInfo)
    assert (retry.retry_delay.ToTimedelta() if retry else None) == error.retry_delay
    precondition = detail(seen, error_details_pb2.PreconditionFailure)
    assert (precondition is not None) == (seen.code() is grpc.StatusCode.FAILED_PRECONDITION)
    if precondition is not None:
        assert precondition.violations[0].type == error.reason


async def test_an_agents_stream_is_refused_with_a_reason(served: Served) -> None:
    served.agents.error = errors.ProtocolUnsupported(9, 1, 1)
    seen = await refused(anext(aiter(served.agent.Connect(iter([])))))
    assert detail(seen, error_details_pb2.ErrorInfo).reason == "PROTOCOL_UNSUPPORTED"


async def test_a_bug_is_logged_and_not_told(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    served.writes.error = RuntimeError("password=hunter2")
    with caplog.at_level(logging.ERROR, logger="lessor_server"):
        seen = await refused(served.jobs.SubmitJob(pb.SubmitJobRequest(spec=spec())))
    assert seen.code() is grpc.StatusCode.INTERNAL
    assert "hunter2" not in (seen.details() or "")
    (record,) = [r for r in caplog.records if r.__dict__.get("event") == "rpc_failed"]
    assert record.__dict__["reference"] in (seen.details() or "")
    assert record.exc_info is not None
    assert record.exc_info[1] is served.writes.error
    assert detail(seen, error_details_pb2.ErrorInfo) is None


def test_a_status_always_fits_into_its_headers() -> None:
    many = errors.InvalidField([(f"specs[{n}].name", "ü" * 3000) for n in range(10_000)])
    status = to_status(many)
    assert len(status.SerializeToString()) < 5000
    assert len(status.message.encode()) <= 800
    assert to_status(errors.TooLarge("x\ny", 2, 1)).message.startswith("x y has 2 bytes")


async def test_a_very_long_error_arrives(served: Served) -> None:
    served.writes.error = errors.InvalidField([(f"specs[{n}].name", "ü" * 3000) for n in range(10_000)])
    seen = await refused(served.jobs.SubmitJob(pb.SubmitJobRequest(spec=spec())))
    assert seen.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert next(iter(violations(seen))) == "specs[0].name"


# ---------------------------------------------------------------- validation

SELECTORS = [
    job_pb2.LabelSelector(key="a", operator=operator)
    for operator in (job_pb2.SELECTOR_OPERATOR_EXISTS, job_pb2.SELECTOR_OPERATOR_IN)
]
BAD_SPECS: list[tuple[str, job_pb2.JobSpec, str]] = [
    ("spec.resources.gpu_count", spec(resources=job_pb2.Resources(gpu_count=-3)), "got -3"),
    ("spec.work", job_pb2.JobSpec(name="x"), "required"),
    ("spec.queue", job_pb2.JobSpec(queue="Not A Queue", command=job_pb2.Command(argv=["x"])), "got 'Not A Queue'"),
    ('spec.labels["!!"]', spec(labels={"!!": "x"}), "got '!!'"),
    ("spec.selectors[1]", spec(selectors=SELECTORS), "values must be given"),
    ("spec.resources", spec(resources=job_pb2.Resources(gpu_model="H200")), "gpu_count >= 1"),
    ("spec.priority", spec(priority=5000), "got 5000"),
    ("spec.name", spec(name="a\0b"), "NUL"),
    ('spec.labels["a"]', spec(labels={"a": "x\0"}), "NUL"),
    ("spec.command.argv[1]", job_pb2.JobSpec(command=job_pb2.Command(argv=["a", "b\0"])), "NUL"),
]


@pytest.mark.parametrize(("field", "bad", "text"), BAD_SPECS, ids=[case[0] for case in BAD_SPECS])
async def test_a_bad_spec_is_refused_with_field_and_value(
    served: Served, field: str, bad: job_pb2.JobSpec, text: str
) -> None:
    seen = await refused(served.jobs.SubmitJob(pb.SubmitJobRequest(spec=bad)))
    assert seen.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert text in violations(seen)[field]
    assert detail(seen, error_details_pb2.ErrorInfo).reason == "INVALID_FIELD"
    in_batch = await refused(served.jobs.SubmitJobs(pb.SubmitJobsRequest(specs=[spec()] * 300 + [bad])))
    assert text in violations(in_batch)[field.replace("spec", "specs[300]", 1)]
    assert not served.writes.submitted


async def test_values_of_the_environment_are_not_told(served: Served) -> None:
    bad = job_pb2.JobSpec(command=job_pb2.Command(argv=["x"], env={"TOKEN": "hunter2" * 20_000, "1X": "v"}))
    told = violations(await refused(served.jobs.SubmitJob(pb.SubmitJobRequest(spec=bad))))
    assert set(told) == {'spec.command.env["TOKEN"]', 'spec.command.env["1X"]'}
    assert not any("hunter2" in text for text in told.values())
    assert "'1X'" in told['spec.command.env["1X"]']


async def test_other_requests_are_checked_too(served: Served) -> None:
    for call, field in (
        (served.jobs.GetJob(pb.GetJobRequest()), "job_id"),
        (served.jobs.GetJob(pb.GetJobRequest(job_id="j0")), "job_id"),
        (served.jobs.CancelJobs(pb.CancelJobsRequest(job_ids=["x"])), "job_ids[0]"),
        (served.jobs.ListJobs(pb.ListJobsRequest(page_size=-1)), "page_size"),
        (served.jobs.ListJobs(pb.ListJobsRequest(name="a\0")), "name"),
        (served.fleet.CreateQueue(fleet_pb.CreateQueueRequest(queue=fleet_pb.Queue(name="No"))), "queue.name"),
        (served.fleet.UpdateQueue(fleet_pb.UpdateQueueRequest(name="a", max_gpus=-2)), "max_gpus"),
        (served.fleet.GetAgent(fleet_pb.GetAgentRequest(agent="a\0")), "agent"),
        (served.jobs.SubmitJobs(pb.SubmitJobsRequest()), "specs"),
        (served.jobs.SubmitJobs(pb.SubmitJobsRequest(specs=[spec()] * (MAX_SPECS + 1))), "specs"),
    ):
        assert field in violations(await refused(call)), field
    for stream in (
        served.jobs.WatchJobs(pb.WatchJobsRequest(include_progress=True)),
        served.jobs.StreamLogs(pb.StreamLogsRequest(job_id=encode_job_id(1), offset=1, tail_lines=1)),
    ):
        assert (await refused(anext(aiter(stream)))).code() is grpc.StatusCode.INVALID_ARGUMENT


def test_the_largest_batch_is_that_of_the_contract() -> None:
    import protovalidate

    for count, allowed in ((MAX_SPECS, True), (MAX_SPECS + 1, False)):
        found = protovalidate.collect_violations(pb.SubmitJobsRequest(specs=[spec()] * count), fail_fast=True)
        assert (not found) == allowed


async def test_each_message_of_an_agents_stream_is_checked(served: Served) -> None:
    good = agents_pb.ConnectRequest(heartbeat=agents_pb.Heartbeat(seq=1))
    bad = agents_pb.ConnectRequest(
        log_chunks=agents_pb.LogChunks(
            chunks=[agents_pb.LogChunk(job_id="j", lease_id=1, offset=-5, stream=job_pb2.LOG_STREAM_STDOUT, data=b"x")]
        )
    )
    call = served.agent.Connect()
    await call.write(good)
    await call.write(bad)
    seen = await refused(call.read())
    assert violations(seen)["log_chunks.chunks[0].offset"].endswith("got -5")
    assert served.agents.heard == ["heartbeat"]


async def test_log_bytes_may_hold_anything(served: Served) -> None:
    chunk = agents_pb.LogChunk(job_id="j", lease_id=1, offset=0, stream=job_pb2.LOG_STREAM_STDOUT, data=b"\0\xff")
    call = served.agent.Connect()
    await call.write(agents_pb.ConnectRequest(log_chunks=agents_pb.LogChunks(chunks=[chunk])))
    await call.write(agents_pb.ConnectRequest(goodbye=agents_pb.Goodbye(reason="done")))
    async with asyncio.timeout(60):
        answer = await call.read()
    assert answer.reconnect.reason == "bye"
    assert served.agents.heard == ["log_chunks", "goodbye"]
    await call.done_writing()
    assert await call.code() is grpc.StatusCode.OK


# ---------------------------------------------------------------- size, life and death


async def test_a_spec_of_100_mb_gives_one_readable_line(served: Served) -> None:
    body = job_pb2.JobSpec(command=job_pb2.Command(argv=["x" * 1_000_000] * 100))
    seen = await refused(served.jobs.SubmitJob(pb.SubmitJobRequest(spec=body)))
    assert seen.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    details = seen.details() or ""
    assert "\n" not in details
    assert "larger than max" in details
    assert str(16 << 20) in details
    # The channel is still good.
    assert (await served.jobs.SubmitJob(pb.SubmitJobRequest(spec=spec()))).job_id


async def test_a_call_runs_on_when_its_client_goes_away(served: Served) -> None:
    served.writes.go_on.clear()
    call = served.jobs.SubmitJob(pb.SubmitJobRequest(request_id="r", spec=spec()))
    asyncio.ensure_future(call)  # noqa: RUF006
    async with asyncio.timeout(60):
        await served.writes.entered.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        # Another call goes through, so the cancel has reached the server.
        await served.fleet.ListQueues(fleet_pb.ListQueuesRequest())
        served.writes.go_on.set()
        await served.writes.finished.wait()
        await until(lambda: served.writes.submitted)
    assert served.writes.submitted[0][:2] == ("anonymous", "r")


async def test_stopping_ends_streams_with_a_reason_and_lets_calls_end(served: Served, rows: Rows) -> None:
    number = await rows.job()
    await rows.ready(number)
    health = health_pb2_grpc.HealthStub(served.channel)
    watch = served.jobs.WatchJobs(pb.WatchJobsRequest())
    logs = served.jobs.StreamLogs(pb.StreamLogsRequest(job_id=encode_job_id(number), follow=True))
    standing = health.Watch(health_pb2.HealthCheckRequest())
    served.writes.go_on.clear()
    submit = served.jobs.SubmitJob(pb.SubmitJobRequest(spec=spec()))
    async with asyncio.timeout(60):
        first: Any = await watch.read()
        assert first.cursor
        assert (await standing.read()).status == health_pb2.HealthCheckResponse.SERVING
        await served.writes.entered.wait()
        served.endpoint.stop_serving()
        assert (await standing.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        stopping = asyncio.create_task(served.stop(10))
        for stream in (watch, logs):
            with pytest.raises(aio.AioRpcError) as ended:
                await stream.read()
            assert detail(ended.value, error_details_pb2.ErrorInfo).reason == "STOPPING"
        served.writes.go_on.set()
        assert (await submit).job_id == encode_job_id(1)
        await stopping


async def test_health_and_reflection_answer(served: Served) -> None:
    health = health_pb2_grpc.HealthStub(served.channel)
    for service in ("", *SERVICES):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert (await refused(health.Check(health_pb2.HealthCheckRequest(service="x")))).code() is grpc.StatusCode.NOT_FOUND
    reflected = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="lessor.v1.JobService"),
    ]
    listed, files = [answer async for answer in reflected.ServerReflectionInfo(iter(asked))]
    assert set(SERVICES) < {service.name for service in listed.list_services_response.service}
    assert len(files.file_descriptor_response.file_descriptor_proto) >= 1


async def test_a_client_can_be_built_from_reflection_alone(served: Served) -> None:
    from google.protobuf import message_factory
    from google.protobuf.descriptor_pool import DescriptorPool
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    def ask() -> str:
        with grpc.insecure_channel(f"127.0.0.1:{served.port}") as channel:
            pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
            service = pool.FindServiceByName("lessor.v1.JobService")
            method = service.methods_by_name["SubmitJob"]
            request_type = message_factory.GetMessageClass(method.input_type)
            call = channel.unary_unary(
                "/lessor.v1.JobService/SubmitJob",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
            )
            request: Any = request_type()
            request.spec.command.argv.append("true")
            return str(call(request, timeout=60).job_id)

    assert await asyncio.to_thread(ask) == encode_job_id(1)


async def test_a_busy_port_and_a_bad_address_are_os_errors(
    served: Served, database: Database, catalog: Catalog, bells: Bells
) -> None:
    for host, port, reason in (("127.0.0.1", served.port, "in use"), ("192.0.2.1", 0, "Cannot assign")):
        second = Endpoint(database, catalog, bells, Writes(), Agents())
        with pytest.raises(OSError, match=reason):
            await second.start(host, port)
        await second.stop(0)


async def test_an_ipv6_address_is_served(database: Database, catalog: Catalog, bells: Bells) -> None:
    if not socket.has_ipv6:
        pytest.skip("this host has no IPv6")
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this host has no IPv6 loopback")
    endpoint = Endpoint(database, catalog, bells, Writes(), Agents())
    port = await endpoint.start("::1", 0)
    async with aio.insecure_channel(f"[::1]:{port}") as channel:
        assert await fleet_service_pb2_grpc.FleetServiceStub(channel).ListQueues(fleet_pb.ListQueuesRequest())
    await endpoint.stop(0)


async def test_a_client_that_leaves_a_watch_leaves_nothing_behind(served: Served, rows: Rows, bells: Bells) -> None:
    number = await rows.job()
    await rows.ready(number)
    watch = served.jobs.WatchJobs(pb.WatchJobsRequest(job_ids=[encode_job_id(number)], include_progress=True))
    logs = served.jobs.StreamLogs(pb.StreamLogsRequest(job_id=encode_job_id(number), follow=True))
    async with asyncio.timeout(60):
        await watch.read()
        await until(lambda: bells.progress._bells and bells.logs._bells)  # noqa: SLF001
        watch.cancel()
        logs.cancel()
        await until(lambda: not (bells.progress._bells or bells.logs._bells))  # noqa: SLF001


async def test_the_answers_of_the_write_side_come_through(served: Served) -> None:
    batch = await served.jobs.SubmitJobs(pb.SubmitJobsRequest(request_id="r", specs=[spec(), spec()]))
    assert list(batch.job_ids) == [encode_job_id(1), encode_job_id(2)]
    cancelled = await served.jobs.CancelJobs(pb.CancelJobsRequest(job_ids=[encode_job_id(1)]))
    assert list(cancelled.results) == [pb.CANCEL_RESULT_REQUESTED]
    again = await served.jobs.RetryJob(pb.RetryJobRequest(job_id=encode_job_id(1)))
    assert again.job_id == encode_job_id(2)
