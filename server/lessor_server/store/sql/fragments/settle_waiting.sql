-- Ends the waiting jobs of `closing` (job_id, attempts, failures, losses),
-- already removed from ready or delayed, as :final_state.
history AS (
    INSERT INTO attempt (
        job_id, lease_id, attempt, gpu_uuids, outcome, signal, error, failures, losses, final_state, ended_at, log_bytes
    )
    SELECT
        job_id, 0, attempts, '{}', CAST(:outcome AS smallint), 0, CAST(:error AS bytea), failures, losses,
        CAST(:final_state AS smallint), COALESCE(CAST(:now AS timestamptz), now()), 0
    FROM closing
),
given_up AS (
    DELETE FROM dedupe AS d
    USING (
        SELECT j.queue_id, j.dedupe_key, j.id
        FROM closing AS c
        JOIN job AS j ON j.id = c.job_id
        WHERE j.dedupe_key IS NOT NULL
    ) AS k
    WHERE d.queue_id = k.queue_id AND d.key = k.dedupe_key AND d.job_id = k.id
),
news AS (
    INSERT INTO event (job_ids, states, attempts)
    SELECT array_agg(job_id), array_agg(CAST(:final_state AS smallint)), array_agg(attempts)
    FROM closing
    HAVING count(*) > 0
)
