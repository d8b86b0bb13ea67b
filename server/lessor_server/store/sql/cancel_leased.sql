-- cancel_leased | CANCEL of a leased job: asks its agent to stop it
-- Locks: the leases, in job order. Index: lease_pkey. Expire and retry honour
-- cancel_requested. Returns: job_id, lease_id, session_id.
WITH held AS MATERIALIZED (
    SELECT job_id FROM lease
    WHERE job_id = ANY (CAST(:job_ids AS bigint[]))
    ORDER BY job_id
    FOR UPDATE
)
UPDATE lease SET cancel_requested = true, revoke = 1
WHERE job_id = ANY (ARRAY(SELECT job_id FROM held))
RETURNING job_id, lease_id, session_id
