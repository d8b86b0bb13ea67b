-- Stores the jobs of `fresh` (id, name, labels as text or null, spec, dedupe_key
-- and the columns of `terms`) as waiting, and tells of them.
stored AS (
    INSERT INTO job (
        id, queue_id, shape_id, priority, name, labels, spec, ttl_ms, start_timeout_ms, max_failures, max_losses,
        backoff_initial_ms, backoff_max_ms, retry_of, dedupe_key, submitted_at
    )
    SELECT
        id, queue_id, shape_id, priority, name, CAST(COALESCE(labels, '{}') AS jsonb), spec, ttl_ms, start_timeout_ms,
        max_failures, max_losses, backoff_initial_ms, backoff_max_ms, retry_of, dedupe_key,
        COALESCE(CAST(:now AS timestamptz), now())
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
    SELECT n.job_ids, array_fill(1::smallint, ARRAY[n.jobs]), array_fill(0, ARRAY[n.jobs])
    FROM (SELECT array_agg(id) AS job_ids, CAST(count(*) AS int) AS jobs FROM fresh) AS n
    WHERE n.jobs > 0
)
