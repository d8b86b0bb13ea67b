-- submit_deduped | one request with dedupe keys, after its keys are claimed: nothing -> ready
-- Locks: the request key. Index: request_pkey. Returns: one row when the request
-- is new, none when it was answered before (the caller then rolls back).
-- job_ids answers the request; ids are the new ones among them.
WITH won AS (
    INSERT INTO request (principal, request_id, fingerprint, job_ids, created_at)
    SELECT
        CAST(:principal AS text), CAST(:request_id AS text), CAST(:fingerprint AS bytea),
        CAST(:job_ids AS bigint[]), COALESCE(CAST(:now AS timestamptz), now())
    ON CONFLICT DO NOTHING
    RETURNING principal
),
fresh AS (
    SELECT t.*
    FROM won,
        unnest(
            CAST(:ids AS bigint[]), CAST(:queue_ids AS int[]), CAST(:shape_ids AS bigint[]),
            CAST(:priorities AS int[]), CAST(:names AS text[]), CAST(:labels AS jsonb[]), CAST(:specs AS bytea[]),
            CAST(:ttls_ms AS bigint[]), CAST(:start_timeouts_ms AS bigint[]), CAST(:queue_timeouts_ms AS bigint[]),
            CAST(:max_failures AS int[]), CAST(:max_losses AS int[]),
            CAST(:backoff_initials_ms AS bigint[]), CAST(:backoff_maxes_ms AS bigint[]),
            CAST(:retries_of AS bigint[]), CAST(:dedupe_keys AS text[])
        ) AS t (
            id, queue_id, shape_id, priority, name, labels, spec, ttl_ms, start_timeout_ms, queue_timeout_ms,
            max_failures, max_losses, backoff_initial_ms, backoff_max_ms, retry_of, dedupe_key
        )
),
stored AS (
    INSERT INTO job (
        id, queue_id, shape_id, priority, name, labels, spec, ttl_ms, start_timeout_ms, max_failures, max_losses,
        backoff_initial_ms, backoff_max_ms, retry_of, dedupe_key, submitted_at
    )
    SELECT
        id, queue_id, shape_id, priority, name, labels, spec, ttl_ms, start_timeout_ms, max_failures, max_losses,
        backoff_initial_ms, backoff_max_ms, retry_of, dedupe_key, COALESCE(CAST(:now AS timestamptz), now())
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
SELECT principal FROM won
