-- claim_dedupe_keys | a submit with dedupe keys: the first holder of a key wins
-- Locks: the keys, in key order; a concurrent holder is waited for.
-- Index: dedupe_pkey. Returns: queue_id, key of those won; the others are read
-- in a new statement (read_dedupe_keys).
INSERT INTO dedupe (queue_id, key, job_id)
SELECT queue_id, key, job_id
FROM unnest(CAST(:queue_ids AS int[]), CAST(:keys AS text[]), CAST(:job_ids AS bigint[])) AS t (queue_id, key, job_id)
ORDER BY queue_id, key
ON CONFLICT DO NOTHING
RETURNING queue_id, key
