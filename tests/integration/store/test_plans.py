"""The contended statements use their indexes, planned for any values, on tables that hold something."""

from __future__ import annotations

import asyncpg
import pytest
from asyncpg.pool import PoolConnectionProxy

from lessor_server.store.statements import all_names, statement
from tests.support.store import Store

# Tables that grow with the jobs there are or ever were.
LARGE = ("job", "attempt", "ready", "delayed", "lease", "lease_gpu", "log_chunk", "log_head", "progress", "request",
         "dedupe", "checkpoint", "event", "session", "agent", "gpu")  # fmt: skip

# Reads of a whole table that are meant, and why.
ALLOWED = {
    ("ask_back", "lease"): "live leases only, once a second",
    ("finish_drained", "lease"): "the leader's sweep over live leases, once a second",
    ("count_silent", "session"): "as expire does, once a second",
    ("count_silent", "lease"): "only while more than a few sessions are silent, once a second",
    ("expire", "session"): "one narrow row per agent, no index on the time keeps renewals HOT",
}

FILL = """
INSERT INTO shape (digest, spec) VALUES ('\\x01', '{}');
INSERT INTO job SELECT i.id, 1, 1, 0, 'n', '{}', '', 60000, NULL, 1, 10, 1000, 1000, NULL, NULL, now()
    FROM (SELECT next_job_id(now()) AS id FROM generate_series(1, 20000)) AS i;
INSERT INTO ready SELECT id, 1, 1, 0, 0, 0, 0, NULL, NULL FROM job ORDER BY id LIMIT 10000;
INSERT INTO delayed SELECT id, 1, 1, 0, 0, 0, 0, NULL, now() + interval '1 day' FROM job
    ORDER BY id OFFSET 10000 LIMIT 3000;
INSERT INTO session (agent_id, epoch, renewed_at, heartbeat_ms, replica)
    SELECT 'agent-' || i, 1, 0, 1000, 'r' FROM generate_series(1, 2000) AS i;
INSERT INTO agent SELECT 'agent-' || i, 'a', '0', '{}', '[]', 1, 1, 1000, 'h', 'b', 'w', i, now()
    FROM generate_series(1, 2000) AS i;
INSERT INTO gpu SELECT 'agent-' || i, 'gpu-' || i, 0, 'm', 1 FROM generate_series(1, 2000) AS i;
INSERT INTO lease (job_id, lease_id, session_id, agent_id, attempt, phase, queue_id, shape_id, priority, failures,
    losses, max_failures, max_losses, backoff_initial_ms, backoff_max_ms, dedupe_key, ttl_ms, gpu_uuids,
    offered_at, granted_at)
    SELECT id, nextval('lease_number'), 1 + row_number() OVER () % 2000, 'agent-1', 1, 3, 1, 1, 0, 0, 0, 1, 10, 0, 0,
    NULL, 60000, '{}', 0, now() FROM job ORDER BY id OFFSET 13000 LIMIT 3000;
INSERT INTO lease_gpu SELECT 'agent-1', 'gpu-' || lease_id, lease_id, job_id FROM lease;
INSERT INTO attempt (job_id, lease_id, attempt, gpu_uuids, outcome, signal, failures, losses, final_state, ended_at,
    log_bytes) SELECT id, nextval('lease_number'), 1, '{}', 1, 0, 0, 0, 4, now(), 0 FROM job ORDER BY id OFFSET 16000;
INSERT INTO log_head SELECT lease_id, 1, 1, 0 FROM lease;
INSERT INTO log_chunk SELECT lease_id, 0, 1, 'x', now() FROM lease;
INSERT INTO progress SELECT lease_id, job_id, 0, '', '{}', now() FROM lease;
INSERT INTO request SELECT 'p', id::text, '', ARRAY[id], now() FROM job;
INSERT INTO dedupe SELECT 1, id::text, id FROM job;
INSERT INTO checkpoint SELECT job_id, lease_id, '' FROM lease;
INSERT INTO event (job_ids, states, attempts) SELECT ARRAY[id], ARRAY[1::smallint], ARRAY[0] FROM job;
ANALYZE;
"""


@pytest.fixture
async def filled(store: Store) -> asyncpg.Pool:
    for part in FILL.split(";\n"):
        if part.strip():
            await store.database.pool.execute(part)
    return store.database.pool


async def generic_plan(connection: asyncpg.Connection | PoolConnectionProxy, name: str) -> str:
    """Returns the plan Postgres keeps for a prepared statement, whatever the values."""
    query = statement(name)
    prepared = await connection.prepare(query.text)
    await connection.execute("SET plan_cache_mode = force_generic_plan")
    await connection.execute(f"PREPARE probe AS {query.text}")
    nulls = ", ".join("NULL" for _ in prepared.get_parameters())
    rows = await connection.fetch(f"EXPLAIN EXECUTE probe({nulls})" if nulls else "EXPLAIN EXECUTE probe")
    await connection.execute("DEALLOCATE probe")
    return "\n".join(row[0] for row in rows)


async def test_no_large_table_is_scanned(filled: asyncpg.Pool) -> None:
    offences = []
    async with filled.acquire() as connection:
        full = await connection.fetch("SELECT relname FROM pg_class WHERE relkind = 'r' AND reltuples > 100")
        # An empty partition is read as fast as its index.
        filled_tables = {row["relname"] for row in full}
        for name in all_names():
            for line in (await generic_plan(connection, name)).splitlines():
                if "Seq Scan on " not in line:
                    continue
                table = line.split("Seq Scan on ")[1].split()[0]
                base = table.rsplit("_2", 1)[0]
                if table in filled_tables and base in LARGE and (name, base) not in ALLOWED:
                    offences.append(f"{name} reads all of {table}")
    assert offences == []
