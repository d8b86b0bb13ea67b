-- submit | new requests: nothing -> ready
-- Locks: the request keys, in key order; a concurrent holder of a key is waited for.
-- Index: request_pkey. Returns: principal, request_id, job_ids of the requests
-- that are new; the others are read in a new statement (read_requests).
WITH
-- include terms
job_in AS MATERIALIZED (
    SELECT
        COALESCE(j.term_number, 1) AS term_number, j.name, j.labels, j.spec, j.position,
        -- What next_job_id does; the time is read once.
        (
            SELECT CAST(extract(epoch FROM COALESCE(CAST(:now AS timestamptz), clock_timestamp())) * 1000 AS bigint)
                << 21
        ) | nextval('job_number') AS id
    FROM unnest(
        CAST(:term_numbers AS int[]), CAST(:names AS text[]), CAST(:labels AS text[]), CAST(:specs AS bytea[])
    ) WITH ORDINALITY AS j (term_number, name, labels, spec, position)
),
ids AS (
    SELECT t.request_index, array_agg(j.id ORDER BY j.position) AS job_ids
    FROM job_in AS j
    JOIN terms AS t ON t.term_number = j.term_number
    GROUP BY t.request_index
),
request_in AS MATERIALIZED (
    SELECT *
    FROM unnest(
        CAST(:principals AS text[]), CAST(:request_ids AS text[]), CAST(:fingerprints AS bytea[])
    ) WITH ORDINALITY AS r (principal, request_id, fingerprint, request_index)
),
won AS (
    INSERT INTO request (principal, request_id, fingerprint, job_ids, created_at)
    SELECT r.principal, r.request_id, r.fingerprint, ids.job_ids, COALESCE(CAST(:now AS timestamptz), now())
    FROM request_in AS r
    JOIN ids ON ids.request_index = r.request_index
    ORDER BY r.principal, r.request_id
    ON CONFLICT DO NOTHING
    RETURNING principal, request_id, job_ids
),
fresh AS MATERIALIZED (
    SELECT j.id, j.name, j.labels, j.spec, CAST(NULL AS text) AS dedupe_key, t.*
    FROM won
    JOIN request_in AS r ON r.principal = won.principal AND r.request_id = won.request_id
    JOIN terms AS t ON t.request_index = r.request_index
    JOIN job_in AS j ON j.term_number = t.term_number
    ORDER BY j.position
),
-- include store_jobs
SELECT principal, request_id, job_ids FROM won
