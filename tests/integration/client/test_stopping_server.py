"""Calls that reach a server while it stops: gRPC ends them with CANCELLED, and they are made again elsewhere."""

from __future__ import annotations

import threading

import grpc
import pytest

import lessor
from lessor import JobState
from tests.support.fake_services import FakeServer, Fault


def test_a_submit_is_said_again_and_makes_one_job(client: lessor.Client, server: FakeServer) -> None:
    server.faults += [Fault("SubmitJob", code=grpc.StatusCode.CANCELLED, after=after) for after in (False, True)]
    submission = client.submit(["true"])
    requests = [request for name, request in server.requests if name == "SubmitJob"]
    assert len(requests) == 3
    assert len({request.request_id for request in requests}) == 1
    assert list(server.jobs) == [submission.id]


def test_a_watch_goes_on(client: lessor.Client, server: FakeServer) -> None:
    job = client.submit(["true"]).id
    hold = threading.Event()
    server.faults.append(Fault("WatchJobs", messages=1, hold=hold, code=grpc.StatusCode.CANCELLED))

    def end() -> None:
        server.until(lambda: server.count("WatchJobs") > 0)
        server.end(job)
        hold.set()

    server.script(end)
    assert client.wait(job, timeout=60)[0].state is JobState.SUCCEEDED
    assert server.count("WatchJobs") >= 2


@pytest.mark.usefixtures("one_try")
def test_when_there_is_no_time_left_it_is_named(client: lessor.Client, server: FakeServer) -> None:
    server.faults.append(Fault("GetJob", code=grpc.StatusCode.CANCELLED))
    with pytest.raises(lessor.ServerUnreachable, match="it stopped while it was asked"):
        client.get("j1")


def test_a_client_that_is_closed_does_not_try_again(server: FakeServer) -> None:
    client = lessor.Client(server.address, timeout=60)
    job = client.submit(["true"]).id
    changes = client.watch(job)
    next(changes)
    client.close()
    with pytest.raises(lessor.ClientClosed):
        list(changes)
