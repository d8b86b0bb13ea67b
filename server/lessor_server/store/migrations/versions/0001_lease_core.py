"""The lease core: jobs, leases, sessions, attempts, logs, events.

Revision ID: 0001
Revises: nothing
"""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Tables whose rows come and go with every job: vacuum often, never wait.
HOT = "autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 200, autovacuum_vacuum_cost_delay = 0"

SMALL_TABLES = f"""
CREATE TABLE queue (
    id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL UNIQUE,
    paused boolean NOT NULL DEFAULT false,
    max_running int CHECK (max_running >= 0),
    max_gpus int CHECK (max_gpus >= 0),
    created_at timestamptz NOT NULL DEFAULT now()
);
INSERT INTO queue (name) VALUES ('default');

CREATE TABLE shape (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    digest bytea NOT NULL UNIQUE,
    spec jsonb NOT NULL
);

CREATE TABLE agent (
    id text PRIMARY KEY,
    name text NOT NULL,
    version text NOT NULL,
    labels jsonb NOT NULL,
    runtimes jsonb NOT NULL,
    cpu_millis bigint NOT NULL,
    memory_bytes bigint NOT NULL,
    heartbeat_ms int NOT NULL,
    hostname text NOT NULL,
    boot_id text NOT NULL,
    hardware_id text NOT NULL,
    session_id bigint,
    connected_at timestamptz NOT NULL,
    drained boolean NOT NULL DEFAULT false
);
CREATE INDEX agent_name ON agent (name);

CREATE TABLE gpu (
    agent_id text NOT NULL REFERENCES agent (id) ON DELETE CASCADE,
    uuid text NOT NULL,
    index int NOT NULL,
    model text NOT NULL,
    memory_bytes bigint NOT NULL,
    utilization_percent int NOT NULL DEFAULT 0,
    memory_used_bytes bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (agent_id, uuid)
) WITH (fillfactor = 50);

-- One row. clock is lease time in milliseconds; beat grows with every tick.
CREATE TABLE leader (
    id boolean PRIMARY KEY DEFAULT true CHECK (id),
    epoch bigint NOT NULL,
    holder text NOT NULL,
    clock bigint NOT NULL,
    beat bigint NOT NULL
) WITH (fillfactor = 10, {HOT});
INSERT INTO leader (epoch, holder, clock, beat) VALUES (0, '', 0, 0);

-- No index on renewed_at: renewals stay HOT.
CREATE TABLE session (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    agent_id text NOT NULL,
    epoch int NOT NULL,
    renewed_at bigint NOT NULL,
    heartbeat_ms int NOT NULL,
    replica text NOT NULL,
    host_gone boolean NOT NULL DEFAULT false
) WITH (fillfactor = 50, {HOT});
CREATE INDEX session_agent ON session (agent_id);

CREATE TABLE request (
    principal text NOT NULL,
    request_id text NOT NULL,
    fingerprint bytea NOT NULL,
    job_ids bigint[] NOT NULL,
    created_at timestamptz NOT NULL,
    PRIMARY KEY (principal, request_id)
);
-- The numbers of a large batch are stored as they are: compressing them takes longer than storing the jobs' rows.
ALTER TABLE request ALTER job_ids SET STORAGE EXTERNAL;
CREATE INDEX request_age ON request USING brin (created_at);

CREATE TABLE dedupe (
    queue_id int NOT NULL,
    key text NOT NULL,
    job_id bigint NOT NULL,
    PRIMARY KEY (queue_id, key)
);

CREATE TABLE checkpoint (
    job_id bigint PRIMARY KEY,
    lease_id bigint NOT NULL,
    cursor text NOT NULL
) WITH (fillfactor = 50);
"""

JOB_TABLES = f"""
-- 42 bits of submit time in milliseconds, 21 bits of this sequence.
CREATE SEQUENCE job_number MINVALUE 0 MAXVALUE 2097151 CYCLE;

CREATE FUNCTION next_job_id(at timestamptz) RETURNS bigint LANGUAGE sql VOLATILE AS $$
    SELECT ((extract(epoch FROM COALESCE(at, clock_timestamp())) * 1000)::bigint << 21) | nextval('job_number')
$$;

CREATE TABLE job (
    id bigint PRIMARY KEY,
    queue_id int NOT NULL,
    shape_id bigint NOT NULL,
    priority int NOT NULL,
    name text NOT NULL,
    labels jsonb NOT NULL,
    spec bytea NOT NULL,
    ttl_ms bigint NOT NULL,
    start_timeout_ms bigint,
    max_failures int NOT NULL,
    max_losses int NOT NULL,
    backoff_initial_ms bigint NOT NULL,
    backoff_max_ms bigint NOT NULL,
    dedupe_key text,
    retry_of bigint,
    submitted_at timestamptz NOT NULL
) PARTITION BY RANGE (id);
CREATE INDEX job_queue ON job (queue_id, id DESC);

CREATE TABLE ready (
    job_id bigint PRIMARY KEY,
    queue_id int NOT NULL,
    shape_id bigint NOT NULL,
    priority int NOT NULL,
    attempts int NOT NULL,
    failures int NOT NULL,
    losses int NOT NULL,
    last_lease_id bigint,
    queue_deadline timestamptz
) WITH ({HOT});
CREATE INDEX ready_claim ON ready (queue_id, shape_id, priority DESC, job_id);
CREATE INDEX ready_deadline ON ready (queue_deadline) WHERE queue_deadline IS NOT NULL;

CREATE TABLE delayed (
    job_id bigint PRIMARY KEY,
    queue_id int NOT NULL,
    shape_id bigint NOT NULL,
    priority int NOT NULL,
    attempts int NOT NULL,
    failures int NOT NULL,
    losses int NOT NULL,
    last_lease_id bigint,
    not_before timestamptz NOT NULL
) WITH ({HOT});
CREATE INDEX delayed_due ON delayed (not_before);

-- The fencing token. CACHE 1, or tokens of one job need not grow.
CREATE SEQUENCE lease_number CACHE 1;

CREATE TABLE lease (
    job_id bigint NOT NULL,
    member smallint NOT NULL DEFAULT 0,
    lease_id bigint NOT NULL,
    session_id bigint NOT NULL,
    agent_id text NOT NULL,
    attempt int NOT NULL,
    phase smallint NOT NULL CHECK (phase BETWEEN 1 AND 4),
    queue_id int NOT NULL,
    shape_id bigint NOT NULL,
    priority int NOT NULL,
    failures int NOT NULL,
    losses int NOT NULL,
    max_failures int NOT NULL,
    max_losses int NOT NULL,
    backoff_initial_ms bigint NOT NULL,
    backoff_max_ms bigint NOT NULL,
    dedupe_key text,
    ttl_ms bigint NOT NULL,
    gpu_uuids text[] NOT NULL,
    offered_at bigint NOT NULL,
    granted_at timestamptz NOT NULL,
    start_deadline timestamptz,
    started_at timestamptz,
    cancel_requested boolean NOT NULL DEFAULT false,
    revoke smallint CHECK (revoke IN (1, 2, 5)),
    outcome smallint,
    exit_code int,
    signal int NOT NULL DEFAULT 0,
    error bytea,
    retryable boolean NOT NULL DEFAULT true,
    result bytea,
    final_log_offset bigint,
    ended_at timestamptz,
    PRIMARY KEY (job_id, member),
    CONSTRAINT lease_outcome CHECK ((phase = 4) = (outcome IS NOT NULL))
) WITH (fillfactor = 50, {HOT});
CREATE INDEX lease_session ON lease (session_id);

CREATE TABLE lease_gpu (
    agent_id text NOT NULL,
    gpu_uuid text NOT NULL,
    lease_id bigint NOT NULL,
    job_id bigint NOT NULL,
    PRIMARY KEY (agent_id, gpu_uuid)
) WITH ({HOT});
CREATE INDEX lease_gpu_lease ON lease_gpu (lease_id);

-- One row per ended lease. lease_id 0: the job ended while it was waiting.
CREATE TABLE attempt (
    job_id bigint NOT NULL,
    lease_id bigint NOT NULL,
    attempt int NOT NULL,
    agent_id text,
    gpu_uuids text[] NOT NULL,
    outcome smallint NOT NULL CHECK (outcome BETWEEN 1 AND 8),
    exit_code int,
    signal int NOT NULL,
    error bytea,
    result bytea,
    failures int NOT NULL,
    losses int NOT NULL,
    final_state smallint CHECK (final_state IN (4, 5, 6)),
    granted_at timestamptz,
    started_at timestamptz,
    ended_at timestamptz NOT NULL,
    log_bytes bigint NOT NULL,
    logs_truncated_at bigint,
    PRIMARY KEY (job_id, lease_id)
) PARTITION BY RANGE (job_id);
CREATE UNIQUE INDEX attempt_final ON attempt (job_id) WHERE final_state IS NOT NULL;
CREATE INDEX attempt_unhappy ON attempt (final_state, job_id DESC) WHERE final_state IN (5, 6);
"""

LOG_TABLES = """
CREATE TABLE progress (
    lease_id bigint PRIMARY KEY,
    job_id bigint NOT NULL,
    fraction double precision,
    message text NOT NULL,
    metrics jsonb NOT NULL,
    updated_at timestamptz NOT NULL
) PARTITION BY RANGE (lease_id);

CREATE TABLE log_head (
    lease_id bigint PRIMARY KEY,
    end_offset bigint NOT NULL,
    stdout_bytes bigint NOT NULL,
    stderr_bytes bigint NOT NULL
) PARTITION BY RANGE (lease_id);

CREATE TABLE log_chunk (
    lease_id bigint NOT NULL,
    start_offset bigint NOT NULL,
    stream smallint NOT NULL CHECK (stream IN (1, 2)),
    data bytea NOT NULL,
    read_at timestamptz NOT NULL,
    PRIMARY KEY (lease_id, start_offset)
) PARTITION BY RANGE (lease_id);

-- One row per transaction, read below pg_snapshot_xmin in (xid, id) order.
CREATE TABLE event (
    id bigint GENERATED ALWAYS AS IDENTITY,
    xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
    at timestamptz NOT NULL DEFAULT now(),
    job_ids bigint[] NOT NULL,
    states smallint[] NOT NULL,
    attempts int[] NOT NULL
);
CREATE UNIQUE INDEX event_order ON event (xid, id);
-- As in request: not compressed.
ALTER TABLE event
    ALTER job_ids SET STORAGE EXTERNAL, ALTER states SET STORAGE EXTERNAL, ALTER attempts SET STORAGE EXTERNAL;

-- One row: events up to here were dropped by retention.
CREATE TABLE event_floor (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    xid xid8 NOT NULL,
    id bigint NOT NULL
);
INSERT INTO event_floor (xid, id) VALUES ('0', 0);
"""

# What becomes of a job when a lease ends; domain/budgets.py is the same table,
# and a test compares the two over every combination. One value each: Postgres
# writes such functions into the statement, where one of a record is called per row.
FATE = """
CREATE FUNCTION final_state_of(
    outcome smallint, failures int, losses int, max_failures int, max_losses int,
    retryable boolean, cancel_requested boolean
) RETURNS smallint LANGUAGE sql IMMUTABLE AS $$
    SELECT (CASE
            WHEN outcome = 1 THEN 4
            WHEN cancel_requested OR outcome = 3 THEN 6
            WHEN outcome IN (2, 4) AND (NOT retryable OR failures + 1 >= max_failures) THEN 5
            WHEN outcome = 6 AND losses + 1 >= max_losses THEN 5
        END)::smallint
$$;

CREATE FUNCTION failures_after(outcome smallint, failures int, cancel_requested boolean)
RETURNS int LANGUAGE sql IMMUTABLE AS $$
    SELECT failures + CASE WHEN outcome IN (2, 4) AND NOT cancel_requested THEN 1 ELSE 0 END
$$;

CREATE FUNCTION losses_after(outcome smallint, losses int, cancel_requested boolean)
RETURNS int LANGUAGE sql IMMUTABLE AS $$
    SELECT losses + CASE WHEN outcome = 6 AND NOT cancel_requested THEN 1 ELSE 0 END
$$;

CREATE FUNCTION backs_off(outcome smallint) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT outcome IN (2, 4, 7)
$$;

CREATE FUNCTION backoff_ms(
    outcome smallint, attempt int, failures int, initial_ms bigint, max_ms bigint, jitter double precision
) RETURNS double precision LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE
        WHEN outcome = 7 THEN LEAST(60000.0, 1000.0 * power(2.0::double precision, LEAST(GREATEST(attempt - 1, 0), 62)))
        ELSE LEAST(max_ms, initial_ms * power(2.0::double precision, LEAST(GREATEST(failures - 1, 0), 62)))
            * (1 + 0.2 * jitter)
    END
$$;
"""


def upgrade() -> None:
    for part in (SMALL_TABLES, JOB_TABLES, LOG_TABLES, FATE):
        # asyncpg takes one statement at a time.
        for statement in part.split(";\n"):
            if statement.strip():
                op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("the first schema has nothing to go back to: drop the database instead")
