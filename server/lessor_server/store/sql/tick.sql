-- tick | the leader advances lease time and shows that it lives
-- Locks: leader. Returns: clock, or nothing: another replica leads.
UPDATE leader
SET clock = clock + CAST(:elapsed_ms AS bigint), beat = beat + 1
WHERE epoch = CAST(:epoch AS bigint)
RETURNING clock
