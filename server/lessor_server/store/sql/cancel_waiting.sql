-- cancel_waiting | CANCEL: ready or delayed -> CANCELLED
-- Locks: the rows, in job order; a claim in progress is waited for and then
-- cancel_leased finds its lease. Index: ready_pkey, delayed_pkey. Returns: job_id.
WITH from_ready AS MATERIALIZED (
    SELECT job_id, attempts, failures, losses FROM ready
    WHERE job_id = ANY (CAST(:job_ids AS bigint[]))
    ORDER BY job_id
    FOR UPDATE
),
from_delayed AS MATERIALIZED (
    SELECT job_id, attempts, failures, losses FROM delayed
    WHERE job_id = ANY (CAST(:job_ids AS bigint[]))
    ORDER BY job_id
    FOR UPDATE
),
not_ready AS (
    DELETE FROM ready WHERE job_id = ANY (ARRAY(SELECT job_id FROM from_ready))
),
not_delayed AS (
    DELETE FROM delayed WHERE job_id = ANY (ARRAY(SELECT job_id FROM from_delayed))
),
closing AS MATERIALIZED (
    SELECT * FROM from_ready
    UNION ALL
    SELECT * FROM from_delayed
),
-- include settle_waiting
SELECT job_id FROM closing
