-- read_session_leases | what the database has, to hold against what heartbeats list
-- Locks: none. Index: lease_session. Returns: job_id, lease_id, session_id, phase.
SELECT job_id, lease_id, session_id, phase
FROM lease
WHERE session_id = ANY (CAST(:session_ids AS bigint[]))
