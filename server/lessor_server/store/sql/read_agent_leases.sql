-- read_agent_leases | HELLO: every lease that stands in the agent's name, read after the epoch is committed
-- Locks: none. Index: session_agent, lease_session. Returns: job_id, lease_id, session_id, phase.
SELECT l.job_id, l.lease_id, l.session_id, l.phase
FROM session AS s
JOIN lease AS l ON l.session_id = s.id
WHERE s.agent_id = CAST(:agent_id AS text)
ORDER BY l.lease_id
