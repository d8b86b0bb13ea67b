-- append_logs | log bytes of attempts that exist, ended or not
-- Locks: the log_head rows, in lease order, by the upsert: only a run of chunks
-- that begins at end_offset is taken. Index: log_head_pkey, lease_pkey,
-- attempt_pkey. Returns: the new positions of the runs taken; the others are read in
-- a new statement (read_log_heads).
WITH run AS MATERIALIZED (
    SELECT i.*
    FROM unnest(
        CAST(:run_job_ids AS bigint[]), CAST(:run_lease_ids AS bigint[]), CAST(:run_agent_ids AS text[]),
        CAST(:run_starts AS bigint[]), CAST(:run_stdout_bytes AS bigint[]), CAST(:run_stderr_bytes AS bigint[])
    ) AS i (job_id, lease_id, agent_id, start_offset, stdout_bytes, stderr_bytes)
    WHERE EXISTS (
        SELECT FROM lease AS l
        WHERE l.job_id = i.job_id AND l.lease_id = i.lease_id AND l.agent_id = i.agent_id
        UNION ALL
        SELECT FROM attempt AS a
        WHERE a.job_id = i.job_id AND a.lease_id = i.lease_id AND a.agent_id = i.agent_id
    )
),
head AS (
    INSERT INTO log_head AS h (lease_id, end_offset, stdout_bytes, stderr_bytes)
    SELECT lease_id, stdout_bytes + stderr_bytes, stdout_bytes, stderr_bytes
    FROM run
    WHERE start_offset = 0 OR EXISTS (SELECT FROM log_head AS g WHERE g.lease_id = run.lease_id)
    ORDER BY lease_id
    ON CONFLICT (lease_id) DO UPDATE
    SET end_offset = h.end_offset + EXCLUDED.end_offset,
        stdout_bytes = h.stdout_bytes + EXCLUDED.stdout_bytes,
        stderr_bytes = h.stderr_bytes + EXCLUDED.stderr_bytes
    WHERE h.end_offset = (SELECT r.start_offset FROM run AS r WHERE r.lease_id = h.lease_id)
    RETURNING h.lease_id, h.end_offset, h.stdout_bytes, h.stderr_bytes
),
stored AS (
    INSERT INTO log_chunk (lease_id, start_offset, stream, data, read_at)
    SELECT c.lease_id, c.start_offset, c.stream, c.data, c.read_at
    FROM unnest(
        CAST(:lease_ids AS bigint[]), CAST(:starts AS bigint[]), CAST(:streams AS smallint[]),
        CAST(:data AS bytea[]), CAST(:read_ats AS timestamptz[])
    ) AS c (lease_id, start_offset, stream, data, read_at)
    JOIN head ON head.lease_id = c.lease_id
)
SELECT lease_id, end_offset, stdout_bytes, stderr_bytes FROM head
