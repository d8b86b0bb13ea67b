-- renew_term | a leader begins a new term of its own: what is under way in the old one cannot commit any more
-- Locks: leader; a claim of the old term that holds it is waited for and then
-- seen. Index: leader_pkey. Returns: epoch, or nothing: another replica leads.
UPDATE leader
SET epoch = epoch + 1, beat = beat + 1
WHERE epoch = CAST(:epoch AS bigint) AND holder = CAST(:holder AS text)
RETURNING epoch
