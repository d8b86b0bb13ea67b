-- ask_back | REVOKE of offers and starts that take too long: marks the lease
-- Locks: leader shared; the due leases, SKIP LOCKED. Reads the whole table, which
-- holds live leases only. Returns: job_id, lease_id, session_id, revoke.
WITH lead AS MATERIALIZED (
    SELECT clock FROM leader WHERE epoch = CAST(:epoch AS bigint) FOR SHARE
),
due AS MATERIALIZED (
    SELECT
        l.job_id,
        (CASE WHEN l.start_deadline <= COALESCE(CAST(:now AS timestamptz), now()) THEN 5 ELSE 2 END)::smallint AS reason
    FROM lease AS l, lead
    WHERE l.phase IN (1, 2) AND (
        (l.phase = 1 AND l.revoke IS NULL AND l.offered_at + CAST(:offer_ttl_ms AS bigint) < lead.clock)
        OR (COALESCE(l.revoke, 2) = 2 AND l.start_deadline <= COALESCE(CAST(:now AS timestamptz), now()))
    )
    ORDER BY l.job_id
    FOR UPDATE OF l SKIP LOCKED
)
UPDATE lease AS l
SET revoke = d.reason
FROM due AS d
WHERE l.job_id = d.job_id AND l.job_id = ANY (ARRAY(SELECT job_id FROM due))
RETURNING l.job_id, l.lease_id, l.session_id, l.revoke
