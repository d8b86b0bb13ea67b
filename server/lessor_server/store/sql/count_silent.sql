-- count_silent | how many sessions that hold leases have missed heartbeats
-- A session whose host is proven gone is no riddle and counts on neither side.
-- Locks: none. Index: lease_session for the silent ones; the whole of lease only
-- when more than :few are silent. Returns: silent, holding (0: not counted).
WITH quiet AS MATERIALIZED (
    SELECT s.id
    FROM session AS s
    CROSS JOIN leader AS l
    WHERE s.renewed_at + CAST(:intervals AS int) * s.heartbeat_ms < l.clock AND NOT s.host_gone
),
silent AS MATERIALIZED (
    SELECT count(DISTINCT session_id)::int AS sessions
    FROM lease
    WHERE session_id = ANY (ARRAY(SELECT id FROM quiet))
)
SELECT
    sessions AS silent,
    CASE
        WHEN sessions > CAST(:few AS int)
            THEN (
                SELECT count(*)::int
                FROM session AS s
                WHERE NOT s.host_gone AND s.id IN (SELECT session_id FROM lease)
            )
        ELSE 0
    END AS holding
FROM silent
