-- time_out_queued | QUEUE_TIMEOUT: ready -> FAILED
-- Locks: leader shared; the due rows, SKIP LOCKED. Index: ready_deadline. Returns: job_id.
WITH lead AS MATERIALIZED (
    SELECT epoch FROM leader WHERE epoch = CAST(:epoch AS bigint) FOR SHARE
),
due AS MATERIALIZED (
    SELECT r.job_id, r.attempts, r.failures, r.losses
    FROM ready AS r, lead
    WHERE r.queue_deadline IS NOT NULL AND r.queue_deadline <= COALESCE(CAST(:now AS timestamptz), now())
    ORDER BY r.queue_deadline
    LIMIT 1000
    FOR UPDATE OF r SKIP LOCKED
),
removed AS (
    DELETE FROM ready WHERE job_id = ANY (ARRAY(SELECT job_id FROM due))
),
closing AS MATERIALIZED (
    SELECT * FROM due
),
-- include settle_waiting
SELECT job_id FROM closing
