"""The SDK against a server in memory: calls, retries, streams that outlive connections."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from datetime import timedelta

import grpc
import pytest

import lessor
from lessor import CancelResult, JobSpec, JobState
from lessor.sdk.blocking import Client
from lessor.v1 import fleet_service_pb2, job_pb2, job_service_pb2
from tests.support.fake_services import FakeServer, Fault


def test_submit_and_get(client: lessor.Client, server: FakeServer) -> None:
    submission = client.submit(["python", "train.py"], gpus=1, memory="4GiB", labels={"team": "a"})
    assert not submission.existing
    job = client.get(submission)
    assert (job.id, job.state, job.spec.gpus) == (submission.id, JobState.QUEUED, 1)
    assert job.agent is None
    assert job.outcome is None
    assert job.result is None
    [(_, request)] = [entry for entry in server.requests if entry[0] == "SubmitJob"]
    assert len(request.request_id) == 36


def test_submit_a_spec(client: lessor.Client) -> None:
    spec = JobSpec.of("true", dedupe_key="k")
    first = client.submit(spec)
    again = client.submit(spec)
    assert (again.id, again.existing) == (first.id, True)
    with pytest.raises(lessor.InvalidArgument, match="JobSpec and the fields gpus"):
        client.submit(spec, gpus=1)


def test_a_lost_answer_makes_no_second_job(client: lessor.Client, server: FakeServer) -> None:
    server.faults.append(Fault("SubmitJob", after=True))
    server.faults.append(Fault("SubmitJob", code=grpc.StatusCode.UNAVAILABLE))
    submission = client.submit(["true"])
    requests = [request for name, request in server.requests if name == "SubmitJob"]
    assert len(requests) == 3
    assert len({request.request_id for request in requests}) == 1
    assert list(server.jobs) == [submission.id]
    assert submission.existing


def test_submit_many_keeps_the_order_and_its_request_id(client: lessor.Client, server: FakeServer) -> None:
    server.faults.append(Fault("SubmitJobs", after=True))
    specs = [JobSpec.of(["echo", str(number)]) for number in range(20)]
    submissions = client.submit_many(specs)
    assert [client.get(submission).spec.argv[1] for submission in submissions] == [str(n) for n in range(20)]
    assert len(server.jobs) == 20


def test_a_server_that_comes_late_is_waited_for() -> None:
    fake = FakeServer()
    fake.serve()
    address = fake.address
    fake.stop()
    with lessor.Client(address, timeout=60) as client:
        fake.script(lambda: fake.serve(address))
        assert client.submit(["true"]).id in fake.jobs
    fake.close()


@pytest.mark.usefixtures("one_try")
def test_nobody_at_the_address() -> None:
    with lessor.Client("127.0.0.1:1") as client:
        with pytest.raises(
            lessor.ServerUnreachable, match=r"no server answers at 127.0.0.1:1: connection refused \(is"
        ):
            client.get("j1")
        with pytest.raises(lessor.ServerUnreachable):
            list(client.watch())
        with pytest.raises(lessor.ServerUnreachable):
            list(client.logs("j1"))


def test_a_server_that_does_not_answer(server: FakeServer) -> None:
    hold = threading.Event()
    with lessor.Client(server.address, timeout="300ms", connect_timeout=60) as client:
        client.queues()
        server.faults.append(Fault("GetJob", hold=hold))
        with pytest.raises(lessor.RequestTimeout):
            client.get("j1")
    hold.set()


def test_errors_name_the_field(client: lessor.Client) -> None:
    with pytest.raises(lessor.QueueNotFound, match="no queue 'nope'"):
        client.submit(["true"], queue="nope")
    with pytest.raises(lessor.InvalidArgument) as error:
        client.submit(["true"], priority=5000)
    assert error.value.violations == {"spec.priority": "must be at most 1000"}
    with pytest.raises(lessor.InvalidArgument, match="gpus: -1 is negative"):
        client.submit(["true"], gpus=-1)


def test_list_goes_through_the_pages(client: lessor.Client, server: FakeServer) -> None:
    ids = [client.submit(["true"], labels={"odd": str(n % 2)}).id for n in range(7)]
    assert [job.id for job in client.list(page_size=2)] == ids[::-1]
    assert [job.id for job in client.list(limit=3, page_size=2)] == ids[:3:-1]
    assert [job.id for job in client.list(labels={"odd": "1"})] == ids[5::-2]
    assert [job.id for job in client.list(states=[JobState.RUNNING])] == []
    assert list(client.list(limit=0)) == []


def test_wait_returns_final_jobs_in_order(client: lessor.Client, server: FakeServer) -> None:
    one, two, three = (client.submit(["true"]).id for _ in range(3))
    server.end(two, job_pb2.JOB_STATE_FAILED, exit_code=3)

    def end_the_rest() -> None:
        server.until(lambda: server.count("WatchJobs") > 0)
        server.start(one)
        server.end(one, result=b'{"accuracy": 0.9}')
        server.end(three, job_pb2.JOB_STATE_CANCELLED)

    server.script(end_the_rest)
    jobs = client.wait([one, two, three, one], timeout=60)
    assert [job.id for job in jobs] == [one, two, three, one]
    assert [job.state for job in jobs[:3]] == [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED]
    assert jobs[0].result == {"accuracy": 0.9}
    assert [job.exit_status for job in jobs[:3]] == [0, 3, 130]


def test_wait_gives_up_and_says_who_is_left(client: lessor.Client, server: FakeServer) -> None:
    one, two = client.submit(["true"]), client.submit(["true"])
    server.end(one.id)
    with pytest.raises(lessor.WaitTimeout, match=f"1 of 2 jobs had not ended within 200ms: {two}") as error:
        client.wait([one, two], timeout="200ms")
    assert error.value.pending == (two.id,)
    assert [job.id for job in error.value.ended] == [one.id]
    assert isinstance(error.value, TimeoutError)


def test_wait_for_a_job_that_is_not_there(client: lessor.Client) -> None:
    with pytest.raises(lessor.JobNotFound):
        client.wait("j0000000000009", timeout=60)


def test_wait_survives_disconnects_and_a_missed_change(client: lessor.Client, server: FakeServer) -> None:
    job = client.submit(["true"]).id
    hold = threading.Event()
    server.faults.append(Fault("WatchJobs", messages=1, hold=hold))

    def end() -> None:
        server.until(lambda: server.count("WatchJobs") > 0)
        server.oldest_cursor = 10**6
        server.end(job)
        hold.set()

    server.script(end)
    assert client.wait(job, timeout=60)[0].state is JobState.SUCCEEDED
    assert server.count("WatchJobs") >= 2


def test_wait_looks_for_itself_when_the_watch_is_silent(client: lessor.Client, server: FakeServer) -> None:
    job = client.submit(["true"]).id
    hold = threading.Event()
    # The stream neither ends nor tells anything: only a look at the job shows its end.
    server.faults.append(Fault("WatchJobs", messages=1, hold=hold))

    def end() -> None:
        server.until(lambda: server.count("WatchJobs") > 0)
        server.end(job)

    server.script(end)
    assert client.wait(job, timeout=60, recheck="50ms")[0].state is JobState.SUCCEEDED
    hold.set()


def test_watch_resumes_by_cursor(client: lessor.Client, server: FakeServer) -> None:
    job = client.submit(["true"]).id
    server.faults.append(Fault("WatchJobs", messages=2))
    changes = client.watch([job])
    assert next(changes).state is JobState.QUEUED
    server.start(job)
    assert next(changes).state is JobState.RUNNING

    def end() -> None:
        server.until(lambda: server.count("WatchJobs") == 2)
        server.end(job)

    server.script(end)
    assert JobState.SUCCEEDED in (change.state for change in changes)
    changes.close()
    [first, second] = [request for name, request in server.requests if name == "WatchJobs"]
    assert first.cursor == ""
    assert int(second.cursor) > 0


def test_a_cursor_can_be_given_back(client: lessor.Client, server: FakeServer) -> None:
    job = client.submit(["true"]).id
    changes = client.watch([job])
    cursor = next(changes).cursor
    changes.close()
    server.start(job)
    assert next(change for change in client.watch(cursor=cursor)).state is JobState.RUNNING


def test_an_expired_cursor_of_an_open_watch_is_told(client: lessor.Client, server: FakeServer) -> None:
    server.oldest_cursor = 10
    with pytest.raises(lessor.CursorExpired, match="list again"):
        next(client.watch(cursor="3"))


def test_the_cursor_within_a_message_repeats_rather_than_skips(client: lessor.Client, server: FakeServer) -> None:
    one, two = client.submit(["true"]).id, client.submit(["true"]).id
    changes = client.watch([one, two])
    first, second = next(changes), next(changes)
    changes.close()
    assert (first.cursor, second.cursor) == ("", "2")


def test_logs_are_followed_to_the_end(client: lessor.Client, server: FakeServer) -> None:
    job = client.submit(["true"]).id

    def run() -> None:
        server.until(lambda: server.count("StreamLogs") > 0)
        server.start(job)
        server.log(job, b"one\n")
        server.log(job, b"two\n", job_pb2.LOG_STREAM_STDERR)
        server.end(job)

    server.script(run)
    chunks = list(client.logs(job, follow=True))
    assert [(chunk.attempt, chunk.offset, chunk.stream.name, chunk.data) for chunk in chunks] == [
        (1, 0, "STDOUT", b"one\n"),
        (1, 4, "STDERR", b"two\n"),
    ]


def test_logs_from_an_offset_and_a_tail(client: lessor.Client, server: FakeServer) -> None:
    job = client.submit(["true"]).id
    server.start(job)
    server.log(job, b"one\ntwo\n")
    server.log(job, b"three\n")
    assert b"".join(chunk.data for chunk in client.logs(job, offset=5)) == b"wo\nthree\n"
    assert b"".join(chunk.data for chunk in client.logs(job, tail=2)) == b"two\nthree\n"
    with pytest.raises(lessor.AttemptNotFound):
        list(client.logs(job, attempt=7))


def test_logs_lose_and_repeat_no_byte_across_disconnects_and_attempts(
    client: lessor.Client, server: FakeServer
) -> None:
    job = client.submit(["true"]).id
    # Every stream breaks after one chunk, also while a job changes attempts.
    server.faults += [Fault("StreamLogs", messages=1) for _ in range(4)]
    server.start(job)
    server.log(job, b"a1")

    def run() -> None:
        server.until(lambda: server.count("StreamLogs") >= 2)
        server.log(job, b"a2")
        server.until(lambda: server.count("StreamLogs") >= 3)
        server.log(job, b"a3")
        server.lose(job)
        server.start(job, "beta")
        server.lose(job)
        server.start(job, "gamma")
        server.log(job, b"c1")
        server.log(job, b"c2")
        server.end(job)

    server.script(run)
    chunks = list(client.logs(job, follow=True))
    assert [(chunk.attempt, chunk.data) for chunk in chunks] == [
        (1, b"a1"),
        (1, b"a2"),
        (1, b"a3"),
        (3, b"c1"),
        (3, b"c2"),
    ]


def test_logs_of_a_job_that_waits_between_attempts(client: lessor.Client, server: FakeServer) -> None:
    job = client.submit(["true"]).id
    server.start(job)
    server.log(job, b"a1")
    server.faults.append(Fault("StreamLogs", messages=1))

    def run() -> None:
        server.until(lambda: server.count("StreamLogs") >= 2)
        server.lose(job)
        # The client now waits for news of a second attempt.
        server.until(lambda: server.count("WatchJobs") >= 1)
        server.start(job)
        server.log(job, b"b1")
        server.end(job)

    server.script(run)
    assert [chunk.data for chunk in client.logs(job, follow=True)] == [b"a1", b"b1"]


def test_leaving_a_stream_early_ends_it(client: lessor.Client, server: FakeServer) -> None:
    job = client.submit(["true"]).id
    server.start(job)
    server.log(job, b"x")
    for _ in client.logs(job, follow=True):
        break
    assert client.get(job).state is JobState.RUNNING


def test_attempts_cancel_retry_explain(client: lessor.Client, server: FakeServer) -> None:
    job, other = client.submit(["true"]), client.submit(["true"])
    server.start(job.id)
    assert client.explain(other).explanations[0].reason is lessor.PendingReason.NO_AGENT_CONNECTED
    with pytest.raises(lessor.JobNotTerminal):
        client.retry(job)
    assert client.cancel([job, other, "jx"]) == {
        job.id: CancelResult.REQUESTED,
        other.id: CancelResult.CANCELLED,
        "jx": CancelResult.NOT_FOUND,
    }
    server.end(job.id, job_pb2.JOB_STATE_CANCELLED)
    assert client.cancel(job) == {job.id: CancelResult.ALREADY_TERMINAL}
    [attempt] = client.attempts(job)
    assert (attempt.attempt, attempt.outcome, attempt.agent) == (1, lessor.Outcome.CANCELLED, "alpha")
    assert client.get(client.retry(job)).retry_of == job.id


def test_the_fleet(client: lessor.Client, server: FakeServer) -> None:
    server.add_agent("alpha", gpus=2, zone="a")
    server.lease_rows += [
        fleet_service_pb2.LeaseStatus(lease_id=number, job_id="j", phase=job_pb2.LEASE_PHASE_RUNNING, agent="alpha")
        for number in (1, 2, 3)
    ]
    [agent] = client.agents()
    assert (agent.name, agent.gpu_count, agent.heartbeat_interval) == ("alpha", 2, timedelta(seconds=5))
    assert client.agent("agent-alpha") == agent
    assert [gpu.index for gpu in client.gpus("alpha")] == [0, 1]
    assert [lease.lease_id for lease in client.leases()] == [1, 2, 3]
    assert client.drain("alpha").drained
    assert not client.undrain("alpha").drained
    with pytest.raises(lessor.AgentNotFound):
        client.drain("nope")


def test_a_drain_waits_until_nothing_is_live(
    client: lessor.Client, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lessor.sdk.draining._LOOK_EVERY_S", 0.001)
    alpha = server.add_agent("alpha")
    alpha.lease_count = 2
    server.lease_rows += [fleet_service_pb2.LeaseStatus(lease_id=n, job_id=f"j{n}") for n in (1, 2)]
    with pytest.raises(
        lessor.WaitTimeout, match=r"had not ended on alpha within 10ms, 2 in all: j1, j2; it stays"
    ) as e:
        client.drain("alpha", wait=True, timeout="10ms")
    assert e.value.pending == ("j1", "j2")
    assert client.agent("alpha").drained

    def end_them() -> None:
        looks = server.count("GetAgent")
        server.until(lambda: server.count("GetAgent") > looks)
        alpha.lease_count = 0

    server.script(end_them)
    assert client.drain("alpha", wait=True, timeout=60).lease_count == 0
    assert client.drain("alpha", wait=True, timeout=0).drained, "nothing was live at the first look"


def test_a_drain_that_somebody_takes_back_is_not_waited_for(
    client: lessor.Client, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lessor.sdk.draining._LOOK_EVERY_S", 0.001)
    alpha = server.add_agent("alpha")
    for left in (1, 0):
        alpha.lease_count = 1

        def put_back(left: int = left) -> None:
            looks = server.count("GetAgent")
            server.until(lambda: server.count("GetAgent") > looks)
            alpha.drained, alpha.lease_count = False, left

        server.script(put_back)
        with pytest.raises(lessor.FailedPrecondition, match=r"^alpha was put back \(undrained\) meanwhile"):
            client.drain("alpha", wait=True, timeout=60)


def test_queues(client: lessor.Client) -> None:
    assert client.create_queue("night", max_gpus=4).max_gpus == 4
    with pytest.raises(lessor.QueueExists):
        client.create_queue("night")
    queue = client.update_queue("night", paused=True, max_running=2, max_gpus=lessor.NO_LIMIT)
    assert (queue.paused, queue.max_running, queue.max_gpus) == (True, 2, None)
    assert client.queue("night") == queue
    assert [entry.name for entry in client.queues()] == ["default", "night"]
    with pytest.raises(lessor.InvalidArgument, match="max_gpus: -1 is not a limit"):
        client.create_queue("other", max_gpus=-1)
    with pytest.raises(lessor.QueueNotFound):
        client.queue("nope")


def test_a_queue_made_by_a_try_whose_answer_was_lost(client: lessor.Client, server: FakeServer) -> None:
    server.faults.append(Fault("CreateQueue", after=True))
    assert client.create_queue("night", max_gpus=4).name == "night"
    server.faults.append(Fault("CreateQueue", reason="CONTENDED"))
    with pytest.raises(lessor.QueueExists):
        client.create_queue("night", max_gpus=5)


def test_a_closed_client_says_so(server: FakeServer) -> None:
    client = lessor.Client(server.address)
    client.queues()
    client.close()
    client.close()
    with pytest.raises(lessor.ClientClosed, match="make a new one"):
        client.queues()


def test_closing_ends_a_stream_in_another_thread(server: FakeServer) -> None:
    client = lessor.Client(server.address)
    job = client.submit(["true"]).id
    seen: list[BaseException] = []

    def follow() -> None:
        try:
            list(client.logs(job, follow=True))
        except BaseException as error:
            seen.append(error)

    thread = threading.Thread(target=follow)
    thread.start()
    server.until(lambda: server.count("StreamLogs") > 0)
    client.close()
    thread.join(10)
    assert not thread.is_alive()
    assert [type(error) for error in seen] == [lessor.ClientClosed]


def test_a_forked_child_is_told_to_make_its_own(client: lessor.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    client.queues()
    real = os.getpid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: real + 1)
        with pytest.raises(lessor.ClientClosed, match="forked"):
            client.queues()
    assert client.queues()


def test_all_clients_of_a_process_share_one_loop(server: FakeServer) -> None:
    with lessor.Client(server.address) as one, lessor.Client(server.address) as two:
        one.queues()
        two.queues()
        assert sum(thread.name == "lessor-client" for thread in threading.enumerate()) == 1


def test_a_client_works_in_several_threads_and_in_a_running_loop(client: lessor.Client, server: FakeServer) -> None:
    threads = [threading.Thread(target=client.submit, args=(["true"],)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.jobs) == 8

    async def inside() -> int:
        return len(list(client.list()))

    assert asyncio.run(inside()) == 8


def test_the_two_clients_have_the_same_methods() -> None:
    public = {name for name, value in vars(lessor.AsyncClient).items() if not name.startswith("_") and callable(value)}
    assert public - {"close"} <= set(vars(Client))
    for name in public - {"close"}:
        method, original = getattr(Client, name), getattr(lessor.AsyncClient, name)
        assert inspect.signature(method) == inspect.signature(original)
        assert method.__doc__ == original.__doc__
        assert method.__qualname__ == f"Client.{name}"


async def test_the_asynchronous_client(server: FakeServer) -> None:
    async with lessor.AsyncClient(server.address, timeout=60) as client:
        job = await client.submit(["true"])
        server.start(job.id)
        server.log(job.id, b"hello")
        server.end(job.id)
        assert [chunk.data async for chunk in client.logs(job, follow=True)] == [b"hello"]
        [final] = await client.wait(job, timeout=60)
        assert final.state is JobState.SUCCEEDED
        assert [found.id async for found in client.list()] == [job.id]


def test_json_of_a_job(client: lessor.Client, server: FakeServer) -> None:
    job = client.submit(["true"], memory="1GiB").id
    server.start(job)
    server.progress(job, 0.5, "half", loss=0.25)
    error = job_pb2.JobError(error_class=job_pb2.ERROR_CLASS_APPLICATION, type="EXIT_CODE", message="no")
    server.end(job, job_pb2.JOB_STATE_FAILED, exit_code=2, error=error, result=b"[1]")
    values = client.get(job).to_dict()
    assert values["state"] == "failed"
    assert values["outcome"] == "failed"
    assert values["result"] == [1]
    assert values["spec"]["memory"] == "1GiB"  # type: ignore[index,call-overload]
    assert values["error"]["error_class"] == "application"  # type: ignore[index,call-overload]
    assert str(values["submit_time"]).endswith("Z")
    assert values["not_before"] is None


def test_explanations_of_a_newer_server(client: lessor.Client, server: FakeServer) -> None:
    job = client.submit(["true"])
    server.explanation = job_service_pb2.Explanation(reason=77, message="new")  # type: ignore[arg-type]
    assert client.explain(job).explanations[0].reason == 77
