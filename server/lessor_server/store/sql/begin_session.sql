-- begin_session | HELLO: a new session of the agent supersedes the old ones
-- The old ones' epochs move: what still speaks in their name is refused. With
-- proof that the host booted anew (:host_gone) their leases are due after two
-- intervals.
-- Locks: the agent's sessions (the agent is held already). Index: session_agent, agent_pkey. Returns: id, epoch.
WITH old AS (
    UPDATE session
    SET epoch = epoch + 1, host_gone = host_gone OR CAST(:host_gone AS boolean)
    WHERE agent_id = CAST(:agent_id AS text)
),
made AS (
    INSERT INTO session (agent_id, epoch, renewed_at, heartbeat_ms, replica, drained)
    SELECT a.id, 1, l.clock, CAST(:heartbeat_ms AS int), CAST(:replica AS text), a.drained
    FROM leader AS l
    JOIN agent AS a ON a.id = CAST(:agent_id AS text)
    RETURNING id, epoch
)
SELECT id, epoch FROM made
