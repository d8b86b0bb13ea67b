-- advance | ACCEPT, RUN: lease.phase -> ACCEPTED or RUNNING
-- Locks: the leases, in job order; the epoch of the session that says it is checked.
-- Index: lease_pkey. Returns: job_id, lease_id of those that moved. A repeated
-- event moves nothing; settle_reports tells it from a stale one.
WITH said AS MATERIALIZED (
    SELECT l.job_id, l.lease_id, i.phase, i.started_at
    FROM unnest(
        CAST(:job_ids AS bigint[]), CAST(:lease_ids AS bigint[]), CAST(:session_ids AS bigint[]),
        CAST(:epochs AS int[]), CAST(:phases AS smallint[]), CAST(:started_ats AS timestamptz[])
    ) AS i (job_id, lease_id, session_id, epoch, phase, started_at)
    JOIN session AS s ON s.id = i.session_id AND s.epoch = i.epoch
    JOIN lease AS l ON l.job_id = i.job_id AND l.lease_id = i.lease_id AND l.agent_id = s.agent_id
    WHERE l.phase < i.phase AND l.job_id = ANY (ARRAY(SELECT unnest(CAST(:job_ids AS bigint[]))))
    ORDER BY l.job_id
    FOR UPDATE OF l
),
moved AS (
    UPDATE lease AS l
    SET phase = s.phase,
        started_at = COALESCE(l.started_at, s.started_at),
        revoke = CASE WHEN l.revoke = 2 THEN NULL ELSE l.revoke END
    FROM said AS s
    WHERE l.job_id = s.job_id AND l.lease_id = s.lease_id AND l.job_id = ANY (ARRAY(SELECT job_id FROM said))
    RETURNING l.job_id, l.lease_id, l.phase, l.attempt
),
news AS (
    INSERT INTO event (job_ids, states, attempts)
    SELECT array_agg(job_id), array_agg(3::smallint), array_agg(attempt)
    FROM moved
    WHERE phase = 3
    HAVING count(*) > 0
)
SELECT job_id, lease_id FROM moved
