-- hold_back | END_COMES: ready or delayed -> delayed, where the agent that lost the job is back with its end
-- Nobody is to be given the job between the agent's Hello and its report: finished
-- work is not run again. If no report comes, the job is due again after :pause.
-- Locks: the waiting rows, in job order. Index: attempt_pkey, ready_pkey, delayed_pkey.
-- Returns: job_id of those that were ready.
WITH said AS MATERIALIZED (
    SELECT i.job_id, i.lease_id
    FROM unnest(CAST(:job_ids AS bigint[]), CAST(:lease_ids AS bigint[])) AS i (job_id, lease_id)
    JOIN attempt AS a ON a.job_id = i.job_id AND a.lease_id = i.lease_id
    WHERE a.agent_id = CAST(:agent_id AS text) AND a.outcome IN (6, 8) AND a.final_state IS NULL
),
waiting AS MATERIALIZED (
    SELECT r.*
    FROM ready AS r
    JOIN said AS s ON s.job_id = r.job_id AND s.lease_id = r.last_lease_id
    WHERE r.job_id = ANY (ARRAY(SELECT job_id FROM said))
    ORDER BY r.job_id
    FOR UPDATE OF r
),
backing_off AS MATERIALIZED (
    SELECT d.job_id
    FROM delayed AS d
    JOIN said AS s ON s.job_id = d.job_id AND s.lease_id = d.last_lease_id
    WHERE d.job_id = ANY (ARRAY(SELECT job_id FROM said))
    ORDER BY d.job_id
    FOR UPDATE OF d
),
put_off AS (
    UPDATE delayed
    SET not_before = GREATEST(not_before, COALESCE(CAST(:now AS timestamptz), now()) + CAST(:pause AS interval))
    WHERE job_id = ANY (ARRAY(SELECT job_id FROM backing_off))
),
removed AS (
    DELETE FROM ready WHERE job_id = ANY (ARRAY(SELECT job_id FROM waiting))
)
INSERT INTO delayed (job_id, queue_id, shape_id, priority, attempts, failures, losses, last_lease_id, not_before)
SELECT
    job_id, queue_id, shape_id, priority, attempts, failures, losses, last_lease_id,
    COALESCE(CAST(:now AS timestamptz), now()) + CAST(:pause AS interval)
FROM waiting
RETURNING job_id
