"""Lists: every filter, pages without loss or repetition."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from lessor.ids import decode_job_id
from lessor.v1 import job_pb2
from lessor.v1.job_service_pb2 import ListJobsRequest
from lessor_server.domain.errors import InvalidField, QueueNotFound
from lessor_server.domain.states import JobState
from lessor_server.services import job_reader
from lessor_server.services.job_reader import JobReader
from lessor_server.store import job_list_queries
from lessor_server.store.catalog import Catalog
from lessor_server.store.database import Database
from lessor_server.store.partitions import ensure_partitions, first_job_at
from tests.support.rows import Rows, spec

STATES = list(JobState)


@pytest.fixture
def reader(database: Database, catalog: Catalog) -> JobReader:
    return JobReader(database, catalog)


async def place(rows: Rows, number: int, state: JobState, session: int) -> None:
    if state is JobState.QUEUED:
        if number % 2:
            await rows.ready(number)
        else:
            await rows.delayed(number, datetime.now(UTC), attempts=1, failures=1)
    elif state is JobState.LEASED:
        await rows.lease(number, session, "agent-00001", phase=1 + number % 2)
    elif state is JobState.RUNNING:
        await rows.lease(number, session, "agent-00001", phase=3)
    else:
        await rows.attempt(number, outcome=1, final_state=int(state))


async def some_jobs(rows: Rows, count: int = 36, **columns: Any) -> dict[int, JobState]:
    """Adds jobs of all states in turn; number → state."""
    session = await rows.agent("agent-00001")
    result = {}
    for index in range(count):
        state = STATES[index % len(STATES)]
        number = await rows.job(name=f"job-{index % 3}", labels={"mod": str(index % 2)}, **columns)
        await place(rows, number, state, session)
        result[number] = state
    return result


async def every(reader: JobReader, request: ListJobsRequest) -> list[int]:
    """Follows the pages to the end; numbers in the order told."""
    told: list[int] = []
    for _ in range(100):
        page = await reader.list(request)
        assert len(page.jobs) <= (request.page_size or 100)
        told += [decode_job_id(job.id) for job in page.jobs]
        if not page.next_page_token:
            return told
        request.page_token = page.next_page_token
    raise AssertionError("the pages do not end")


@pytest.mark.parametrize("page_size", [1, 5, 100])
@pytest.mark.parametrize(
    "states",
    [
        (),
        (JobState.QUEUED,),
        (JobState.LEASED,),
        (JobState.RUNNING,),
        (JobState.SUCCEEDED,),
        (JobState.FAILED,),
        (JobState.CANCELLED,),
        (JobState.QUEUED, JobState.RUNNING, JobState.FAILED, JobState.CANCELLED),
        (JobState.LEASED, JobState.RUNNING),
        (JobState.SUCCEEDED, JobState.QUEUED),
        tuple(STATES),
    ],
)
async def test_states_are_listed_newest_first_page_by_page(
    rows: Rows, reader: JobReader, states: tuple[JobState, ...], page_size: int
) -> None:
    jobs = await some_jobs(rows, 18)
    wanted = sorted((n for n, state in jobs.items() if not states or state in states), reverse=True)
    request = ListJobsRequest(page_size=page_size, states=[job_pb2.JobState.ValueType(s) for s in states])
    assert await every(reader, request) == wanted


@pytest.mark.parametrize("states", [(), (JobState.QUEUED, JobState.FAILED), (JobState.SUCCEEDED,)])
async def test_queue_labels_and_name_all_hold(rows: Rows, reader: JobReader, states: tuple[JobState, ...]) -> None:
    await rows.queue("other")
    await some_jobs(rows, 18)
    session = await rows.pool.fetchval("SELECT id FROM session")
    wanted = []
    for index in range(18):
        state = STATES[index % 6]
        number = await rows.job(name=f"job-{index % 3}", labels={"mod": str(index % 2), "x": "y"}, queue="other")
        await place(rows, number, state, session)
        if index % 3 == 1 and index % 2 == 1 and (not states or state in states):
            wanted.append(number)
    request = ListJobsRequest(
        page_size=2,
        queue="other",
        labels={"mod": "1"},
        name="job-1",
        states=[job_pb2.JobState.ValueType(s) for s in states],
    )
    assert await every(reader, request) == sorted(wanted, reverse=True)


async def test_a_call_looks_at_a_bounded_number_of_jobs(
    rows: Rows, reader: JobReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_list_queries, "MAX_EXAMINED", 5)
    needle = await rows.job(name="needle")
    await rows.ready(needle)
    for _ in range(12):
        await rows.ready(await rows.job(name="hay"))
    for states in ([], [job_pb2.JOB_STATE_QUEUED]):
        request = ListJobsRequest(name="needle", states=states)
        first = await reader.list(request)
        assert not first.jobs
        assert first.next_page_token
        assert await every(reader, request) == [needle]


async def test_times_bound_the_list(rows: Rows, reader: JobReader, pool: asyncpg.Pool) -> None:
    noon = datetime.now(UTC).replace(microsecond=0)
    numbers = []
    for second in range(6):
        number = await rows.job(at=noon + timedelta(seconds=second, microseconds=600))
        await rows.ready(number)
        numbers.append(number)
    request = ListJobsRequest()
    # A submit_time copied from one job: that job is in; as the end of the window it is out.
    request.submitted_after.FromDatetime(noon + timedelta(seconds=1, microseconds=600))
    request.submitted_before.FromDatetime(noon + timedelta(seconds=4, microseconds=600))
    assert await every(reader, request) == numbers[3:0:-1]
    far = ListJobsRequest(
        submitted_after=Timestamp(seconds=-62135596800), submitted_before=Timestamp(seconds=253402300799)
    )
    assert await every(reader, far) == numbers[::-1]
    none = ListJobsRequest(submitted_after=Timestamp(seconds=253402300799))
    assert await every(reader, none) == []
    with pytest.raises(InvalidField, match="submitted_after"):
        await reader.list(ListJobsRequest(submitted_after=Timestamp(seconds=1 << 60)))


@pytest.mark.parametrize("page_size", [1, 4, 100])
@pytest.mark.parametrize("states", [(), (JobState.QUEUED, JobState.FAILED), (JobState.SUCCEEDED,)])
async def test_pages_go_on_through_days_and_weeks(
    rows: Rows, reader: JobReader, pool: asyncpg.Pool, states: tuple[JobState, ...], page_size: int
) -> None:
    now = datetime.now(UTC)
    session = await rows.agent("agent-00001")
    wanted = []
    # The last is of a database whose clock is ahead of this one's.
    for index, days in enumerate([-90, -41, -40, -9, -8, -8, -7, -7, -6, -2, -1, -1, 0, 0, 2]):
        at = now + timedelta(days=days)
        async with pool.acquire() as connection:
            await ensure_partitions(connection, at)
        for state in (JobState.SUCCEEDED, JobState.FAILED if index % 2 else JobState.QUEUED):
            number = await rows.job(at=at)
            await place(rows, number, state, session)
            if not states or state in states:
                wanted.append(number)
    request = ListJobsRequest(page_size=page_size, states=[job_pb2.JobState.ValueType(s) for s in states])
    assert await every(reader, request) == wanted[::-1]
    request.page_token = ""
    request.submitted_after.FromDatetime(now - timedelta(days=8, seconds=1))
    request.submitted_before.FromDatetime(now - timedelta(seconds=1))
    bounds = first_job_at(now - timedelta(days=8, seconds=1)), first_job_at(now - timedelta(seconds=1))
    assert await every(reader, request) == [n for n in wanted[::-1] if bounds[0] <= n < bounds[1]]


async def test_jobs_of_one_moment_keep_their_order(rows: Rows, reader: JobReader) -> None:
    at = datetime.now(UTC)
    numbers = [await rows.job(at=at) for _ in range(9)]
    for number in numbers:
        await rows.ready(number)
    assert await every(reader, ListJobsRequest(page_size=2)) == sorted(numbers, reverse=True)


async def test_jobs_submitted_meanwhile_disturb_no_page(rows: Rows, reader: JobReader) -> None:
    jobs = await some_jobs(rows, 12)
    request = ListJobsRequest(page_size=5)
    page = await reader.list(request)
    await rows.ready(await rows.job())
    request.page_token = page.next_page_token
    told = [decode_job_id(job.id) for job in page.jobs] + await every(reader, request)
    assert told == sorted(jobs, reverse=True)


async def test_pages_of_large_specs_fit_into_a_message(
    rows: Rows, reader: JobReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_reader, "MAX_PAGE_BYTES", 10_000)
    body = spec()
    body.command.argv.append("x" * 4000)
    numbers = [await rows.job(body=body) for _ in range(7)]
    for number in numbers:
        await rows.ready(number)
    page = await reader.list(ListJobsRequest())
    assert len(page.jobs) == 2
    assert await every(reader, ListJobsRequest()) == numbers[::-1]


async def test_tokens_and_queues_are_checked(rows: Rows, reader: JobReader) -> None:
    await some_jobs(rows, 4)
    token = (await reader.list(ListJobsRequest(page_size=2))).next_page_token
    for request in (ListJobsRequest(page_token="nonsense!"), ListJobsRequest(page_token=token, name="job-1")):
        with pytest.raises(InvalidField) as refused:
            await reader.list(request)
        assert refused.value.violations[0].field == "page_token"
    # The page size is no filter.
    assert len((await reader.list(ListJobsRequest(page_token=token, page_size=1))).jobs) == 1
    with pytest.raises(QueueNotFound):
        await reader.list(ListJobsRequest(queue="nowhere"))
