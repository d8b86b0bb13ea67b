-- promote | DUE: delayed -> ready
-- Locks: leader shared; the due rows, SKIP LOCKED. Index: delayed_due. Returns: job_id.
WITH lead AS MATERIALIZED (
    SELECT epoch FROM leader WHERE epoch = CAST(:epoch AS bigint) FOR SHARE
),
due AS MATERIALIZED (
    SELECT d.*
    FROM delayed AS d, lead
    WHERE d.not_before <= COALESCE(CAST(:now AS timestamptz), now())
    ORDER BY d.not_before
    LIMIT 1000
    FOR UPDATE OF d SKIP LOCKED
),
removed AS (
    DELETE FROM delayed WHERE job_id = ANY (ARRAY(SELECT job_id FROM due))
)
INSERT INTO ready (job_id, queue_id, shape_id, priority, attempts, failures, losses, last_lease_id)
SELECT job_id, queue_id, shape_id, priority, attempts, failures, losses, last_lease_id FROM due
RETURNING job_id
