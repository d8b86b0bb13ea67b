-- read_leader | who leads
-- Locks: none. Returns: epoch, holder, clock, beat.
SELECT epoch, holder, clock, beat FROM leader
