"""A database with a past: finished jobs by the million, in the partitions and with the indexes they would be in.

The rows are written by plain SQL, one day's partition at a time, into tables of their own that the
server's partition code then attaches. Specs, shapes and job numbers are those that the server makes.
What a past also leaves and is not written here: rows of ``request`` and ``event``, which are kept for days.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import asyncpg

from benchmarks.history_specs import PAST_SPECS, QUEUES, RARE_EVERY, make_templates, specs_now, specs_of_the_past
from lessor.lifecycle import LeasePhase, Outcome
from lessor.v1 import job_pb2
from lessor_server.domain.states import JobState
from lessor_server.store.partitions import day_of, ensure_partitions, lease_bounds, partition_name

if TYPE_CHECKING:
    from benchmarks.system import Postgres

DAYS = 90
"""What the server keeps unless it is told otherwise."""

LEASE_HOLDERS = 50
"""Sessions that hold the leases of :func:`add_leased`."""

FILL_SETTINGS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    # What is written into a table made by the same transaction then needs no log at all.
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "autovacuum": "off",
    "maintenance_work_mem": "256MB",
    "max_wal_size": "16GB",
    "checkpoint_timeout": "1h",
    # A partition's statistics are then made of 7,500 rows: they say the same, and are a quarter of the time saved.
    "default_statistics_target": "25",
}
"""For the time of the fill only: a fill that a crash cuts short is begun anew."""

_LOGGED_EVERY = 20
_COUNT_MASK = (1 << 21) - 1


@dataclass(frozen=True)
class Filled:
    """What a fill made."""

    jobs: int
    seconds: float
    stored_bytes: int
    """Of the whole database, indexes included."""

    @property
    def per_s(self) -> float:
        """Jobs per second."""
        return self.jobs / self.seconds


@contextmanager
def filling(postgres: Postgres) -> Iterator[str]:
    """Has PostgreSQL run with :data:`FILL_SETTINGS` while the block runs; yields the URL to use inside.

    No server may be connected. Afterwards it runs with its own settings again, under a new URL,
    and what was written is on disk.
    """
    # Imported here: whoever fills a database of its own needs no PostgreSQL of ours.
    from lessor_server.embedded import EmbeddedPostgres

    postgres.made.stop()
    fast = EmbeddedPostgres(postgres.made.data_dir, settings={"shared_buffers": "1GB", **FILL_SETTINGS})
    fast.start()
    try:
        yield fast.database_url
        asyncio.run(_checkpoint(fast.database_url))
    finally:
        fast.stop()
    # Or the measurement that follows would share the disk with what the fill left to be written.
    os.sync()
    postgres.made.start()
    postgres.url = postgres.made.database_url


async def _checkpoint(url: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("CHECKPOINT")
    finally:
        await connection.close()


# ---------------------------------------------------------------- finished jobs


async def add_finished(
    url: str, jobs: int, *, days: int = DAYS, connections: int = 2, say: Callable[[str], None] = lambda line: None
) -> Filled:
    """Writes ``jobs`` finished jobs, spread evenly over the ``days`` before today, vacuumed and analyzed.

    97 % succeeded, 2 % failed, 1 % were cancelled (half of them while they waited); one in 200 took two
    attempts; one in 20 has a log and progress. They are spread over :data:`QUEUES`, :data:`NAMES`, four
    shapes, three priorities and the labels ``team`` and ``experiment``.

    Args:
        url: A migrated database without jobs in these days.
        jobs: At most 2**21 per day.
        days: The oldest is this many days ago.
        connections: Days filled at the same time.
        say: Told how far it is.

    Raises:
        ValueError: There are too many jobs for the days, or one of the days has jobs already.
    """
    if jobs > days << 21:
        raise ValueError(f"{jobs} jobs do not fit into {days} days: at most {1 << 21} a day")
    began = time.monotonic()
    today = day_of(datetime.now(UTC))
    past = range(today - days, today)
    sizes = [jobs // days + (number < jobs % days) for number in range(days)]
    await make_templates(url, specs_of_the_past())
    connection = await asyncpg.connect(url)
    try:
        await _make_room(connection, past)
        indexes = {table: await _index_statements(connection, table) for table in _FILLED}

        async def fill(own: asyncpg.Connection, item: tuple[int, int]) -> None:
            await _fill_day(own, item[0], item[1], indexes)

        await _shared_out(url, connections, fill, list(zip(past, sizes, strict=True)), say)
        for day in past:
            # It attaches yesterday's, today's and a week's; what is there it leaves as it is.
            if not (day - past[0]) % 8:
                await ensure_partitions(connection, _time_of(day + 1))
        await ensure_partitions(connection)
        partitions = [partition_name(table, day) for table in _FILLED for day in past]
        await _shared_out(url, connections, _vacuum, partitions, say)
        await connection.execute("DROP TABLE history_template")
        stored = await connection.fetchval("SELECT pg_database_size(current_database())")
    finally:
        await connection.close()
    return Filled(jobs, time.monotonic() - began, stored)


_FILLED = ("job", "attempt", "progress", "log_head", "log_chunk")


async def _shared_out(
    url: str, connections: int, work: Callable[[Any, Any], Awaitable[None]], items: Sequence[Any],
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Does ``work(connection, item)`` for all items, on so many connections at once."""
    todo = iter(items)
    done = 0

    async def one() -> None:
        nonlocal done
        connection = await asyncpg.connect(url)
        try:
            for item in todo:
                await work(connection, item)
                done += 1
                if not done % max(1, len(items) // 5):
                    say(f"{work.__name__.strip('_')}: {done} of {len(items)}")
        finally:
            await connection.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(connections):
            group.create_task(one())


async def _vacuum(connection: asyncpg.Connection, table: str) -> None:
    # Partition by partition, as autovacuum does it: the parent has no statistics here either.
    await connection.execute(f"VACUUM (ANALYZE) {table}")


async def _make_room(connection: asyncpg.Connection, days: Iterable[int]) -> None:
    """Drops the empty partitions of these days, which were made ahead of time.

    Raises:
        ValueError: One of them is not empty.
    """
    for day in days:
        for table in _FILLED:
            name = partition_name(table, day)
            if await connection.fetchval("SELECT to_regclass($1) IS NULL", name):
                continue
            if await connection.fetchval(f"SELECT EXISTS (SELECT FROM {name})"):
                raise ValueError(f"{name} has rows: a past is written into an empty database")
            await connection.execute(f"DROP TABLE {name}")


async def _index_statements(connection: asyncpg.Connection, table: str) -> list[str]:
    """Returns what gives a table named {0} the keys and indexes of ``table``."""
    rows = await connection.fetch(
        "SELECT pg_get_indexdef(i.indexrelid) AS index, pg_get_constraintdef(c.oid) AS key FROM pg_index AS i "
        "LEFT JOIN pg_constraint AS c ON c.conindid = i.indexrelid AND c.conrelid = i.indrelid "
        "WHERE i.indrelid = to_regclass($1)",
        table,
    )
    statements = []
    for row in rows:
        if row["key"] is not None:
            statements.append(f"ALTER TABLE {{0}} ADD {row['key']}")
        else:
            statements.append(re.sub(r"INDEX \S+ ON ONLY \S+", "INDEX ON {0}", row["index"]))
    return statements


async def _fill_day(connection: asyncpg.Connection, day: int, jobs: int, indexes: dict[str, list[str]]) -> None:
    async with connection.transaction():
        names = {table: partition_name(table, day) for table in _FILLED}
        for table, name in names.items():
            await connection.execute(f"CREATE TABLE {name} (LIKE {table} INCLUDING DEFAULTS INCLUDING CONSTRAINTS)")
        start = _time_of(day)
        step = timedelta(days=1) / max(1, jobs)
        await connection.execute(_JOBS.format(**names), jobs, start, step, day)
        first_lease = lease_bounds(day)[0] + 1
        await connection.execute(_ATTEMPTS.format(**names), first_lease)
        await connection.execute(_EARLIER_ATTEMPTS.format(**names))
        for statement in _LOGS:
            await connection.execute(statement.format(**names))
        for table, name in names.items():
            for statement in indexes[table]:
                await connection.execute(statement.format(name))


def _time_of(day: int) -> datetime:
    return datetime.fromtimestamp(day * 86_400, UTC)


# By a hash: what a job is must not go with what becomes of it.
_JOBS = f"""
INSERT INTO {{job}} (id, queue_id, shape_id, priority, name, labels, spec, ttl_ms, start_timeout_ms, max_failures,
    max_losses, backoff_initial_ms, backoff_max_ms, submitted_at)
SELECT next_job_id(i.at), t.queue_id, t.shape_id, t.priority, t.name, t.labels, t.spec, t.ttl_ms, NULL, t.max_failures,
    t.max_losses, t.backoff_initial_ms, t.backoff_max_ms, i.at
FROM (SELECT n, CAST($2 AS timestamptz) + n * CAST($3 AS interval) AS at
    FROM generate_series(0, CAST($1 AS int) - 1) AS n) AS i
JOIN history_template AS t ON t.id = CASE
    WHEN (n + CAST($4 AS bigint) * $1) % {RARE_EVERY} = 0 THEN {PAST_SPECS}
    ELSE (hashint8(n + CAST($4 AS bigint) * $1) & 2147483647) % {PAST_SPECS}
END
"""

# A job's lower bits count the jobs: they tell its fate.
_FATE = f"(id & {_COUNT_MASK}) % 200"

_ATTEMPTS = f"""
INSERT INTO {{attempt}} (job_id, lease_id, attempt, agent_id, gpu_uuids, outcome, exit_code, signal, failures, losses,
    final_state, granted_at, started_at, ended_at, log_bytes)
SELECT id,
    CASE WHEN fate = 4 THEN 0 ELSE CAST($1 AS bigint) + 2 * n END,
    CASE fate WHEN 4 THEN 0 WHEN 6 THEN 2 ELSE 1 END,
    CASE WHEN fate <> 4 THEN 'agent-' || n % 100 END,
    '{{{{}}}}',
    CASE WHEN fate < 4 THEN {int(Outcome.FAILED)} WHEN fate < 6 THEN {int(Outcome.CANCELLED)}
        ELSE {int(Outcome.SUCCEEDED)} END,
    CASE WHEN fate < 4 THEN 1 WHEN fate >= 6 THEN 0 END,
    CASE WHEN fate = 5 THEN 15 ELSE 0 END,
    CASE WHEN fate < 4 THEN 1 ELSE 0 END,
    CASE WHEN fate = 6 THEN 1 ELSE 0 END,
    CASE WHEN fate < 4 THEN {int(JobState.FAILED)} WHEN fate < 6 THEN {int(JobState.CANCELLED)}
        ELSE {int(JobState.SUCCEEDED)} END,
    CASE WHEN fate <> 4 THEN submitted_at + interval '1 second' END,
    CASE WHEN fate <> 4 THEN submitted_at + interval '2 seconds' END,
    submitted_at + interval '60 seconds',
    CASE WHEN fate > 6 AND n % {_LOGGED_EVERY} = 7 THEN 180 ELSE 0 END
FROM (SELECT id, submitted_at, {_FATE} AS fate, row_number() OVER () AS n FROM {{job}}) AS j
"""

_EARLIER_ATTEMPTS = f"""
INSERT INTO {{attempt}} (job_id, lease_id, attempt, agent_id, gpu_uuids, outcome, signal, failures, losses, granted_at,
    ended_at, log_bytes)
SELECT job_id, lease_id - 1, 1, 'agent-99', '{{{{}}}}', {int(Outcome.LOST)}, 0, 0, 1,
    granted_at - interval '500 milliseconds', granted_at, 0
FROM {{attempt}} WHERE losses = 1
"""

_LOGS = (
    "INSERT INTO {progress} SELECT lease_id, job_id, 1, 'epoch 10 of 10', '{{\"loss\": 0.25}}', ended_at "
    "FROM {attempt} WHERE log_bytes > 0",
    "INSERT INTO {log_head} SELECT lease_id, log_bytes, log_bytes, 0 FROM {attempt} WHERE log_bytes > 0",
    "INSERT INTO {log_chunk} SELECT lease_id, 0, 1, decode(repeat('6c6f67206c696e650a', 20), 'hex'), ended_at "
    "FROM {attempt} WHERE log_bytes > 0",
)


# ---------------------------------------------------------------- jobs that wait or run


async def add_waiting(
    url: str, jobs: int, *, queues: Sequence[str] = QUEUES, shapes: int = 4, gpus: int = 0
) -> list[int]:
    """Writes jobs that wait in ``ready``, submitted just now; returns the numbers of up to 1,000 of them.

    Args:
        url: A migrated database.
        jobs: How many.
        queues: They go to these in turn; made where they are missing.
        shapes: Number of different needs of memory among them; each job needs 1 CPU and at least 1 KiB.
        gpus: Each needs so many.
    """
    return await _add_now(url, jobs, specs_now(queues, shapes, gpus), "ready", _QUEUED)


async def add_leased(url: str, jobs: int) -> list[int]:
    """Writes jobs whose leases are held by agents that are away and have a day to come back.

    Nine of ten run, the others are accepted and not started. Returns the numbers of up to 1,000 of them.
    """
    connection = await asyncpg.connect(url)
    try:
        first = await connection.fetchval(_SESSIONS, LEASE_HOLDERS)
    finally:
        await connection.close()
    return await _add_now(url, jobs, specs_now(QUEUES, 4, 0), "lease", _LEASED, first)


async def _add_now(
    url: str, jobs: int, specs: Sequence[job_pb2.JobSpec], table: str, placed: str, *more: Any
) -> list[int]:
    await make_templates(url, specs)
    connection = await asyncpg.connect(url)
    try:
        await ensure_partitions(connection)
        found = await connection.fetch(_SUBMITTED + placed, jobs, len(specs), *more)
        await connection.execute("DROP TABLE history_template")
        for name in (table, partition_name("job", day_of(datetime.now(UTC)))):
            await _vacuum(connection, name)
    finally:
        await connection.close()
    return [row["job_id"] for row in found]


_SUBMITTED = """
WITH stored AS (
    INSERT INTO job (id, queue_id, shape_id, priority, name, labels, spec, ttl_ms, max_failures, max_losses,
        backoff_initial_ms, backoff_max_ms, submitted_at)
    SELECT next_job_id(now()), t.queue_id, t.shape_id, t.priority, t.name, t.labels, t.spec, t.ttl_ms, t.max_failures,
        t.max_losses, t.backoff_initial_ms, t.backoff_max_ms, now()
    FROM generate_series(0, CAST($1 AS int) - 1) AS n JOIN history_template AS t ON t.id = n % CAST($2 AS int)
    RETURNING id, queue_id, shape_id, priority
),
"""

_QUEUED = """
placed AS (
    INSERT INTO ready (job_id, queue_id, shape_id, priority, attempts, failures, losses)
    SELECT id, queue_id, shape_id, priority, 0, 0, 0 FROM stored RETURNING job_id
)
SELECT job_id FROM placed LIMIT 1000
"""

# Returns the first of the sessions, which have consecutive numbers.
_SESSIONS = """
WITH made AS (
    INSERT INTO session (agent_id, epoch, renewed_at, heartbeat_ms, replica)
    SELECT 'away-' || n, 1, clock, 5000, '' FROM generate_series(1, CAST($1 AS int)) AS n, leader RETURNING id
)
SELECT min(id) FROM made
"""

_LEASED = f"""
placed AS (
    INSERT INTO lease (job_id, lease_id, session_id, agent_id, attempt, phase, queue_id, shape_id, priority, failures,
        losses, max_failures, max_losses, backoff_initial_ms, backoff_max_ms, ttl_ms, gpu_uuids, offered_at,
        granted_at, started_at)
    SELECT stored.id, nextval('lease_number'), $3 + stored.id % {LEASE_HOLDERS},
        'away-' || 1 + stored.id % {LEASE_HOLDERS}, 1,
        CASE WHEN stored.id % 10 = 0 THEN {int(LeasePhase.ACCEPTED)} ELSE {int(LeasePhase.RUNNING)} END,
        queue_id, shape_id, priority, 0, 0, 1, 10, 1000, 300000, 86400000, '{{}}', clock, now(),
        CASE WHEN stored.id % 10 <> 0 THEN now() END
    FROM stored, leader RETURNING job_id
)
SELECT job_id FROM placed LIMIT 1000
"""
