-- What jobs have in common, numbered from 1, each for the jobs of one request.
terms AS MATERIALIZED (
    SELECT *
    FROM unnest(
        CAST(:request_indexes AS int[]), CAST(:queue_ids AS int[]), CAST(:shape_ids AS bigint[]),
        CAST(:priorities AS int[]), CAST(:ttls_ms AS bigint[]), CAST(:start_timeouts_ms AS bigint[]),
        CAST(:queue_timeouts_ms AS bigint[]), CAST(:max_failures AS int[]), CAST(:max_losses AS int[]),
        CAST(:backoff_initials_ms AS bigint[]), CAST(:backoff_maxes_ms AS bigint[]), CAST(:retries_of AS bigint[])
    ) WITH ORDINALITY AS t (
        request_index, queue_id, shape_id, priority, ttl_ms, start_timeout_ms, queue_timeout_ms, max_failures,
        max_losses, backoff_initial_ms, backoff_max_ms, retry_of, term_number
    )
),
