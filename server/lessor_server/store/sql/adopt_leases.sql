-- adopt_leases | HELLO: leases the agent holds move to its current session
-- Locks: the session shared (a newer Hello finds us first or we find its epoch),
-- then the leases, in job order. Index: lease_pkey. Returns: job_id, lease_id.
WITH mine AS MATERIALIZED (
    SELECT id FROM session
    WHERE id = CAST(:session_id AS bigint) AND epoch = CAST(:epoch AS int)
    FOR SHARE
),
held AS MATERIALIZED (
    SELECT l.job_id
    FROM unnest(CAST(:job_ids AS bigint[]), CAST(:lease_ids AS bigint[])) AS i (job_id, lease_id)
    JOIN lease AS l ON l.job_id = i.job_id AND l.lease_id = i.lease_id
    CROSS JOIN mine
    WHERE l.agent_id = CAST(:agent_id AS text) AND l.session_id <> mine.id
    ORDER BY l.job_id
    FOR UPDATE OF l
)
UPDATE lease SET session_id = CAST(:session_id AS bigint)
WHERE job_id = ANY (ARRAY(SELECT job_id FROM held))
RETURNING job_id, lease_id
