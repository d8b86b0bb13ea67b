-- read_log_heads | where the logs of leases stand
-- Locks: none. Index: log_head_pkey. Returns: lease_id, end_offset, stdout_bytes, stderr_bytes.
SELECT lease_id, end_offset, stdout_bytes, stderr_bytes
FROM log_head
WHERE lease_id = ANY (CAST(:lease_ids AS bigint[]))
