-- set_agent_session | HELLO: which session of the agent is the current one
-- Locks: the agent (held already). Index: agent_pkey. Returns: nothing.
UPDATE agent SET session_id = CAST(:session_id AS bigint) WHERE id = CAST(:agent_id AS text)
