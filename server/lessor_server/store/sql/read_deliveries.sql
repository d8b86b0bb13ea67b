-- read_deliveries | what the agents of this replica are to be told: grants not answered, leases asked back
-- Locks: none. Index: lease_session, job_pkey. Returns: one row per lease, with
-- what its Grant needs when it is only offered.
SELECT
    l.job_id, l.lease_id, l.session_id, l.attempt, l.phase, l.revoke, l.ttl_ms, l.gpu_uuids, j.spec, c.cursor
FROM lease AS l
LEFT JOIN job AS j ON j.id = l.job_id AND l.phase = 1
LEFT JOIN checkpoint AS c ON c.job_id = l.job_id AND l.phase = 1
WHERE l.session_id = ANY (CAST(:session_ids AS bigint[])) AND (l.phase = 1 OR (l.revoke IS NOT NULL AND l.phase < 4))
ORDER BY l.lease_id
