-- submit_deduped | one request with dedupe keys, after its keys are claimed: nothing -> ready
-- Locks: the request key. Index: request_pkey. Returns: one row when the request
-- is new, none when it was answered before (the caller then rolls back).
-- job_ids answers the request; ids are the new ones among them.
WITH
-- include terms
won AS (
    INSERT INTO request (principal, request_id, fingerprint, job_ids, created_at)
    SELECT
        CAST(:principal AS text), CAST(:request_id AS text), CAST(:fingerprint AS bytea),
        CAST(:job_ids AS bigint[]), COALESCE(CAST(:now AS timestamptz), now())
    ON CONFLICT DO NOTHING
    RETURNING principal
),
fresh AS MATERIALIZED (
    SELECT j.id, j.name, j.labels, j.spec, j.dedupe_key, t.*
    FROM won,
        unnest(
            CAST(:ids AS bigint[]), CAST(:term_numbers AS int[]), CAST(:names AS text[]), CAST(:labels AS text[]),
            CAST(:specs AS bytea[]), CAST(:dedupe_keys AS text[])
        ) AS j (id, term_number, name, labels, spec, dedupe_key)
    JOIN terms AS t ON t.term_number = COALESCE(j.term_number, 1)
),
-- include store_jobs
SELECT principal FROM won
