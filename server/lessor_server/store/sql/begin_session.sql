-- begin_session | HELLO: a new session of the agent supersedes the old ones
-- The old ones' epochs move: what still speaks in their name is refused. With
-- proof that the host booted anew (:host_gone) their leases are due after two
-- intervals.
-- Locks: the agent's sessions. Index: session_agent. Returns: id, epoch.
WITH old AS (
    UPDATE session
    SET epoch = epoch + 1, host_gone = host_gone OR CAST(:host_gone AS boolean)
    WHERE agent_id = CAST(:agent_id AS text)
),
made AS (
    INSERT INTO session (agent_id, epoch, renewed_at, heartbeat_ms, replica)
    SELECT CAST(:agent_id AS text), 1, clock, CAST(:heartbeat_ms AS int), CAST(:replica AS text) FROM leader
    RETURNING id, epoch
)
SELECT id, epoch FROM made
