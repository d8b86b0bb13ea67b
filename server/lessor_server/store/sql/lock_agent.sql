-- lock_agent | HELLO: one Hello of an agent at a time
-- Locks: the agent. Index: agent_pkey. Returns: what is known of it, and how many
-- leases stand in its name.
SELECT
    a.session_id, a.hostname, a.boot_id, a.hardware_id,
    ARRAY(SELECT g.uuid FROM gpu AS g WHERE g.agent_id = a.id ORDER BY g.uuid) AS gpu_uuids,
    (
        SELECT count(*)
        FROM session AS s
        JOIN lease AS l ON l.session_id = s.id
        WHERE s.agent_id = a.id
    ) AS leases
FROM agent AS a
WHERE a.id = CAST(:agent_id AS text)
FOR UPDATE OF a
