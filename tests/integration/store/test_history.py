"""The past that benchmarks and plan tests are given: real to the server in every respect."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from benchmarks import history, history_specs
from lessor.ids import decode_job_id
from lessor.v1 import job_pb2
from lessor.v1.job_service_pb2 import ListJobsRequest
from lessor_server.services.job_reader import JobReader
from lessor_server.store.catalog import Catalog
from lessor_server.store.database import Database
from lessor_server.store.partitions import day_of, partition_name
from lessor_server.store.submit import JobRow, JobTerms, Request, Submitted, submit_batch

DAYS = 3
FINISHED = 6_000


async def test_a_past_reads_like_one_that_happened(database_url: str) -> None:
    filled = await history.add_finished(database_url, FINISHED, days=DAYS)
    waiting = await history.add_waiting(database_url, 100, gpus=1)
    leased = await history.add_leased(database_url, 50)
    assert filled.jobs == FINISHED
    assert (len(waiting), len(leased)) == (100, 50)
    database = await Database.connect(database_url, pool_size=4)
    try:
        pool = database.pool
        today = day_of(datetime.now(UTC))
        sizes = [await pool.fetchval(f"SELECT count(*) FROM {partition_name('job', today - n)}") for n in (3, 2, 1)]
        assert sizes == [FINISHED // DAYS] * DAYS
        # Each partition has the indexes of its parent, and no other.
        for table, indexes in (("job", 2), ("attempt", 3), ("log_head", 1)):
            name = partition_name(table, today - 1)
            assert await pool.fetchval("SELECT count(*) FROM pg_indexes WHERE tablename = $1", name) == indexes
        ends = await pool.fetch("SELECT final_state, count(*) AS jobs FROM attempt GROUP BY 1")
        states = {row["final_state"]: row["jobs"] for row in ends}
        assert states == {4: FINISHED * 97 // 100, 5: FINISHED * 2 // 100, 6: FINISHED // 100, None: FINISHED // 200}
        reader = JobReader(database, Catalog(database))
        page = await reader.list(ListJobsRequest(states=[job_pb2.JOB_STATE_SUCCEEDED], page_size=1000))
        again = next(job for job in page.jobs if job.attempt == 2)
        assert again.losses == 1
        assert again.spec.name in history_specs.NAMES
        assert datetime.now(UTC) - again.submit_time.ToDatetime(tzinfo=UTC) < timedelta(days=DAYS + 1)
        attempts = await reader.attempts(decode_job_id(again.id))
        assert [attempt.outcome for attempt in attempts] == [job_pb2.OUTCOME_LOST, job_pb2.OUTCOME_SUCCEEDED]
        logged = await pool.fetchval("SELECT min(job_id) FROM attempt WHERE log_bytes > 0")
        assert [attempt.log_bytes for attempt in await reader.attempts(logged)] == [180]
        assert (await reader.get(logged)).progress.fraction == 1
        for number in waiting[:5]:
            assert (await reader.get(number)).state == job_pb2.JOB_STATE_QUEUED
        running = ListJobsRequest(states=[job_pb2.JOB_STATE_LEASED, job_pb2.JOB_STATE_RUNNING])
        assert {decode_job_id(job.id) for job in (await reader.list(running)).jobs} == set(leased)
        rare = await reader.list(ListJobsRequest(labels=dict([history_specs.RARE_LABEL])))
        assert len(rare.jobs) <= 1
    finally:
        await database.close()


async def test_what_comes_after_a_past_is_not_in_its_way(database_url: str) -> None:
    """New jobs and leases have numbers of their own, in partitions that are there."""
    await history.add_finished(database_url, 300, days=DAYS)
    database = await Database.connect(database_url, pool_size=4)
    try:
        shape = await database.pool.fetchval("SELECT min(id) FROM shape")
        row = JobRow(JobTerms(1, shape, 0, 60_000, None, None, 1, 10, 1000, 300_000), "", "{}", b"")
        (submitted,) = await submit_batch(database, [Request("", "r", b"", [row] * 10)])
        assert isinstance(submitted, Submitted)
        assert min(submitted.job_numbers) > await database.pool.fetchval("SELECT max(job_id) FROM attempt")
        drawn = await database.pool.fetchval("SELECT nextval('lease_number')")
        assert drawn > await database.pool.fetchval("SELECT max(lease_id) FROM attempt")
    finally:
        await database.close()


async def test_a_past_is_written_once(database_url: str) -> None:
    await history.add_finished(database_url, 30, days=2)
    with pytest.raises(ValueError, match="has rows"):
        await history.add_finished(database_url, 30, days=2)
    with pytest.raises(ValueError, match="do not fit"):
        await history.add_finished(database_url, (2 << 21) + 1, days=2)
    connection = await asyncpg.connect(database_url)
    try:
        assert await connection.fetchval("SELECT count(*) FROM job") == 30
    finally:
        await connection.close()
