-- save_agent | HELLO: who the agent is and what its host has
-- Locks: the agent (held already unless it is new). Index: agent_pkey. Returns: drained.
INSERT INTO agent AS a (
    id, name, version, labels, runtimes, cpu_millis, memory_bytes, heartbeat_ms, hostname, boot_id, hardware_id,
    connected_at
)
VALUES (
    CAST(:agent_id AS text), CAST(:name AS text), CAST(:version AS text), CAST(:labels AS jsonb),
    CAST(:runtimes AS jsonb), CAST(:cpu_millis AS bigint), CAST(:memory_bytes AS bigint), CAST(:heartbeat_ms AS int),
    CAST(:hostname AS text), CAST(:boot_id AS text), CAST(:hardware_id AS text),
    COALESCE(CAST(:now AS timestamptz), now())
)
ON CONFLICT (id) DO UPDATE SET
    name = EXCLUDED.name, version = EXCLUDED.version, labels = EXCLUDED.labels, runtimes = EXCLUDED.runtimes,
    cpu_millis = EXCLUDED.cpu_millis, memory_bytes = EXCLUDED.memory_bytes, heartbeat_ms = EXCLUDED.heartbeat_ms,
    hostname = EXCLUDED.hostname, boot_id = EXCLUDED.boot_id, hardware_id = EXCLUDED.hardware_id,
    connected_at = EXCLUDED.connected_at
RETURNING a.drained
