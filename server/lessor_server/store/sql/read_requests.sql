-- read_requests | a repeated request: looks up what it made
-- Locks: none. Index: request_pkey. Returns: principal, request_id, fingerprint, job_ids.
SELECT r.principal, r.request_id, r.fingerprint, r.job_ids
FROM unnest(CAST(:principals AS text[]), CAST(:request_ids AS text[])) AS k (principal, request_id)
JOIN request AS r ON r.principal = k.principal AND r.request_id = k.request_id
