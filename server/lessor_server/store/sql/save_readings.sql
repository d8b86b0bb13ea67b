-- save_readings | telemetry of GPUs, latest wins; no promise rests on it
-- Locks: the GPUs, in key order. Index: gpu_pkey. Returns: nothing.
WITH read AS MATERIALIZED (
    SELECT g.agent_id, g.uuid, t.utilization, t.memory
    FROM unnest(
        CAST(:agent_ids AS text[]), CAST(:uuids AS text[]), CAST(:utilizations AS int[]), CAST(:memories AS bigint[])
    ) AS t (agent_id, uuid, utilization, memory)
    JOIN gpu AS g ON g.agent_id = t.agent_id AND g.uuid = t.uuid
    ORDER BY g.agent_id, g.uuid
    FOR UPDATE OF g
)
UPDATE gpu AS g
SET utilization_percent = r.utilization, memory_used_bytes = r.memory
FROM read AS r
WHERE g.agent_id = r.agent_id AND g.uuid = r.uuid
