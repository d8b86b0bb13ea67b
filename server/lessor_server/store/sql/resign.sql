-- resign | a leader that stops lets another take over at once
-- Locks: leader. Returns: epoch.
UPDATE leader SET epoch = epoch + 1, holder = '' WHERE epoch = CAST(:epoch AS bigint) RETURNING epoch
