-- save_checkpoints | CHECKPOINT: the cursor that the next attempt gets
-- Locks: the checkpoint rows, in job order, by the upsert. Index: lease_pkey,
-- checkpoint_pkey. Only a live lease, or the last one of a job that still waits,
-- may write; an older token never overwrites a newer. Returns: job_id.
-- One EXISTS over a union: with OR the planner reads a whole table into a hash.
INSERT INTO checkpoint AS c (job_id, lease_id, cursor)
SELECT i.job_id, i.lease_id, i.cursor
FROM unnest(
    CAST(:job_ids AS bigint[]), CAST(:lease_ids AS bigint[]), CAST(:agent_ids AS text[]), CAST(:cursors AS text[])
) AS i (job_id, lease_id, agent_id, cursor)
WHERE EXISTS (
    SELECT FROM lease AS l WHERE l.job_id = i.job_id AND l.lease_id = i.lease_id AND l.agent_id = i.agent_id
    UNION ALL
    SELECT FROM ready AS r WHERE r.job_id = i.job_id AND r.last_lease_id = i.lease_id
    UNION ALL
    SELECT FROM delayed AS d WHERE d.job_id = i.job_id AND d.last_lease_id = i.lease_id
)
ORDER BY i.job_id
ON CONFLICT (job_id) DO UPDATE SET lease_id = EXCLUDED.lease_id, cursor = EXCLUDED.cursor
WHERE c.lease_id <= EXCLUDED.lease_id
RETURNING job_id
