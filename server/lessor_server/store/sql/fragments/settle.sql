-- Ends the leases of `closing` and decides what becomes of their jobs.
-- `closing` holds rows of lease, locked, with the outcome filled in, and
-- log_bytes, logs_truncated_at, jitter (-1 … 1); `freeing` the lease_ids whose
-- GPUs are free.
freed AS (
    DELETE FROM lease_gpu WHERE lease_id = ANY (ARRAY(SELECT lease_id FROM freeing))
),
removed AS (
    DELETE FROM lease WHERE job_id = ANY (ARRAY(SELECT job_id FROM closing))
),
fated AS (
    SELECT
        c.*,
        final_state_of(
            c.outcome, c.failures, c.losses, c.max_failures, c.max_losses, c.retryable, c.cancel_requested
        ) AS final_state,
        failures_after(c.outcome, c.failures, c.cancel_requested) AS new_failures,
        losses_after(c.outcome, c.losses, c.cancel_requested) AS new_losses,
        backs_off(c.outcome) AS backs_off
    FROM closing AS c
),
history AS (
    INSERT INTO attempt (
        job_id, lease_id, attempt, agent_id, gpu_uuids, outcome, exit_code, signal, error, result,
        failures, losses, final_state, granted_at, started_at, ended_at, log_bytes, logs_truncated_at
    )
    SELECT
        job_id, lease_id, attempt, agent_id, gpu_uuids, outcome, exit_code, signal, error, result,
        new_failures, new_losses, final_state, granted_at, started_at,
        COALESCE(ended_at, CAST(:now AS timestamptz), now()), log_bytes, logs_truncated_at
    FROM fated
),
again AS (
    INSERT INTO ready (job_id, queue_id, shape_id, priority, attempts, failures, losses, last_lease_id)
    SELECT job_id, queue_id, shape_id, priority, attempt, new_failures, new_losses, lease_id
    FROM fated
    WHERE final_state IS NULL AND NOT backs_off
),
later AS (
    INSERT INTO delayed (job_id, queue_id, shape_id, priority, attempts, failures, losses, last_lease_id, not_before)
    SELECT
        job_id, queue_id, shape_id, priority, attempt, new_failures, new_losses, lease_id,
        COALESCE(CAST(:now AS timestamptz), now())
        + make_interval(secs => backoff_ms(
            outcome, attempt, new_failures, backoff_initial_ms, backoff_max_ms, jitter
        ) / 1000)
    FROM fated
    WHERE final_state IS NULL AND backs_off
),
given_up AS (
    -- Looked up one by one: joined, the whole table could be read.
    DELETE FROM dedupe
    WHERE ctid = ANY (ARRAY(
        SELECT (SELECT d.ctid FROM dedupe AS d WHERE d.queue_id = f.queue_id AND d.key = f.dedupe_key
            AND d.job_id = f.job_id)
        FROM fated AS f
        WHERE f.dedupe_key IS NOT NULL AND f.final_state IN (5, 6)
    ))
),
news AS (
    INSERT INTO event (job_ids, states, attempts)
    SELECT array_agg(job_id), array_agg(COALESCE(final_state, 1::smallint)), array_agg(attempt)
    FROM fated
    HAVING count(*) > 0
)
