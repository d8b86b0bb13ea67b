-- expire | EXPIRE: lease -> attempt, and ready, delayed or nothing
-- Locks: leader shared; then session and lease together, SKIP LOCKED, the time
-- checked again under the lock: a renewal that commits in between keeps them.
-- The session's epoch moves, so that a late renewal of it is refused.
-- Index: lease_session. Returns: job_id, lease_id, session_id, outcome.
-- A session whose host is proven gone (host_gone) is due after two intervals.
WITH lead AS MATERIALIZED (
    SELECT clock FROM leader WHERE epoch = CAST(:epoch AS bigint) FOR SHARE
),
overdue AS MATERIALIZED (
    SELECT s.id
    FROM session AS s, lead
    WHERE s.renewed_at + CAST(:min_wait_ms AS bigint) < lead.clock
        OR (s.host_gone AND s.renewed_at + 2 * s.heartbeat_ms < lead.clock)
),
due AS MATERIALIZED (
    SELECT l.*
    FROM lease AS l
    JOIN session AS s ON s.id = l.session_id
    CROSS JOIN lead
    WHERE l.session_id = ANY (ARRAY(SELECT id FROM overdue))
        AND (
            s.renewed_at + l.ttl_ms + 1000 + l.ttl_ms / 50 < lead.clock
            OR (s.host_gone AND s.renewed_at + 2 * s.heartbeat_ms < lead.clock)
        )
    ORDER BY s.id, l.job_id
    LIMIT CAST(:max_leases AS int)
    FOR UPDATE OF s, l SKIP LOCKED
),
superseded AS (
    UPDATE session SET epoch = epoch + 1
    WHERE id = ANY (ARRAY(SELECT DISTINCT session_id FROM due))
),
closing AS MATERIALIZED (
    SELECT
        d.job_id, d.lease_id, d.session_id, d.attempt, d.agent_id, d.gpu_uuids, d.queue_id, d.shape_id, d.priority,
        d.failures, d.losses, d.max_failures, d.max_losses, d.backoff_initial_ms, d.backoff_max_ms,
        d.cancel_requested, d.dedupe_key, d.granted_at, d.started_at, d.ended_at, d.exit_code, d.signal, d.retryable,
        d.result,
        COALESCE(d.outcome, CASE WHEN d.phase = 1 THEN 8 ELSE 6 END::smallint) AS outcome,
        CASE WHEN d.phase IN (2, 3) THEN CAST(:error AS bytea) ELSE d.error END AS error,
        COALESCE(g.end_offset, 0) AS log_bytes,
        -- An offer nobody answered has no log, unless only its answer was lost.
        CASE WHEN d.phase = 1 THEN g.end_offset ELSE COALESCE(g.end_offset, 0) END AS logs_truncated_at,
        2 * random() - 1 AS jitter
    FROM due AS d
    LEFT JOIN log_head AS g ON g.lease_id = d.lease_id
),
freeing AS (
    SELECT lease_id FROM closing WHERE gpu_uuids <> '{}'
),
-- include settle
SELECT job_id, lease_id, session_id, outcome FROM closing
