"""What an end on the host means for the job: from an exit to an Ended event."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

from google.protobuf.timestamp_pb2 import Timestamp

from lessor.lifecycle import Outcome
from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import job_pb2
from lessor_agent.runtimes.base import Exit, StopCause

MAX_TYPE_BYTES = 256
MAX_MESSAGE_BYTES = 16384
MAX_TRACEBACK_BYTES = 65536
MAX_RESULT_BYTES = 262144
MAX_CURSOR_BYTES = 65536

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DAY_S = 86400


@dataclass(frozen=True, slots=True)
class WorkloadError:
    """An error as the workload itself reported it."""

    type: str
    message: str
    traceback: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class Ending:
    """All that is known of the end of an execution."""

    exit: Exit | None
    """None: nothing is left of it, not even how it ended."""
    result_json: bytes = b""
    error: WorkloadError | None = None
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    rebooted: bool = False
    """The host has booted since it was started."""


@dataclass(frozen=True, slots=True)
class _Verdict:
    outcome: Outcome
    error: job_pb2.JobError | None


_SUCCEEDED = _Verdict(Outcome.SUCCEEDED, None)


def ended(ending: Ending) -> pb.Ended:
    """Returns the event that tells the server of ``ending``."""
    message = pb.Ended()
    write_ended(message, ending, ending.stdout_bytes + ending.stderr_bytes)
    return message


def write_ended(message: pb.Ended, ending: Ending, final_log_offset: int) -> None:
    """Writes what the server is told of ``ending`` into an empty message, where it stands: nothing is copied."""
    verdict = _judge(ending)
    message.outcome = job_pb2.Outcome.ValueType(verdict.outcome)
    if final_log_offset:
        message.final_log_offset = final_log_offset
    if verdict.error is not None:
        message.error.CopyFrom(verdict.error)
    if ending.result_json and verdict.outcome is Outcome.SUCCEEDED:
        message.result_json = ending.result_json
    if (end := ending.exit) is not None:
        if end.exit_code is not None:
            message.exit_code = end.exit_code
        if end.signal:
            message.signal = end.signal
        if end.started_at is not None:
            message.start_time.CopyFrom(_timestamp(end.started_at))
        message.end_time.CopyFrom(_timestamp(end.ended_at))


def stopped_before_start(cause: StopCause) -> pb.Ended:
    """Returns the end of a lease that was stopped before anything was prepared."""
    verdict = _STOPPED.get(cause, _STOPPED[StopCause.CANCELLED])()
    return pb.Ended(outcome=job_pb2.Outcome.ValueType(verdict.outcome), error=verdict.error)


def job_error(
    error_class: job_pb2.ErrorClass.ValueType, type_: str, message: str, *, retryable: bool
) -> job_pb2.JobError:
    """Returns an error of the agent's own, cut to what the contract allows."""
    return job_pb2.JobError(
        error_class=error_class,
        type=clip(type_, MAX_TYPE_BYTES),
        message=clip(message, MAX_MESSAGE_BYTES),
        retryable=retryable,
    )


def timestamp(when: datetime) -> Timestamp:
    """Returns an aware datetime as a proto timestamp."""
    since = when - _EPOCH
    return Timestamp(seconds=since.days * _DAY_S + since.seconds, nanos=since.microseconds * 1000)


_timestamp = lru_cache(maxsize=64)(timestamp)
"""For those who only copy it. What ends together often has its times in common."""


def clip(text: str, max_bytes: int) -> str:
    """Returns ``text`` fit for the contract: no NUL, no lone surrogate, at most ``max_bytes`` of UTF-8."""
    data = text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace")
    if len(data) <= max_bytes:
        return data.decode("utf-8")
    return data[:max_bytes].decode("utf-8", "ignore")


def _judge(ending: Ending) -> _Verdict:
    end = ending.exit
    if end is None:
        return _host_rebooted() if ending.rebooted else _keeper_died()
    if end.exit_code == 0 and end.start_error is None:
        # Also when a stop was asked for: what ended well within its grace has done its work.
        return _SUCCEEDED
    if end.stop_cause is StopCause.KEEPER_DIED and ending.rebooted:
        return _host_rebooted()
    if end.stop_cause is not None:
        return _STOPPED[end.stop_cause]()
    if end.start_error is not None:
        return _failed(job_pb2.ERROR_CLASS_INVALID, "START_FAILED", end.start_error, retryable=False)
    if ending.error is not None:
        return _Verdict(Outcome.FAILED, _workload_error(ending.error))
    if end.signal:
        return _failed(
            job_pb2.ERROR_CLASS_APPLICATION, "SIGNAL", f"ended by {_signal_name(end.signal)}", retryable=True
        )
    if end.exit_code is not None:
        return _failed(job_pb2.ERROR_CLASS_APPLICATION, "EXIT_CODE", f"exit code {end.exit_code}", retryable=True)
    return _host_rebooted() if ending.rebooted else _keeper_died()


def _failed(error_class: job_pb2.ErrorClass.ValueType, type_: str, message: str, *, retryable: bool) -> _Verdict:
    return _Verdict(Outcome.FAILED, job_error(error_class, type_, message, retryable=retryable))


def _lost(type_: str, message: str) -> _Verdict:
    return _Verdict(Outcome.LOST, job_error(job_pb2.ERROR_CLASS_INFRASTRUCTURE, type_, message, retryable=True))


def _timed_out(type_: str, message: str) -> _Verdict:
    return _Verdict(Outcome.TIMED_OUT, job_error(job_pb2.ERROR_CLASS_TIMEOUT, type_, message, retryable=True))


def _keeper_died() -> _Verdict:
    return _lost("KEEPER_DIED", "the job's keeper died and how the job ended is unknown")


def _host_rebooted() -> _Verdict:
    return _lost("HOST_REBOOTED", "the host rebooted while the job ran")


_STOPPED = {
    StopCause.CANCELLED: lambda: _Verdict(Outcome.CANCELLED, None),
    StopCause.RUN_TIMEOUT: lambda: _timed_out("RUN_TIMEOUT", "the job ran longer than its run timeout"),
    StopCause.START_TIMEOUT: lambda: _timed_out("START_TIMEOUT", "the job did not start within its start timeout"),
    StopCause.LEASE_LOST: lambda: _lost("LEASE_LOST", "no renewal came in time, so the job was stopped"),
    StopCause.STALE: lambda: _lost("LEASE_LOST", "the server said that the lease was over"),
    StopCause.AGENT_STOPPED: lambda: _lost("AGENT_STOPPED", "the agent was stopped together with its jobs"),
    StopCause.KEEPER_DIED: _keeper_died,
}


def _workload_error(error: WorkloadError) -> job_pb2.JobError:
    return job_pb2.JobError(
        error_class=job_pb2.ERROR_CLASS_APPLICATION,
        type=clip(error.type, MAX_TYPE_BYTES),
        message=clip(error.message, MAX_MESSAGE_BYTES),
        traceback=clip(error.traceback, MAX_TRACEBACK_BYTES),
        retryable=error.retryable,
    )


def _signal_name(number: int) -> str:
    try:
        return f"{signal.Signals(number).name} (signal {number})"
    except ValueError:
        return f"signal {number}"
