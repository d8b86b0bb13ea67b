-- save_progress | latest-wins news of leases that live
-- Locks: the progress rows, in lease order, by the upsert. Index: lease_pkey,
-- progress_pkey. Returns: job_id, lease_id of those stored.
INSERT INTO progress AS p (lease_id, job_id, fraction, message, metrics, updated_at)
SELECT i.lease_id, i.job_id, i.fraction, i.message, i.metrics, i.updated_at
FROM unnest(
    CAST(:job_ids AS bigint[]), CAST(:lease_ids AS bigint[]), CAST(:agent_ids AS text[]),
    CAST(:fractions AS double precision[]), CAST(:messages AS text[]), CAST(:metrics AS jsonb[]),
    CAST(:updated_ats AS timestamptz[])
) AS i (job_id, lease_id, agent_id, fraction, message, metrics, updated_at)
WHERE EXISTS (
    SELECT FROM lease AS l WHERE l.job_id = i.job_id AND l.lease_id = i.lease_id AND l.agent_id = i.agent_id
)
ORDER BY i.lease_id
ON CONFLICT (lease_id) DO UPDATE
SET fraction = EXCLUDED.fraction, message = EXCLUDED.message, metrics = EXCLUDED.metrics,
    updated_at = EXCLUDED.updated_at
WHERE p.updated_at <= EXCLUDED.updated_at
RETURNING p.job_id, p.lease_id
