-- take_over | a replica becomes leader because the last one stood still
-- Locks: leader; a claim or expire of the old leader that is under way is waited
-- for, a later one finds its epoch gone. Lease time goes on where it stood, and so
-- does the time it has stood still in a storm.
-- Returns: epoch, clock, stood_ms, or nothing: someone was quicker.
UPDATE leader
SET epoch = epoch + 1, holder = CAST(:holder AS text), beat = beat + 1
WHERE epoch = CAST(:seen_epoch AS bigint) AND beat = CAST(:seen_beat AS bigint)
RETURNING epoch, clock, stood_ms
