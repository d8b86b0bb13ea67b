-- end | END, RELEASE, REJECT: lease -> attempt, and ready, delayed or nothing
-- Locks: the leases, in job order. Index: lease_pkey. Returns: job_id, lease_id,
-- drained (true: the outcome is stored, the GPUs are free, log bytes are missing).
-- The bounds leave out the partitions of log_head that cannot be meant before the
-- statement begins. A NULL outcome is Released: WITHDRAWN if it was only offered, else LOST.
WITH live AS MATERIALIZED (
    -- By the index whatever the statistics say: they may be of a time when the table was empty, or full.
    SELECT *
    FROM lease
    WHERE job_id = ANY (ARRAY(SELECT unnest(CAST(:job_ids AS bigint[])))) AND phase < 4
    ORDER BY job_id
    FOR UPDATE
),
held AS MATERIALIZED (
    SELECT
        l.job_id, l.lease_id, l.attempt, l.agent_id, l.gpu_uuids, l.queue_id, l.shape_id, l.priority,
        l.failures, l.losses, l.max_failures, l.max_losses, l.backoff_initial_ms, l.backoff_max_ms,
        l.cancel_requested, l.dedupe_key, l.granted_at,
        COALESCE(i.outcome, CASE WHEN l.phase = 1 THEN 8 ELSE 6 END::smallint) AS outcome,
        i.outcome IS NULL AND l.phase > 1 AS cut_off,
        i.exit_code, i.signal, i.error, i.retryable, i.result, i.final_log_offset,
        COALESCE(l.started_at, i.started_at) AS started_at, i.ended_at, i.jitter
    FROM unnest(
        CAST(:job_ids AS bigint[]), CAST(:lease_ids AS bigint[]), CAST(:agent_ids AS text[]),
        CAST(:outcomes AS smallint[]), CAST(:exit_codes AS int[]), CAST(:signals AS int[]),
        CAST(:errors AS bytea[]), CAST(:retryables AS boolean[]), CAST(:results AS bytea[]),
        CAST(:final_log_offsets AS bigint[]), CAST(:started_ats AS timestamptz[]), CAST(:ended_ats AS timestamptz[]),
        CAST(:jitters AS double precision[])
    ) AS i (
        job_id, lease_id, agent_id, outcome, exit_code, signal, error, retryable, result, final_log_offset,
        started_at, ended_at, jitter
    )
    JOIN live AS l ON l.job_id = i.job_id AND l.lease_id = i.lease_id AND l.agent_id = i.agent_id
),
logged AS MATERIALIZED (
    SELECT
        h.*,
        COALESCE((
            SELECT g.end_offset
            FROM log_head AS g
            WHERE g.lease_id = h.lease_id
                AND g.lease_id BETWEEN CAST(:lowest_lease_id AS bigint) AND CAST(:highest_lease_id AS bigint)
        ), 0) AS log_bytes
    FROM held AS h
),
closing AS MATERIALIZED (
    -- A lease given back after it may have run: nobody has the rest of its log.
    SELECT *, CASE WHEN cut_off THEN log_bytes END AS logs_truncated_at
    FROM logged
    WHERE log_bytes >= final_log_offset
),
freeing AS (
    SELECT lease_id FROM held WHERE gpu_uuids <> '{}'
),
-- include settle
,
draining AS (
    UPDATE lease AS l
    SET phase = 4, outcome = d.outcome, exit_code = d.exit_code, signal = d.signal, error = d.error,
        retryable = d.retryable, result = d.result, final_log_offset = d.final_log_offset,
        started_at = d.started_at, ended_at = COALESCE(d.ended_at, CAST(:now AS timestamptz), now())
    FROM logged AS d
    WHERE l.job_id = d.job_id AND d.log_bytes < d.final_log_offset
        AND l.job_id = ANY (ARRAY(SELECT job_id FROM logged WHERE log_bytes < final_log_offset))
)
SELECT job_id, lease_id, log_bytes < final_log_offset AS drained FROM logged
