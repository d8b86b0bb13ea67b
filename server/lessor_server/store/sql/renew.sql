-- renew | RENEW: session -> session, one statement for all sessions of a replica
-- Locks: the sessions, in id order. Index: session_pkey; HOT, no index touched.
-- Returns: the ids renewed. One that does not come back has another epoch now:
-- its heartbeat is not acked and the agent is asked for a new Hello.
WITH mine AS MATERIALIZED (
    SELECT s.id
    FROM unnest(CAST(:session_ids AS bigint[]), CAST(:epochs AS int[])) AS m (id, epoch)
    JOIN session AS s ON s.id = m.id AND s.epoch = m.epoch
    ORDER BY s.id
    FOR UPDATE OF s
)
UPDATE session
SET renewed_at = GREATEST(renewed_at, (SELECT clock FROM leader))
WHERE id = ANY (ARRAY(SELECT id FROM mine))
RETURNING id
