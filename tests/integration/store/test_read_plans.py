"""What the API reads, it reads by an index: every statement of every read, as sent, on tables with a past."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import Engine, event

from benchmarks import history, history_specs
from lessor.v1 import job_pb2
from lessor.v1.job_service_pb2 import ListJobsRequest
from lessor_server.bells import Bells
from lessor_server.domain.states import JobState
from lessor_server.services.explanation import Explainer
from lessor_server.services.job_reader import JobReader
from lessor_server.services.watch import Watches, WatchRequest
from lessor_server.store import event_queries, job_queries, log_queries
from lessor_server.store.catalog import Catalog
from lessor_server.store.database import SESSION_SETTINGS, Database
from lessor_server.store.job_list_queries import MAX_EXAMINED, JobFilter, find_jobs
from lessor_server.store.partitions import day_of_job, partition_name
from lessor_server.store.reads import MAX_DAYS

DAYS = 5
PAST = {"job", "attempt", "event", "log_chunk", "log_head", "progress"}
"""Tables that grow with the jobs there ever were."""
LIVE = {"ready", "delayed", "lease"}
"""And with the jobs that wait and run: only an explanation, which counts those that go first, reads all of them."""
MANY_ROWS, MANY_PAGES = 300, 16
"""A table of fewer rows, or of rows so small that they fill fewer pages, is read as fast as its index."""
MOST_ROWS = 1.5 * MAX_EXAMINED
"""What a read may look at, of all tables together."""


def _at(days_ago: float) -> Timestamp:
    at = Timestamp()
    at.FromDatetime(datetime.now(UTC) - timedelta(days=days_ago))
    return at


QUEUE, NAME = history_specs.QUEUES[3], history_specs.NAMES[7]
QUEUED, LEASED, RUNNING, SUCCEEDED, FAILED, CANCELLED = job_pb2.JobState.values()[1:]

LISTS = {
    "all": ListJobsRequest(),
    "queue": ListJobsRequest(queue=QUEUE),
    "name": ListJobsRequest(name=NAME),
    "label": ListJobsRequest(labels={"team": "vision"}),
    "nothing": ListJobsRequest(labels={"no": "such"}),
    "time": ListJobsRequest(submitted_after=_at(3), submitted_before=_at(2)),
    "queue and time": ListJobsRequest(queue=QUEUE, submitted_before=_at(2)),
    "queued": ListJobsRequest(states=[QUEUED]),
    "leased": ListJobsRequest(states=[LEASED]),
    "running": ListJobsRequest(states=[RUNNING]),
    "succeeded": ListJobsRequest(states=[SUCCEEDED]),
    "failed": ListJobsRequest(states=[FAILED]),
    "cancelled": ListJobsRequest(states=[CANCELLED]),
    "live": ListJobsRequest(states=[QUEUED, LEASED, RUNNING]),
    "not succeeded": ListJobsRequest(states=[QUEUED, LEASED, RUNNING, FAILED, CANCELLED]),
    "ended": ListJobsRequest(states=[SUCCEEDED, FAILED, CANCELLED]),
    "succeeded or queued": ListJobsRequest(states=[SUCCEEDED, QUEUED]),
    "succeeded of a queue": ListJobsRequest(states=[SUCCEEDED], queue=QUEUE),
    "succeeded or running of a name": ListJobsRequest(states=[SUCCEEDED, RUNNING], name=NAME),
    "failed of a queue": ListJobsRequest(states=[FAILED], queue=QUEUE),
    "queued of a queue": ListJobsRequest(states=[QUEUED], queue=QUEUE),
    "cancelled of a name": ListJobsRequest(states=[CANCELLED], name=NAME),
    "failed of a label and time": ListJobsRequest(states=[FAILED], labels={"team": "vision"}, submitted_after=_at(3)),
}


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """The server's own pools on a database with a past, of which only partitions have statistics."""
    await history.add_finished(database_url, 50_000, days=DAYS)
    await history.add_waiting(database_url, 5_000, gpus=1)
    await history.add_leased(database_url, 1_000)
    made = await Database.connect(database_url, pool_size=5)
    await made.pool.execute(
        "INSERT INTO event (job_ids, states, attempts) SELECT ARRAY[id], '{1}', '{0}' FROM job LIMIT 20000"
    )
    await made.pool.execute("VACUUM (ANALYZE) event")
    yield made
    await made.close()


@contextmanager
def overheard(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """Notes the statements that are sent through any door of any Database while the block runs."""
    heard: list[tuple[str, tuple[Any, ...]]] = []
    fetch = asyncpg.Pool.fetch

    async def noting(pool: asyncpg.Pool, query: str, *args: Any, **options: Any) -> Any:
        heard.append((query, args))
        return await fetch(pool, query, *args, **options)

    def note(connection: Any, cursor: Any, query: str, args: tuple[Any, ...], *_: Any) -> None:
        heard.append((query, args))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(asyncpg.Pool, "fetch", noting)
            yield heard
    finally:
        event.remove(Engine, "before_cursor_execute", note)


def literal(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, list | tuple):
        return "'{" + ",".join(map(str, value)) + "}'"
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    return "'" + text.replace("'", "''") + "'"


async def plan(connection: asyncpg.Connection, query: str, args: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Runs a statement as the server's connections do. Returns the nodes of its plan, and what each came to."""
    await connection.execute(f"PREPARE looked AS {query}")
    arguments = f"({', '.join(map(literal, args))})" if args else ""
    text = await connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE looked{arguments}")
    await connection.execute("DEALLOCATE looked")
    nodes = [json.loads(text)[0]["Plan"]]
    for node in nodes:
        nodes += node.get("Plans", [])
    return nodes


def table_of(node: dict[str, Any]) -> str:
    """Returns the table that a node reads, whichever partition it is; empty: none."""
    return re.sub(r"_\d{8}$", "", node.get("Relation Name", ""))


def rows_read(node: dict[str, Any]) -> float:
    """Returns how many rows a node looked at."""
    each = node["Actual Rows"] + node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
    return float(each * node["Actual Loops"])


async def of_each_state(database: Database) -> list[int]:
    """Returns jobs of all states."""
    found = [await find_jobs(database, JobFilter(states=frozenset({state})), None, 3) for state in JobState]
    return [number for each in found for number in each.numbers]


async def of_each_day(database: Database) -> list[int]:
    """Returns one job of each day of the past."""
    days = await database.pool.fetch("SELECT min(job_id) AS first FROM attempt GROUP BY tableoid ORDER BY 1")
    assert len(days) == DAYS > MAX_DAYS, "too few to be asked for in one statement"
    return [row["first"] for row in days]


async def read_everything(database: Database, numbers: list[int], days: list[int], leases: list[int]) -> None:
    """Has the API read what it reads, explanations apart."""
    catalog = Catalog(database)
    reader = JobReader(database, catalog)
    for request in LISTS.values():
        await reader.list(request)
    for number in numbers:
        await reader.get(number)
        await reader.attempts(number)
    await job_queries.read_jobs(database, days)
    await job_queries.read_attributes(database, days)
    await job_queries.read_standings(database, days)
    await event_queries.read_progress(database, days, leases)
    for lease_id in leases:
        await log_queries.read_attempt_keys(database, days[0])
        await log_queries.read_log_standing(database, days[0], lease_id)
        assert await log_queries.read_chunks(database, lease_id, 0)
        await log_queries.read_chunks_before(database, lease_id, 100, 10)
    watches = Watches(database, Bells())
    for wanted in (WatchRequest(days), WatchRequest(queue_id=2), WatchRequest(days[:1], include_progress=True)):
        async with aclosing(watches.watch(wanted)) as responses:
            await anext(responses)
    await watches.close()


async def offences(database: Database, heard: list[tuple[str, tuple[Any, ...]]], tables: set[str]) -> list[str]:
    """Returns what in the plans of statements is not as it should be."""
    found = []
    connection = await asyncpg.connect(database.url, server_settings=SESSION_SETTINGS)
    try:
        rows = await connection.fetch("SELECT relname, relpages FROM pg_class WHERE reltuples > $1", MANY_ROWS)
        filled = {row["relname"] for row in rows}
        large = {row["relname"] for row in rows if row["relpages"] >= MANY_PAGES}
        assert tables - {"delayed"} <= {re.sub(r"_\d{8}$", "", name) for name in filled}
        for query, args in dict(heard).items():
            nodes = await plan(connection, query, args)
            reads = [node for node in nodes if table_of(node) in tables]
            scanned = {node["Relation Name"] for node in reads if node["Node Type"] == "Seq Scan"} & large
            found += [f"{name} is read as a whole by {query}" for name in sorted(scanned)]
            if (looked_at := sum(map(rows_read, reads))) > MOST_ROWS:
                found.append(f"{looked_at} rows are looked at by {query}")
            if any("Gather" in node["Node Type"] for node in nodes):
                found.append(f"processes are started for {query}")
    finally:
        await connection.close()
    return found


async def test_no_read_scans_a_large_table(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, days = await of_each_state(database), await of_each_day(database)
    leases = [row["lease_id"] for row in await database.pool.fetch("SELECT max(lease_id) AS lease_id FROM log_chunk "
                                                                   "GROUP BY tableoid")]  # fmt: skip
    with overheard(monkeypatch) as heard:
        await read_everything(database, numbers, days, leases)
    assert len(dict(heard)) > len(LISTS) + 15
    assert not await offences(database, heard, PAST | LIVE)


async def test_no_explanation_scans_the_past(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = await of_each_state(database)
    with overheard(monkeypatch) as heard:
        for number in numbers:
            await Explainer(database, Catalog(database)).explain(number)
    assert not await offences(database, heard, PAST)


async def test_one_job_is_looked_for_in_the_partitions_of_its_day(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = await database.pool.fetchval("SELECT job_id FROM attempt WHERE log_bytes > 0 ORDER BY job_id LIMIT 1")
    day = datetime.now(UTC) - timedelta(days=DAYS)
    with overheard(monkeypatch) as heard:
        await JobReader(database, Catalog(database)).get(number)
        await JobReader(database, Catalog(database)).attempts(number)
    connection = await asyncpg.connect(database.url, server_settings=SESSION_SETTINGS)
    try:
        for query, args in heard:
            nodes = await plan(connection, query, args)
            partitions = {node["Relation Name"] for node in nodes if table_of(node) in PAST}
            assert partitions, query
            assert all(name.endswith(f"_{day:%Y%m%d}") for name in partitions), query
    finally:
        await connection.close()


async def test_a_list_of_a_time_leaves_out_the_other_days(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime.now(UTC)
    wanted = JobFilter(submitted_after=now - timedelta(days=3), submitted_before=now - timedelta(days=2))
    with overheard(monkeypatch) as heard:
        await find_jobs(database, wanted, None, 10)
    connection = await asyncpg.connect(database.url, server_settings=SESSION_SETTINGS)
    try:
        nodes = [node for query, args in heard for node in await plan(connection, query, args)]
    finally:
        await connection.close()
    partitions = {node["Relation Name"] for node in nodes if table_of(node) in PAST}
    days = [f"_{now - timedelta(days=days):%Y%m%d}" for days in (2, 3)]
    assert partitions
    assert all(name.endswith(tuple(days)) for name in partitions)


async def test_a_list_is_planned_for_the_day_that_fills_it(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = (await find_jobs(database, JobFilter(), None, 1)).numbers[0]
    with overheard(monkeypatch) as heard:
        await find_jobs(database, JobFilter(), newest + 1, 10)
    ((query, args),) = heard
    connection = await asyncpg.connect(database.url, server_settings=SESSION_SETTINGS)
    try:
        nodes = await plan(connection, query, args)
    finally:
        await connection.close()
    assert {node["Relation Name"] for node in nodes if table_of(node) in PAST} == {
        partition_name("job", day_of_job(newest))
    }


async def test_a_rare_state_is_found_without_looking_at_the_others(database: Database) -> None:
    found = await find_jobs(database, JobFilter(states=frozenset({JobState.FAILED})), None, 10)
    best = await database.pool.fetch("SELECT job_id FROM attempt WHERE final_state = 5 ORDER BY job_id DESC LIMIT 10")
    assert found.numbers == [row["job_id"] for row in best]
    assert found.resume_before == found.numbers[-1]
