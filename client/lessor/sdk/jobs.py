"""Jobs, their attempts and their news, as the server tells them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from lessor.sdk.enums import ErrorClass, JobState, LeasePhase, LogStream, Outcome, PendingReason, from_number
from lessor.sdk.specs import JobSpec
from lessor.sdk.wire import JsonValue, plain_fields, time_of
from lessor.v1 import job_pb2, job_service_pb2


@dataclass(frozen=True, slots=True)
class Submission:
    """The answer to a submit. ``str()`` is the job's id; it can be given wherever a job is asked for."""

    id: str
    """The job's id."""
    existing: bool
    """True when an earlier job answered: same request_id or dedupe_key."""

    def __str__(self) -> str:
        return self.id


@dataclass(frozen=True, slots=True)
class JobError:
    """What went wrong."""

    error_class: ErrorClass | None
    """Whose fault it is."""
    type: str
    """A short stable name: an exception's type, or EXIT_CODE, SIGNAL, RUN_TIMEOUT, LEASE_EXPIRED, …"""
    message: str
    """One sentence."""
    traceback: str
    """The workload's, if it reported one."""
    retryable: bool
    """False: a retry cannot help, and none is made."""

    @classmethod
    def from_proto(cls, message: job_pb2.JobError) -> JobError:
        """Reads it from the wire."""
        return cls(
            error_class=from_number(ErrorClass, message.error_class),
            type=message.type,
            message=message.message,
            traceback=message.traceback,
            retryable=message.retryable,
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """The latest word of a running attempt about itself."""

    fraction: float | None
    """0–1; None when the workload reports none."""
    message: str
    metrics: Mapping[str, float]
    """Latest value of each metric."""
    update_time: datetime | None

    @classmethod
    def from_proto(cls, message: job_pb2.Progress) -> Progress:
        """Reads it from the wire."""
        return cls(
            fraction=message.fraction if message.HasField("fraction") else None,
            message=message.message,
            metrics=dict(message.metrics),
            update_time=time_of(message, "update_time"),
        )


@dataclass(frozen=True, slots=True)
class Job:
    """A job and where it stands, read in one snapshot."""

    id: str
    spec: JobSpec
    """As submitted, defaults filled in."""
    state: JobState
    attempt: int
    """Number of the current or last attempt; 0 before the first."""
    failures: int
    losses: int
    submit_time: datetime | None
    start_time: datetime | None
    """When the current or last attempt began to run."""
    end_time: datetime | None
    """When the job became terminal."""
    not_before: datetime | None
    """A waiting retry starts no earlier."""
    retry_of: str | None
    """The job this one repeats."""
    cancel_requested: bool
    agent: str | None
    """Of the current or last attempt, by name."""
    lease_id: int | None
    """Fencing token of the current or last attempt."""
    gpu_uuids: tuple[str, ...]
    outcome: Outcome | None
    """How the last ended attempt ended."""
    exit_code: int | None
    signal: int | None
    """That ended the last ended attempt."""
    error: JobError | None
    progress: Progress | None
    result_json: bytes = field(default=b"", repr=False)
    """As the workload wrote it; empty: none."""

    @property
    def result(self) -> JsonValue:
        """The workload's result, parsed; None when there is none.

        Raises:
            ValueError: The workload wrote no valid JSON.
        """
        return _result(self.result_json)

    @property
    def exit_status(self) -> int:
        """The exit status a shell would give: 0, the exit code, 128 + signal, 130 if cancelled, else 1.

        Only meaningful for a terminal job.
        """
        if self.state is JobState.SUCCEEDED:
            return 0
        if self.state is JobState.CANCELLED:
            return 130
        if self.signal:
            return 128 + self.signal
        return self.exit_code or 1

    def to_dict(self) -> dict[str, JsonValue]:
        """Returns it as plain JSON values; ``result`` is parsed."""
        return _with_result(plain_fields(self), self.result_json)

    @classmethod
    def from_proto(cls, message: job_pb2.Job) -> Job:
        """Reads it from the wire."""
        return cls(
            id=message.id,
            spec=JobSpec.from_proto(message.spec),
            state=JobState(message.state),
            attempt=message.attempt,
            failures=message.failures,
            losses=message.losses,
            submit_time=time_of(message, "submit_time"),
            start_time=time_of(message, "start_time"),
            end_time=time_of(message, "end_time"),
            not_before=time_of(message, "not_before"),
            retry_of=message.retry_of or None,
            cancel_requested=message.cancel_requested,
            agent=message.agent or None,
            lease_id=message.lease_id or None,
            gpu_uuids=tuple(message.gpu_uuids),
            outcome=from_number(Outcome, message.outcome),
            exit_code=message.exit_code if message.HasField("exit_code") else None,
            signal=message.signal or None,
            error=JobError.from_proto(message.error) if message.HasField("error") else None,
            progress=Progress.from_proto(message.progress) if message.HasField("progress") else None,
            result_json=message.result_json,
        )


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a job."""

    attempt: int
    """1, 2, …"""
    lease_id: int
    """The fencing token."""
    phase: LeasePhase | None
    outcome: Outcome | None
    """None while it lives."""
    agent: str
    gpu_uuids: tuple[str, ...]
    grant_time: datetime | None
    start_time: datetime | None
    end_time: datetime | None
    exit_code: int | None
    signal: int | None
    error: JobError | None
    log_bytes: int
    """Bytes of log stored."""
    logs_truncated_at: int | None
    """Set when the log could not be completed: it is exact up to this offset."""
    result_json: bytes = field(default=b"", repr=False)

    @property
    def result(self) -> JsonValue:
        """The result of this attempt, parsed; None when there is none."""
        return _result(self.result_json)

    def to_dict(self) -> dict[str, JsonValue]:
        """Returns it as plain JSON values; ``result`` is parsed."""
        return _with_result(plain_fields(self), self.result_json)

    @classmethod
    def from_proto(cls, message: job_pb2.Attempt) -> Attempt:
        """Reads it from the wire."""
        return cls(
            attempt=message.attempt,
            lease_id=message.lease_id,
            phase=from_number(LeasePhase, message.phase),
            outcome=from_number(Outcome, message.outcome),
            agent=message.agent,
            gpu_uuids=tuple(message.gpu_uuids),
            grant_time=time_of(message, "grant_time"),
            start_time=time_of(message, "start_time"),
            end_time=time_of(message, "end_time"),
            exit_code=message.exit_code if message.HasField("exit_code") else None,
            signal=message.signal or None,
            error=JobError.from_proto(message.error) if message.HasField("error") else None,
            log_bytes=message.log_bytes,
            logs_truncated_at=message.logs_truncated_at if message.HasField("logs_truncated_at") else None,
            result_json=message.result_json,
        )


@dataclass(frozen=True, slots=True)
class JobChange:
    """One change of one job, or news of its progress."""

    job_id: str
    state: JobState | None
    """Where it stands now."""
    attempt: int
    time: datetime | None
    """When the change was committed."""
    progress: Progress | None
    """Set when this is news of progress; the state is then unchanged."""
    cursor: str
    """Watch from here to see everything after this change (and perhaps some before it again)."""

    @classmethod
    def from_proto(cls, message: job_service_pb2.JobChange, cursor: str) -> JobChange:
        """Reads it from the wire; ``cursor`` is where to resume after it."""
        return cls(
            job_id=message.job_id,
            state=from_number(JobState, message.state),
            attempt=message.attempt,
            time=time_of(message, "time"),
            progress=Progress.from_proto(message.progress) if message.HasField("progress") else None,
            cursor=cursor,
        )


@dataclass(frozen=True, slots=True)
class LogChunk:
    """A piece of an attempt's log."""

    attempt: int
    offset: int
    """Of its first byte in the attempt's log, both streams together."""
    stream: LogStream
    data: bytes
    """As written; may begin or end within a line or a character."""
    time: datetime | None
    """When the agent read it."""

    @classmethod
    def from_proto(cls, message: job_service_pb2.StreamLogsResponse) -> LogChunk:
        """Reads it from the wire."""
        return cls(
            attempt=message.attempt,
            offset=message.offset,
            stream=LogStream(message.stream or 1),
            data=message.data,
            time=time_of(message, "time"),
        )


@dataclass(frozen=True, slots=True)
class Explanation:
    """One reason why a job is not running, with numbers."""

    reason: PendingReason | None
    message: str
    """One sentence, with the numbers in it."""
    remedy: str
    """The smallest change that would help; may be empty."""
    numbers: Mapping[str, int]

    @classmethod
    def from_proto(cls, message: job_service_pb2.Explanation) -> Explanation:
        """Reads it from the wire."""
        return cls(
            reason=from_number(PendingReason, message.reason),
            message=message.message,
            remedy=message.remedy,
            numbers=dict(message.numbers),
        )


@dataclass(frozen=True, slots=True)
class Explained:
    """Why a job is not running."""

    state: JobState
    explanations: tuple[Explanation, ...]
    """The deciding one first; at least one."""

    @classmethod
    def from_proto(cls, message: job_service_pb2.ExplainJobResponse) -> Explained:
        """Reads it from the wire."""
        return cls(
            state=JobState(message.state),
            explanations=tuple(Explanation.from_proto(explanation) for explanation in message.explanations),
        )


def _result(result_json: bytes) -> JsonValue:
    value: JsonValue = json.loads(result_json) if result_json else None
    return value


def _with_result(values: dict[str, JsonValue], result_json: bytes) -> dict[str, JsonValue]:
    """Puts the parsed result in place of its bytes; a result that is no JSON stays text."""
    del values["result_json"]
    try:
        values["result"] = _result(result_json)
    except ValueError:
        values["result"] = result_json.decode(errors="replace")
    return values
