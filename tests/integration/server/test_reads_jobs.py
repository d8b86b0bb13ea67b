"""One job: what every place it can stand in shows of it."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta

import pytest

from lessor.ids import encode_job_id
from lessor.v1 import job_pb2
from lessor_server.domain.errors import InvalidField, JobNotFound
from lessor_server.services import job_reader
from lessor_server.services.job_reader import JobReader, job_numbers
from lessor_server.store.catalog import Catalog
from lessor_server.store.database import Database
from tests.support.rows import Rows, spec

NOW = datetime.now(UTC).replace(microsecond=0)
BOOM = job_pb2.JobError(error_class=job_pb2.ERROR_CLASS_APPLICATION, type="EXIT_CODE", message="it ended with 3")


@pytest.fixture
def reader(database: Database, catalog: Catalog) -> JobReader:
    return JobReader(database, catalog)


async def test_a_fresh_job_is_queued(rows: Rows, reader: JobReader) -> None:
    body = spec(labels={"team": "a"}, priority=3)
    number = await rows.job(body=body, at=NOW)
    await rows.ready(number)
    job = await reader.get(number)
    assert job.id == encode_job_id(number)
    assert job.spec == body
    assert job.state == job_pb2.JOB_STATE_QUEUED
    assert job.submit_time.ToDatetime(UTC) == NOW
    assert (job.attempt, job.failures, job.losses, job.lease_id, job.agent) == (0, 0, 0, 0, "")
    assert not job.HasField("not_before")
    assert not job.HasField("error")
    assert job.outcome == job_pb2.OUTCOME_UNSPECIFIED


@pytest.mark.parametrize(
    ("phase", "state"),
    [
        (1, job_pb2.JOB_STATE_LEASED),
        (2, job_pb2.JOB_STATE_LEASED),
        (3, job_pb2.JOB_STATE_RUNNING),
        (4, job_pb2.JOB_STATE_RUNNING),
    ],
)
async def test_the_phase_of_its_lease_is_its_state(rows: Rows, reader: JobReader, phase: int, state: int) -> None:
    session = await rows.agent("agent-00001", name="host-a")
    number = await rows.job()
    lease_id = await rows.lease(
        number, session, "agent-00001", phase=phase, gpus=["GPU-1"], started_at=NOW, cancel_requested=True,
        outcome=1 if phase == 4 else None,
    )  # fmt: skip
    await rows.progress(number, lease_id, 0.25, "epoch 1")
    job = await reader.get(number)
    assert job.state == state
    assert (job.attempt, job.lease_id, job.agent, list(job.gpu_uuids)) == (1, lease_id, "host-a", ["GPU-1"])
    assert job.start_time.ToDatetime(UTC) == NOW
    assert job.cancel_requested
    assert (job.progress.fraction, job.progress.message, dict(job.progress.metrics)) == (0.25, "epoch 1", {"loss": 0.5})
    # A draining lease's outcome is not told before its log is complete.
    assert job.outcome == job_pb2.OUTCOME_UNSPECIFIED
    assert not job.HasField("end_time")


async def test_a_waiting_retry_shows_its_attempt_when_and_the_last_error(rows: Rows, reader: JobReader) -> None:
    number = await rows.job()
    await rows.attempt(number, attempt=1, outcome=6, losses=1)
    last = await rows.attempt(number, attempt=2, outcome=2, failures=1, losses=1, error=BOOM, exit_code=3)
    await rows.delayed(number, NOW + timedelta(seconds=30), attempts=2, failures=1, last=last)
    job = await reader.get(number)
    assert job.state == job_pb2.JOB_STATE_QUEUED
    assert (job.attempt, job.failures, job.lease_id) == (2, 1, last)
    assert job.not_before.ToDatetime(UTC) == NOW + timedelta(seconds=30)
    assert (job.outcome, job.exit_code, job.error) == (job_pb2.OUTCOME_FAILED, 3, BOOM)
    # The agent's row is gone: its id is shown.
    assert job.agent == "agent-00001"


async def test_a_running_retry_shows_the_live_attempt_and_the_last_error(rows: Rows, reader: JobReader) -> None:
    session = await rows.agent("agent-00002", name="host-b")
    number = await rows.job()
    await rows.attempt(number, outcome=2, failures=1, error=BOOM, exit_code=3)
    lease_id = await rows.lease(number, session, "agent-00002", attempt=2, failures=1)
    job = await reader.get(number)
    assert (job.attempt, job.lease_id, job.agent, job.failures) == (2, lease_id, "host-b", 1)
    assert job.error == BOOM


@pytest.mark.parametrize(
    ("final", "outcome"), [(4, job_pb2.OUTCOME_SUCCEEDED), (5, job_pb2.OUTCOME_FAILED), (6, job_pb2.OUTCOME_CANCELLED)]
)
async def test_an_ended_job_shows_its_last_attempt(rows: Rows, reader: JobReader, final: int, outcome: int) -> None:
    number = await rows.job(retry_of=77)
    await rows.attempt(number, attempt=1, outcome=2, error=BOOM, exit_code=3, failures=1)
    last = await rows.attempt(
        number, attempt=2, outcome=outcome, final_state=final, result=b'{"a": 1}', exit_code=0, ended_at=NOW, failures=1
    )
    await rows.progress(number, last, 1.0)
    job = await reader.get(number)
    assert (job.state, job.outcome, job.exit_code, job.attempt, job.failures) == (final, outcome, 0, 2, 1)
    assert (job.lease_id, job.result_json, job.retry_of) == (last, b'{"a": 1}', encode_job_id(77))
    assert job.end_time.ToDatetime(UTC) == NOW
    # A failed job says which budget was exhausted.
    assert job.error.message == ("failed 1 of 1 times (max_failures)" if final == 5 else "")
    assert job.progress.fraction == 1.0


async def test_a_job_that_ended_while_it_waited_keeps_where_it_ran_before(rows: Rows, reader: JobReader) -> None:
    number = await rows.job()
    first = await rows.attempt(number, attempt=1, outcome=2, error=BOOM, exit_code=3, failures=1)
    await rows.attempt(number, lease_id=0, attempt=1, outcome=3, final_state=6, failures=1, ended_at=NOW)
    job = await reader.get(number)
    assert (job.state, job.outcome, job.attempt, job.lease_id) == (6, job_pb2.OUTCOME_CANCELLED, 1, first)
    assert not job.HasField("exit_code")
    assert [a.lease_id for a in await reader.attempts(number)] == [first]


async def test_a_job_that_never_ran_has_no_attempts(rows: Rows, reader: JobReader) -> None:
    number = await rows.job()
    await rows.attempt(number, lease_id=0, attempt=0, outcome=3, final_state=6)
    assert await reader.attempts(number) == []
    assert (await reader.get(number)).attempt == 0


async def test_attempts_are_told_oldest_first_with_the_live_one(rows: Rows, reader: JobReader) -> None:
    session = await rows.agent("agent-00001", name="host-a", gpus=["GPU-1"])
    number = await rows.job()
    first = await rows.attempt(
        number, outcome=6, error=BOOM, gpus=["GPU-0"], signal=9, log_bytes=10, logs_truncated_at=10, losses=1
    )
    # Bytes that came in after the lease was given up count.
    await rows.log(first, b"x" * 25)
    live = await rows.lease(number, session, "agent-00001", attempt=2, phase=4, gpus=["GPU-1"], outcome=1)
    await rows.log(live, b"hello")
    one, two = await reader.attempts(number)
    assert (one.attempt, one.lease_id, one.phase, one.outcome) == (1, first, job_pb2.LEASE_PHASE_ENDED, 6)
    assert (one.agent, list(one.gpu_uuids), one.signal, one.error) == ("host-a", ["GPU-0"], 9, BOOM)
    assert (one.log_bytes, one.logs_truncated_at) == (25, 10)
    assert (two.attempt, two.lease_id, two.phase, two.log_bytes) == (2, live, job_pb2.LEASE_PHASE_DRAINING, 5)
    assert (two.outcome, two.HasField("end_time"), two.HasField("logs_truncated_at")) == (0, False, False)


async def test_attempts_with_huge_errors_fit_into_a_message(
    rows: Rows, reader: JobReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_reader, "MAX_PAGE_BYTES", 20_000)
    number = await rows.job()
    huge = job_pb2.JobError(type="E", message="m" * 3000, traceback="t" * 20_000)
    for attempt in range(1, 9):
        await rows.attempt(number, attempt=attempt, outcome=2, error=huge)
    await rows.ready(number, attempts=8)
    attempts = await reader.attempts(number)
    assert [a.attempt for a in attempts] == list(range(1, 9))
    assert sum(a.ByteSize() for a in attempts) <= 20_000
    assert all(a.error.message.startswith("mmm") for a in attempts)
    assert attempts[-1].error.message == "m" * 3000


async def test_unknown_jobs_are_not_found(rows: Rows, reader: JobReader) -> None:
    with pytest.raises(JobNotFound):
        await reader.get(5)
    with pytest.raises(JobNotFound):
        await reader.attempts(5)


async def test_a_job_that_stands_nowhere_is_not_shown_and_logged(
    rows: Rows, reader: JobReader, caplog: pytest.LogCaptureFixture
) -> None:
    number = await rows.job()
    with caplog.at_level(logging.ERROR), pytest.raises(JobNotFound):
        await reader.get(number)
    assert caplog.records[0].__dict__["event"] == "job_state_broken"


def test_bad_job_ids_are_named_by_their_place() -> None:
    good = encode_job_id(1)
    with pytest.raises(InvalidField) as refused:
        job_numbers([good, "x", good, "j0"])
    assert [violation.field for violation in refused.value.violations] == ["job_ids[1]", "job_ids[3]"]
