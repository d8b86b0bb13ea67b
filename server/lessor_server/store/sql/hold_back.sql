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
-- include still_waiting
,
put_off AS (
    UPDATE delayed
    SET not_before = GREATEST(not_before, COALESCE(CAST(:now AS timestamptz), now()) + CAST(:pause AS interval))
    WHERE job_id = ANY (ARRAY(SELECT job_id FROM from_delayed))
),
removed AS (
    DELETE FROM ready WHERE job_id = ANY (ARRAY(SELECT job_id FROM from_ready))
)
INSERT INTO delayed (job_id, queue_id, shape_id, priority, attempts, failures, losses, last_lease_id, not_before)
SELECT
    job_id, queue_id, shape_id, priority, attempts, failures, losses, last_lease_id,
    COALESCE(CAST(:now AS timestamptz), now()) + CAST(:pause AS interval)
FROM from_ready
RETURNING job_id
