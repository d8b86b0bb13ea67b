-- finish_drained | LOGS_COMPLETE: lease (DRAINING) -> attempt, and ready, delayed or nothing
-- Locks: the leases, in job order, SKIP LOCKED (whoever holds one finishes it or
-- asks again). Index: lease_pkey. job_ids NULL: all. Returns: job_id, lease_id.
WITH held AS MATERIALIZED (
    SELECT
-- include stored_end
    FROM lease AS l
    WHERE l.phase = 4
        AND (CAST(:job_ids AS bigint[]) IS NULL OR l.job_id = ANY (CAST(:job_ids AS bigint[])))
        AND COALESCE((SELECT g.end_offset FROM log_head AS g WHERE g.lease_id = l.lease_id), 0) >= l.final_log_offset
    ORDER BY l.job_id
    FOR UPDATE OF l SKIP LOCKED
),
closing AS MATERIALIZED (
    SELECT h.*, h.final_log_offset AS log_bytes, CAST(NULL AS bigint) AS logs_truncated_at,
        2 * random() - 1 AS jitter
    FROM held AS h
),
freeing AS (
    SELECT lease_id FROM closing WHERE gpu_uuids <> '{}'
),
-- include settle
SELECT job_id, lease_id FROM closing
