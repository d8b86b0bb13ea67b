"""What an exit means for the job."""

from __future__ import annotations

import pytest

from lessor.lifecycle import Outcome
from lessor.v1 import job_pb2
from lessor_agent.protocol.outcomes import Ending, WorkloadError, clip, ended, stopped_before_start
from lessor_agent.runtimes.base import Exit, StopCause
from tests.support.agent_core import an_exit

pytestmark = pytest.mark.unit

APPLICATION = job_pb2.ERROR_CLASS_APPLICATION
INFRASTRUCTURE = job_pb2.ERROR_CLASS_INFRASTRUCTURE
TIMEOUT = job_pb2.ERROR_CLASS_TIMEOUT
INVALID = job_pb2.ERROR_CLASS_INVALID


@pytest.mark.parametrize(
    ("exit", "outcome", "error_class", "type_"),
    [
        (an_exit(0), Outcome.SUCCEEDED, 0, ""),
        (an_exit(0, cause=StopCause.CANCELLED), Outcome.SUCCEEDED, 0, ""),
        (an_exit(0, cause=StopCause.RUN_TIMEOUT), Outcome.SUCCEEDED, 0, ""),
        (an_exit(3), Outcome.FAILED, APPLICATION, "EXIT_CODE"),
        (an_exit(None, signal=11), Outcome.FAILED, APPLICATION, "SIGNAL"),
        (an_exit(None, start_error="no such program: x"), Outcome.FAILED, INVALID, "START_FAILED"),
        (an_exit(0, start_error="no such program: x"), Outcome.FAILED, INVALID, "START_FAILED"),
        (an_exit(None, signal=15, cause=StopCause.CANCELLED), Outcome.CANCELLED, 0, ""),
        (an_exit(143, cause=StopCause.CANCELLED), Outcome.CANCELLED, 0, ""),
        (an_exit(None, signal=9, cause=StopCause.RUN_TIMEOUT), Outcome.TIMED_OUT, TIMEOUT, "RUN_TIMEOUT"),
        (an_exit(None, cause=StopCause.START_TIMEOUT), Outcome.TIMED_OUT, TIMEOUT, "START_TIMEOUT"),
        (an_exit(None, signal=9, cause=StopCause.LEASE_LOST), Outcome.LOST, INFRASTRUCTURE, "LEASE_LOST"),
        (an_exit(None, signal=9, cause=StopCause.KEEPER_DIED), Outcome.LOST, INFRASTRUCTURE, "KEEPER_DIED"),
        (an_exit(None, signal=9, cause=StopCause.STALE), Outcome.LOST, INFRASTRUCTURE, "LEASE_LOST"),
        (an_exit(None), Outcome.LOST, INFRASTRUCTURE, "KEEPER_DIED"),
        (None, Outcome.LOST, INFRASTRUCTURE, "KEEPER_DIED"),
    ],
)
def test_the_table(exit: Exit | None, outcome: Outcome, error_class: int, type_: str) -> None:
    message = ended(Ending(exit))
    assert Outcome(message.outcome) is outcome
    assert int(message.error.error_class) == error_class
    assert message.error.type == type_
    assert message.HasField("error") is bool(type_)


@pytest.mark.parametrize("exit", [None, an_exit(None, signal=9, cause=StopCause.KEEPER_DIED), an_exit(None)])
def test_what_a_reboot_ended_is_lost_to_the_reboot(exit: Exit | None) -> None:
    assert ended(Ending(exit, rebooted=True)).error.type == "HOST_REBOOTED"


def test_work_that_finished_before_the_reboot_is_finished() -> None:
    assert Outcome(ended(Ending(an_exit(0), rebooted=True)).outcome) is Outcome.SUCCEEDED


def test_every_stop_cause_has_an_outcome_before_the_start() -> None:
    assert all(stopped_before_start(cause).outcome for cause in StopCause)


def test_the_workloads_own_error_is_told() -> None:
    error = WorkloadError("ValueError", "bad \0 input", "Traceback …", retryable=False)
    told = ended(Ending(an_exit(1), error=error)).error
    assert (told.type, told.traceback, told.retryable) == ("ValueError", "Traceback …", False)
    assert "\0" not in told.message


def test_an_error_of_a_workload_that_succeeded_is_not_told() -> None:
    error = WorkloadError("Warning", "handled", "", retryable=True)
    assert not ended(Ending(an_exit(0), error=error)).HasField("error")


def test_a_program_that_is_not_there_is_not_tried_again() -> None:
    assert not ended(Ending(an_exit(None, start_error="no such program"))).error.retryable


def test_only_a_success_carries_a_result() -> None:
    assert ended(Ending(an_exit(0), result_json=b"1")).result_json == b"1"
    assert ended(Ending(an_exit(1), result_json=b"1")).result_json == b""


def test_exit_code_signal_times_and_log_length_are_told() -> None:
    message = ended(Ending(an_exit(3), stdout_bytes=10, stderr_bytes=5))
    assert (message.exit_code, message.signal, message.final_log_offset) == (3, 0, 15)
    assert message.HasField("start_time")
    assert message.HasField("end_time")
    assert not ended(Ending(an_exit(None, signal=9))).HasField("exit_code")


def test_clip_keeps_text_valid() -> None:
    assert clip("é" * 10, 5) == "éé"
    assert clip("a\ud800b", 10) == "a?b"
    assert clip("a\0b", 10) == "a\N{REPLACEMENT CHARACTER}b"
