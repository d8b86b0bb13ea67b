-- save_gpus | HELLO: the GPUs of the agent, those not listed are removed
-- Locks: the GPUs of the agent. Index: gpu_pkey. Returns: nothing.
WITH listed AS MATERIALIZED (
    SELECT t.* FROM unnest(
        CAST(:uuids AS text[]), CAST(:indexes AS int[]), CAST(:models AS text[]), CAST(:memories AS bigint[])
    ) AS t (uuid, index, model, memory_bytes)
),
gone AS (
    DELETE FROM gpu
    WHERE agent_id = CAST(:agent_id AS text) AND NOT uuid = ANY (ARRAY(SELECT uuid FROM listed))
)
INSERT INTO gpu (agent_id, uuid, index, model, memory_bytes)
SELECT CAST(:agent_id AS text), uuid, index, model, memory_bytes
FROM listed
ORDER BY uuid
ON CONFLICT (agent_id, uuid) DO UPDATE SET
    index = EXCLUDED.index, model = EXCLUDED.model, memory_bytes = EXCLUDED.memory_bytes
