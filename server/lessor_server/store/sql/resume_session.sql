-- resume_session | HELLO: the agent's session goes on with a new epoch
-- Counts as a renewal. Whatever carries the old epoch is refused from the commit on.
-- Locks: the session (the agent is held already). Index: session_pkey, agent_pkey.
-- Returns: epoch, or nothing: begin a new one.
UPDATE session
SET epoch = epoch + 1, renewed_at = GREATEST(renewed_at, (SELECT clock FROM leader)),
    heartbeat_ms = CAST(:heartbeat_ms AS int), replica = CAST(:replica AS text),
    drained = (SELECT a.drained FROM agent AS a WHERE a.id = CAST(:agent_id AS text))
WHERE id = CAST(:session_id AS bigint) AND agent_id = CAST(:agent_id AS text)
RETURNING epoch
