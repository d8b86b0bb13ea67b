-- Of a DRAINING lease `l`: what it says about its job, and the end that is stored in it.
-- One by one: a column that a newer schema adds must not meet a name made here.
l.job_id, l.lease_id, l.agent_id, l.attempt, l.queue_id, l.shape_id, l.priority, l.failures, l.losses,
l.max_failures, l.max_losses, l.backoff_initial_ms, l.backoff_max_ms, l.dedupe_key, l.gpu_uuids,
l.granted_at, l.started_at, l.cancel_requested, l.outcome, l.exit_code, l.signal, l.error, l.retryable,
l.result, l.final_log_offset, l.ended_at
