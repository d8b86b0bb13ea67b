-- truncate_drained | RELEASE of a DRAINING lease: its last log bytes will never come
-- lease -> attempt with logs_truncated_at, and ready, delayed or nothing
-- Locks: the leases, in job order. Index: lease_pkey. Returns: job_id, lease_id.
WITH held AS MATERIALIZED (
    SELECT
-- include stored_end
    FROM unnest(CAST(:job_ids AS bigint[]), CAST(:lease_ids AS bigint[]), CAST(:agent_ids AS text[]))
        AS i (job_id, lease_id, agent_id)
    JOIN lease AS l ON l.job_id = i.job_id AND l.lease_id = i.lease_id AND l.agent_id = i.agent_id
    WHERE l.phase = 4 AND l.job_id = ANY (ARRAY(SELECT unnest(CAST(:job_ids AS bigint[]))))
    ORDER BY l.job_id
    FOR UPDATE OF l
),
closing AS MATERIALIZED (
    SELECT
        h.*, COALESCE(g.end_offset, 0) AS log_bytes, COALESCE(g.end_offset, 0) AS logs_truncated_at,
        2 * random() - 1 AS jitter
    FROM held AS h
    LEFT JOIN log_head AS g ON g.lease_id = h.lease_id
),
freeing AS (
    SELECT lease_id FROM closing WHERE gpu_uuids <> '{}'
),
-- include settle
SELECT job_id, lease_id FROM closing
