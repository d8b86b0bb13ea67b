-- read_dedupe_keys | a submit whose dedupe keys are taken: whose are they
-- Locks: the rows, shared, so that they stand until the submit commits.
-- Index: dedupe_pkey. Returns: queue_id, key, job_id.
SELECT d.queue_id, d.key, d.job_id
FROM unnest(CAST(:queue_ids AS int[]), CAST(:keys AS text[])) AS k (queue_id, key)
JOIN dedupe AS d ON d.queue_id = k.queue_id AND d.key = k.key
ORDER BY d.queue_id, d.key
FOR SHARE OF d
