"""Jobs and attempts as the contract shows them, from rows of the store."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from lessor.ids import encode_job_id
from lessor.lifecycle import LeasePhase, Outcome
from lessor.v1 import job_pb2
from lessor_server.domain.budgets import Fate, exhausted_budget, exhausted_message
from lessor_server.domain.states import JobState
from lessor_server.store.job_queries import AttemptRow, JobRow

_log = logging.getLogger(__name__)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def timestamp(at: datetime) -> Timestamp:
    """Returns ``at`` (with a time zone) as the contract has it."""
    # By hand: Timestamp.FromDatetime takes ten times as long, and a page of jobs has hundreds of times.
    since = at - _EPOCH
    return Timestamp(seconds=since.days * 86_400 + since.seconds, nanos=since.microseconds * 1000)


def state_of(row: JobRow) -> JobState | None:
    """Returns where the job stands; None: nowhere, which retention alone may bring about and is logged."""
    held = [
        state
        for state, there in (
            (JobState.QUEUED, row.waiting_attempts is not None),
            (_live_state(row), row.live_phase is not None),
            (JobState(row.final_state or 0) if row.final_state else JobState.QUEUED, row.final_state is not None),
        )
        if there
    ]
    if len(held) != 1:
        _log.error(
            "a job stands in %d states",
            len(held),
            extra={"event": "job_state_broken", "job_id": encode_job_id(row.number), "states": [s.name for s in held]},
        )
    return held[-1] if held else None


def _live_state(row: JobRow) -> JobState:
    return JobState.LEASED if (row.live_phase or 0) < LeasePhase.RUNNING else JobState.RUNNING


def job_proto(row: JobRow) -> job_pb2.Job | None:
    """Returns the job as its snapshot shows it; None: it stands nowhere (see :func:`state_of`)."""
    state = state_of(row)
    if state is None:
        return None
    job = job_pb2.Job(
        id=encode_job_id(row.number), state=job_pb2.JobState.ValueType(state), submit_time=timestamp(row.submitted_at)
    )
    job.spec.ParseFromString(row.spec)
    if row.retry_of is not None:
        job.retry_of = encode_job_id(row.retry_of)
    _add_counts(job, row)
    _add_place(job, row)
    _add_end(job, row)
    if row.progress_updated_at is not None:
        job.progress.CopyFrom(
            progress_proto(
                row.progress_fraction, row.progress_message or "", row.progress_metrics or {}, row.progress_updated_at
            )
        )
    return job


def _add_counts(job: job_pb2.Job, row: JobRow) -> None:
    """Adds the attempt and the budgets, from whichever row the job stands in."""
    if row.final_state is not None:
        counts = row.final_attempt, row.final_failures, row.final_losses
    elif row.live_phase is not None:
        counts = row.live_attempt, row.live_failures, row.live_losses
    else:
        counts = row.waiting_attempts, row.waiting_failures, row.waiting_losses
    job.attempt, job.failures, job.losses = (count or 0 for count in counts)
    if row.not_before is not None:
        job.not_before.CopyFrom(timestamp(row.not_before))


def _add_place(job: job_pb2.Job, row: JobRow) -> None:
    """Adds where the current attempt is, or the last one was."""
    if row.live_phase is not None:
        lease_id, agent, gpus, started = row.live_lease_id, row.live_agent, row.live_gpu_uuids, row.live_started_at
        job.cancel_requested = bool(row.live_cancel_requested)
    else:
        lease_id, agent, gpus, started = row.last_lease_id, row.last_agent, row.last_gpu_uuids, row.last_started_at
    job.lease_id = lease_id or 0
    job.agent = agent or ""
    job.gpu_uuids.extend(gpus or [])
    if started is not None:
        job.start_time.CopyFrom(timestamp(started))


def _add_end(job: job_pb2.Job, row: JobRow) -> None:
    """Adds how the job ended; while it has not, how its last ended attempt did."""
    if row.final_state is not None:
        outcome, exit_code, signal, error = (
            row.final_outcome,
            row.final_exit_code,
            row.final_signal,
            row.final_error,
        )
        if row.final_ended_at is not None:
            job.end_time.CopyFrom(timestamp(row.final_ended_at))
        job.result_json = row.final_result or b""
    else:
        outcome, exit_code, signal, error = row.last_outcome, row.last_exit_code, row.last_signal, row.last_error
    job.outcome = job_pb2.Outcome.ValueType(outcome or 0)
    if exit_code is not None:
        job.exit_code = exit_code
    job.signal = signal or 0
    if error is not None:
        job.error.ParseFromString(error)
    if row.final_state == JobState.FAILED and outcome is not None:
        _name_budget(job, Outcome(outcome))


def _name_budget(job: job_pb2.Job, outcome: Outcome) -> None:
    """Says in the error of a failed job which budget was exhausted, if one was."""
    retry = job.spec.retry
    budget = exhausted_budget(outcome, job.failures, job.losses, retry.max_failures, retry.max_losses)
    said = exhausted_message(Fate(JobState.FAILED, job.failures, job.losses, exhausted=budget), retry.max_failures)
    if said:
        job.error.message = f"{said}: {job.error.message}" if job.error.message else said


def progress_proto(
    fraction: float | None, message: str, metrics: dict[str, float], updated_at: datetime
) -> job_pb2.Progress:
    """Returns the latest word of an attempt about itself."""
    progress = job_pb2.Progress(message=message, metrics=metrics, update_time=timestamp(updated_at))
    if fraction is not None:
        progress.fraction = fraction
    return progress


def attempt_proto(row: AttemptRow) -> job_pb2.Attempt:
    """Returns one attempt."""
    attempt = job_pb2.Attempt(
        attempt=row.attempt,
        lease_id=row.lease_id,
        phase=job_pb2.LeasePhase.ValueType(row.phase),
        outcome=job_pb2.Outcome.ValueType(row.outcome or 0),
        agent=row.agent or "",
        gpu_uuids=row.gpu_uuids,
        signal=row.signal,
        log_bytes=row.log_bytes,
        result_json=row.result or b"",
    )
    for name, at in (("grant_time", row.granted_at), ("start_time", row.started_at), ("end_time", row.ended_at)):
        if at is not None:
            getattr(attempt, name).CopyFrom(timestamp(at))
    if row.exit_code is not None:
        attempt.exit_code = row.exit_code
    if row.logs_truncated_at is not None:
        attempt.logs_truncated_at = row.logs_truncated_at
    if row.error is not None:
        attempt.error.ParseFromString(row.error)
    return attempt
