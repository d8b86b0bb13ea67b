-- settle_reports | an event that moved nothing: was it recorded before, or is it stale
-- Locks: none. Index: lease_pkey, attempt_pkey. Returns: job_id, lease_id, phase
-- (the lease stands in it), recorded (its attempt ended so), waits (its job waits
-- and nobody had it since).
SELECT
    i.job_id, i.lease_id,
    l.phase,
    a.outcome AS recorded,
    COALESCE(r.last_lease_id, d.last_lease_id, 0) = i.lease_id AS waits
FROM unnest(CAST(:job_ids AS bigint[]), CAST(:lease_ids AS bigint[]), CAST(:agent_ids AS text[]))
    AS i (job_id, lease_id, agent_id)
LEFT JOIN lease AS l ON l.job_id = i.job_id AND l.lease_id = i.lease_id AND l.agent_id = i.agent_id
LEFT JOIN attempt AS a ON a.job_id = i.job_id AND a.lease_id = i.lease_id AND a.agent_id = i.agent_id
LEFT JOIN ready AS r ON r.job_id = i.job_id
LEFT JOIN delayed AS d ON d.job_id = i.job_id
