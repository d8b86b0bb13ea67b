-- revive | LATE_END: ready or delayed -> lease (DRAINING), the loss refunded
-- An end whose lease has expired, while its job still waits and nobody took it:
-- finished work is not run again. The attempt's LOST row is taken back and the
-- lease stands again with its outcome, to be finished like any other.
-- Locks: the waiting rows, in job order. Index: ready_pkey, delayed_pkey,
-- attempt_pkey. Returns: job_id, lease_id of those revived.
WITH said AS MATERIALIZED (
    SELECT i.*, a.attempt, a.granted_at, a.gpu_uuids, a.outcome AS old_outcome, a.started_at AS old_started_at
    FROM unnest(
        CAST(:job_ids AS bigint[]), CAST(:lease_ids AS bigint[]), CAST(:agent_ids AS text[]),
        CAST(:session_ids AS bigint[]), CAST(:outcomes AS smallint[]), CAST(:exit_codes AS int[]),
        CAST(:signals AS int[]), CAST(:errors AS bytea[]), CAST(:retryables AS boolean[]), CAST(:results AS bytea[]),
        CAST(:final_log_offsets AS bigint[]), CAST(:started_ats AS timestamptz[]), CAST(:ended_ats AS timestamptz[])
    ) AS i (
        job_id, lease_id, agent_id, session_id, outcome, exit_code, signal, error, retryable, result,
        final_log_offset, started_at, ended_at
    )
    JOIN attempt AS a ON a.job_id = i.job_id AND a.lease_id = i.lease_id AND a.agent_id = i.agent_id
    WHERE a.outcome IN (6, 8) AND a.final_state IS NULL AND i.outcome IN (1, 2, 3, 4)
),
-- include still_waiting
,
waiting AS MATERIALIZED (
    SELECT job_id, queue_id, shape_id, priority, failures, losses FROM from_ready
    UNION ALL
    SELECT job_id, queue_id, shape_id, priority, failures, losses FROM from_delayed
),
not_ready AS (
    DELETE FROM ready WHERE job_id = ANY (ARRAY(SELECT job_id FROM from_ready))
),
not_delayed AS (
    DELETE FROM delayed WHERE job_id = ANY (ARRAY(SELECT job_id FROM from_delayed))
),
taken_back AS (
    DELETE FROM attempt AS a
    USING waiting AS w
    JOIN said AS s ON s.job_id = w.job_id
    WHERE a.job_id = s.job_id AND a.lease_id = s.lease_id
),
made AS (
    INSERT INTO lease (
        job_id, lease_id, session_id, agent_id, attempt, phase, queue_id, shape_id, priority, failures, losses,
        max_failures, max_losses, backoff_initial_ms, backoff_max_ms, dedupe_key, ttl_ms, gpu_uuids, offered_at,
        granted_at, started_at, outcome, exit_code, signal, error, retryable, result, final_log_offset, ended_at
    )
    SELECT
        w.job_id, s.lease_id, s.session_id, s.agent_id, s.attempt, 4, w.queue_id, w.shape_id, w.priority,
        w.failures, w.losses - CASE WHEN s.old_outcome = 6 THEN 1 ELSE 0 END,
        j.max_failures, j.max_losses, j.backoff_initial_ms, j.backoff_max_ms, j.dedupe_key,
        j.ttl_ms, s.gpu_uuids, (SELECT clock FROM leader), s.granted_at, COALESCE(s.old_started_at, s.started_at),
        s.outcome, s.exit_code, s.signal, s.error, s.retryable, s.result, s.final_log_offset,
        COALESCE(s.ended_at, CAST(:now AS timestamptz), now())
    FROM waiting AS w
    JOIN said AS s ON s.job_id = w.job_id
    JOIN job AS j ON j.id = w.job_id
    RETURNING job_id, lease_id, attempt
),
news AS (
    INSERT INTO event (job_ids, states, attempts)
    SELECT array_agg(job_id), array_agg(3::smallint), array_agg(attempt)
    FROM made
    HAVING count(*) > 0
)
SELECT job_id, lease_id FROM made
