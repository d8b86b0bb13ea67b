"""Lists: every filter, pages without loss or repetition, and plans that touch no table as a whole."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from asyncpg.pool import PoolConnectionProxy
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy.dialects.postgresql.asyncpg import dialect

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
from lessor_server.store.event_queries import events_query
from lessor_server.store.fleet_queries import groups_query
from lessor_server.store.job_list_queries import JobFilter, find_parameters, query_for
from lessor_server.store.job_queries import attempts_query, job_rows_query, standings_query
from lessor_server.store.partitions import ensure_partitions
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


# ---------------------------------------------------------------- plans


def literal(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, list):
        return "'{" + ",".join(map(str, value)) + "}'"
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    return "'" + text.replace("'", "''") + "'"


async def plan(connection: asyncpg.Connection | PoolConnectionProxy, query: Any, parameters: dict[str, Any]) -> str:
    """Returns the generic plan of a statement: the one a prepared statement ends up with."""
    compiled = query.compile(dialect=dialect())
    values = compiled.construct_params(parameters)
    arguments = ", ".join(literal(values[name]) for name in compiled.positiontup)
    await connection.execute("SET plan_cache_mode = force_generic_plan")
    await connection.execute(f"PREPARE looked AS {compiled}")
    lines = await connection.fetch(f"EXPLAIN EXECUTE looked({arguments})")
    await connection.execute("DEALLOCATE looked")
    return "\n".join(row[0] for row in lines)


@pytest.fixture
async def crowded(pool: asyncpg.Pool, rows: Rows) -> asyncpg.Pool:
    """60,000 jobs over three days; most of them succeeded, some failed, some wait, some run."""
    now = datetime.now(UTC)
    async with pool.acquire() as connection:
        for days in (2, 4):
            await ensure_partitions(connection, now - timedelta(days=days))
    shape = await rows.shape()
    session = await rows.agent("agent-00001")
    await pool.execute(
        "INSERT INTO job (id, queue_id, shape_id, priority, name, labels, spec, ttl_ms, max_failures, max_losses, "
        "backoff_initial_ms, backoff_max_ms, submitted_at) "
        "SELECT next_job_id(at), 1, $1, 0, 'n' || n % 100, jsonb_build_object('k', n % 50), '', 60000, 1, 10, 1, 1, at "
        "FROM generate_series(1, 60000) AS n, LATERAL (SELECT now() - n * interval '3 seconds' AS at) AS t",
        shape,
    )
    await pool.execute(
        "INSERT INTO attempt (job_id, lease_id, attempt, agent_id, gpu_uuids, outcome, signal, failures, losses, "
        "final_state, granted_at, started_at, ended_at, log_bytes) "
        "SELECT id, nextval('lease_number'), 1, 'agent-00001', '{}', 1, 0, 0, 0, "
        "CASE WHEN id % 50 = 0 THEN 5 WHEN id % 51 = 0 THEN 6 ELSE 4 END, now(), now(), now(), 0 "
        "FROM job WHERE submitted_at < now() - interval '10000 seconds'"
    )
    await pool.execute(
        "INSERT INTO ready (job_id, queue_id, shape_id, priority, attempts, failures, losses) "
        "SELECT id, 1, shape_id, 0, 0, 0, 0 FROM job WHERE submitted_at >= now() - interval '9000 seconds'"
    )
    await pool.execute(
        "INSERT INTO lease (job_id, lease_id, session_id, agent_id, attempt, phase, queue_id, shape_id, priority, "
        "failures, losses, max_failures, max_losses, backoff_initial_ms, backoff_max_ms, deduped, ttl_ms, gpu_uuids, "
        "offered_at, granted_at) SELECT id, nextval('lease_number'), $1, 'agent-00001', 1, 1 + id % 3, 1, shape_id, 0, "
        "0, 0, 1, 10, 1, 1, false, 60000, '{}', 0, now() FROM job WHERE submitted_at < now() - interval '9000 seconds' "
        "AND submitted_at >= now() - interval '10000 seconds'",
        session,
    )
    await pool.execute(
        "INSERT INTO event (job_ids, states, attempts) SELECT ARRAY[id], '{1}', '{0}' FROM job LIMIT 20000"
    )
    await pool.execute("ANALYZE")
    return pool


def whole_scans(text: str) -> list[str]:
    """The sequential scans of large tables in a plan; an empty partition may be read as a whole."""
    return [
        line.strip()
        for line in text.splitlines()
        if re.search(r"Seq Scan on (job|attempt|ready|event)", line) and int(re.search(r"rows=(\d+)", line)[1]) > 1000  # type: ignore[index]
    ]


FILTERS = {
    "all": JobFilter(),
    "queue": JobFilter(queue_id=1),
    "queued": JobFilter(states=frozenset({JobState.QUEUED})),
    "queued of a queue": JobFilter(states=frozenset({JobState.QUEUED}), queue_id=1),
    "running": JobFilter(states=frozenset({JobState.RUNNING})),
    "failed": JobFilter(states=frozenset({JobState.FAILED})),
    "cancelled by name": JobFilter(states=frozenset({JobState.CANCELLED}), name="n7"),
    "succeeded": JobFilter(states=frozenset({JobState.SUCCEEDED})),
    "unhappy and waiting": JobFilter(states=frozenset({JobState.FAILED, JobState.CANCELLED, JobState.QUEUED})),
    "by label": JobFilter(labels={"k": "7"}),
    "by time": JobFilter(submitted_after=datetime.now(UTC) - timedelta(days=1)),
}


async def test_no_list_and_no_look_up_reads_a_table_as_a_whole(crowded: asyncpg.Pool) -> None:
    numbers = [row["id"] for row in await crowded.fetch("SELECT id FROM job ORDER BY id DESC LIMIT 50")]
    asked = {"numbers": numbers, "lowest": min(numbers), "highest": max(numbers)}
    async with crowded.acquire() as connection:
        for name, wanted in FILTERS.items():
            text = await plan(connection, query_for(wanted), find_parameters(wanted, None, 100))
            assert not whole_scans(text), f"{name}:\n{text}"
        others = {
            "rows": (job_rows_query(), asked),
            "standings": (standings_query(), asked),
            "attempts": (attempts_query(), {"number": numbers[0]}),
            "events": (events_query(), {"xid": 0, "id": 0, "max_events": 500}),
            "groups": (groups_query(), {"per_group": 100}),
        }
        for name, (query, parameters) in others.items():
            text = await plan(connection, query, parameters)
            assert not whole_scans(text), f"{name}:\n{text}"


async def test_times_leave_out_partitions(crowded: asyncpg.Pool) -> None:
    now = datetime.now(UTC)
    wanted = JobFilter(submitted_after=now - timedelta(days=2), submitted_before=now - timedelta(days=1))
    async with crowded.acquire() as connection:
        text = await plan(connection, query_for(wanted), find_parameters(wanted, None, 100))
    assert re.search(r"Subplans Removed: \d+", text), text


async def test_a_page_of_failures_among_many_looks_at_little(crowded: asyncpg.Pool, database: Database) -> None:
    wanted = JobFilter(states=frozenset({JobState.FAILED}))
    found = await job_list_queries.find_jobs(database, wanted, None, 10)
    best = await crowded.fetch("SELECT job_id FROM attempt WHERE final_state = 5 ORDER BY job_id DESC LIMIT 10")
    assert found.numbers == [row["job_id"] for row in best]
    assert found.resume_before == found.numbers[-1]
