-- claim | GRANT: ready -> lease
-- Locks: leader shared (an old leader's claim finds no row); the picked ready
-- rows, SKIP LOCKED (a job being cancelled is left out); the sessions shared, in
-- id order (a Hello or a drain in between changes them and the grant is left out).
-- Index: ready_pkey, job_pkey; the bounds leave out the partitions of job that
-- cannot be meant before the statement begins. Returns: one row per lease made, with
-- what its Grant needs.
WITH lead AS MATERIALIZED (
    SELECT clock FROM leader WHERE epoch = CAST(:epoch AS bigint) FOR SHARE
),
pick AS MATERIALIZED (
    SELECT t.*
    FROM lead,
        unnest(
            CAST(:job_ids AS bigint[]), CAST(:session_ids AS bigint[]), CAST(:epochs AS int[]),
            CAST(:gpu_uuids AS text[])
        ) AS t (job_id, session_id, epoch, gpu_uuids)
),
live AS MATERIALIZED (
    SELECT s.id, s.epoch, s.agent_id
    FROM session AS s
    WHERE s.id = ANY (ARRAY(SELECT session_id FROM pick)) AND NOT s.drained
    ORDER BY s.id
    FOR SHARE
),
chosen AS MATERIALIZED (
    SELECT r.job_id
    FROM ready AS r
    WHERE r.job_id = ANY (
        ARRAY(SELECT p.job_id FROM pick AS p JOIN live AS s ON s.id = p.session_id AND s.epoch = p.epoch)
    )
    ORDER BY r.job_id
    FOR UPDATE SKIP LOCKED
),
spec AS MATERIALIZED (
    SELECT
        id, spec, ttl_ms, start_timeout_ms, max_failures, max_losses, backoff_initial_ms, backoff_max_ms, dedupe_key
    FROM job
    WHERE id = ANY (CAST(:job_ids AS bigint[]))
        AND id BETWEEN CAST(:lowest_job_id AS bigint) AND CAST(:highest_job_id AS bigint)
),
taken AS (
    DELETE FROM ready
    WHERE job_id = ANY (ARRAY(SELECT job_id FROM chosen))
    RETURNING job_id, queue_id, shape_id, priority, attempts, failures, losses
),
made AS (
    INSERT INTO lease (
        job_id, lease_id, session_id, agent_id, attempt, phase, queue_id, shape_id, priority, failures, losses,
        max_failures, max_losses, backoff_initial_ms, backoff_max_ms, dedupe_key, ttl_ms, gpu_uuids,
        offered_at, granted_at, start_deadline
    )
    SELECT
        t.job_id, nextval('lease_number'), p.session_id, s.agent_id, t.attempts + 1, 1, t.queue_id, t.shape_id,
        t.priority, t.failures, t.losses, j.max_failures, j.max_losses, j.backoff_initial_ms, j.backoff_max_ms,
        j.dedupe_key, j.ttl_ms,
        CASE WHEN p.gpu_uuids = '' THEN '{}' ELSE string_to_array(p.gpu_uuids, ',') END,
        lead.clock, COALESCE(CAST(:now AS timestamptz), now()),
        COALESCE(CAST(:now AS timestamptz), now()) + make_interval(secs => j.start_timeout_ms / 1000.0)
    FROM taken AS t
    JOIN pick AS p ON p.job_id = t.job_id
    JOIN live AS s ON s.id = p.session_id
    JOIN spec AS j ON j.id = t.job_id
    CROSS JOIN lead
    RETURNING job_id, lease_id, session_id, agent_id, attempt, ttl_ms, gpu_uuids
),
held AS (
    INSERT INTO lease_gpu (agent_id, gpu_uuid, lease_id, job_id)
    SELECT m.agent_id, u.uuid, m.lease_id, m.job_id
    FROM made AS m
    CROSS JOIN LATERAL unnest(m.gpu_uuids) AS u (uuid)
),
news AS (
    INSERT INTO event (job_ids, states, attempts)
    SELECT array_agg(job_id), array_agg(2::smallint), array_agg(attempt)
    FROM made
    HAVING count(*) > 0
)
SELECT m.job_id, m.lease_id, m.session_id, m.attempt, m.ttl_ms, m.gpu_uuids, j.spec, c.cursor
FROM made AS m
JOIN spec AS j ON j.id = m.job_id
LEFT JOIN checkpoint AS c ON c.job_id = m.job_id
