-- tick | the leader advances lease time and shows that it lives
-- stood_ms is how long lease time has stood still in the present storm, for the
-- next leader to go on from.
-- Locks: leader. Returns: clock, or nothing: another replica leads.
UPDATE leader
SET clock = clock + CAST(:elapsed_ms AS bigint), beat = beat + 1, stood_ms = CAST(:stood_ms AS bigint)
WHERE epoch = CAST(:epoch AS bigint)
RETURNING clock
