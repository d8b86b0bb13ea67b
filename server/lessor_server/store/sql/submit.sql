-- submit | new requests: nothing -> ready
-- Locks: the request keys, in key order; a concurrent holder of a key is waited for.
-- Index: request_pkey. Returns: principal, request_id, job_ids of the requests
-- that are new; the others are read in a new statement (read_requests).
WITH job_in AS MATERIALIZED (
    SELECT
        t.*,
        next_job_id(CAST(:now AS timestamptz)) AS id
    FROM unnest(
        CAST(:request_indexes AS int[]), CAST(:queue_ids AS int[]), CAST(:shape_ids AS bigint[]),
        CAST(:priorities AS int[]), CAST(:names AS text[]), CAST(:labels AS jsonb[]), CAST(:specs AS bytea[]),
        CAST(:ttls_ms AS bigint[]), CAST(:start_timeouts_ms AS bigint[]), CAST(:queue_timeouts_ms AS bigint[]),
        CAST(:max_failures AS int[]), CAST(:max_losses AS int[]),
        CAST(:backoff_initials_ms AS bigint[]), CAST(:backoff_maxes_ms AS bigint[]), CAST(:retries_of AS bigint[])
    ) WITH ORDINALITY AS t (
        request_index, queue_id, shape_id, priority, name, labels, spec, ttl_ms, start_timeout_ms, queue_timeout_ms,
        max_failures, max_losses, backoff_initial_ms, backoff_max_ms, retry_of, position
    )
),
ids AS (
    SELECT request_index, array_agg(id ORDER BY position) AS job_ids
    FROM job_in
    GROUP BY request_index
),
won AS (
    INSERT INTO request (principal, request_id, fingerprint, job_ids, created_at)
    SELECT r.principal, r.request_id, r.fingerprint, ids.job_ids, COALESCE(CAST(:now AS timestamptz), now())
    FROM unnest(
        CAST(:principals AS text[]), CAST(:request_ids AS text[]), CAST(:fingerprints AS bytea[])
    ) WITH ORDINALITY AS r (principal, request_id, fingerprint, request_index)
    JOIN ids ON ids.request_index = r.request_index
    ORDER BY r.principal, r.request_id
    ON CONFLICT DO NOTHING
    RETURNING principal, request_id, job_ids
),
fresh AS (
    SELECT j.*
    FROM (SELECT unnest(job_ids) AS id FROM won) AS w
    JOIN job_in AS j ON j.id = w.id
),
stored AS (
    INSERT INTO job (
        id, queue_id, shape_id, priority, name, labels, spec, ttl_ms, start_timeout_ms, max_failures, max_losses,
        backoff_initial_ms, backoff_max_ms, retry_of, submitted_at
    )
    SELECT
        id, queue_id, shape_id, priority, name, labels, spec, ttl_ms, start_timeout_ms, max_failures, max_losses,
        backoff_initial_ms, backoff_max_ms, retry_of, COALESCE(CAST(:now AS timestamptz), now())
    FROM fresh
),
queued AS (
    INSERT INTO ready (job_id, queue_id, shape_id, priority, attempts, failures, losses, queue_deadline)
    SELECT
        id, queue_id, shape_id, priority, 0, 0, 0,
        COALESCE(CAST(:now AS timestamptz), now()) + make_interval(secs => queue_timeout_ms / 1000.0)
    FROM fresh
),
news AS (
    INSERT INTO event (job_ids, states, attempts)
    SELECT array_agg(id), array_agg(1::smallint), array_agg(0)
    FROM fresh
    HAVING count(*) > 0
)
SELECT principal, request_id, job_ids FROM won
