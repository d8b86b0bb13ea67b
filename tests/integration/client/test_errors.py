"""The exception tree, and the way from a reason of the server to it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lessor
from lessor import errors
from lessor.lifecycle import LeasePhase, Outcome
from lessor.sdk import enums
from lessor.sdk.selectors import SelectorOperator
from lessor.v1 import fleet_service_pb2, job_pb2, job_service_pb2
from tests.support.fake_services import FakeServer, Fault, all_reasons


def test_each_reason_of_the_contract_has_an_exception() -> None:
    assert sorted(errors.BY_REASON) == sorted(all_reasons())
    assert all(issubclass(kind, errors.LessorError) for kind in errors.BY_REASON.values())


@pytest.mark.parametrize("reason", all_reasons())
@pytest.mark.usefixtures("one_try")
def test_a_reason_arrives_as_its_exception(client: lessor.Client, server: FakeServer, reason: str) -> None:
    server.faults.append(Fault("GetJob", reason))
    with pytest.raises(errors.BY_REASON[reason]) as error:
        client.get("j1")
    assert type(error.value) is errors.BY_REASON[reason]
    assert f"a {reason} for this test" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_names_of_the_package() -> None:
    exceptions = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.LessorError)
    }
    assert exceptions <= set(errors.__all__)
    assert set(lessor.__all__) == exceptions | {
        "NO_LIMIT",
        "Agent",
        "AgentState",
        "AsyncClient",
        "Attempt",
        "CancelResult",
        "Client",
        "ErrorClass",
        "Explained",
        "Explanation",
        "Gpu",
        "Job",
        "JobChange",
        "JobError",
        "JobFields",
        "JobSpec",
        "JobState",
        "LabelSelector",
        "Lease",
        "LeasePhase",
        "LogChunk",
        "LogStream",
        "Outcome",
        "PendingReason",
        "Progress",
        "Queue",
        "SelectorOperator",
        "Submission",
        "__version__",
    }
    for name in lessor.__all__:
        assert getattr(lessor, name) is not None
    with pytest.raises(AttributeError, match="nothing_such"):
        lessor.nothing_such  # noqa: B018


def test_the_tree_at_the_top_of_the_module_is_complete() -> None:
    tree = errors.__doc__ or ""
    for name in errors.__all__:
        if name not in ("BY_REASON", "REMEDIES"):
            assert name in tree


def test_importing_the_package_loads_neither_grpc_nor_protobuf() -> None:
    code = "import sys, lessor, lessor.errors; sys.exit(any(m in sys.modules for m in ('grpc', 'google.protobuf')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("enum", "proto", "prefix"),
    [
        (enums.JobState, job_pb2.JobState, "JOB_STATE_"),
        (LeasePhase, job_pb2.LeasePhase, "LEASE_PHASE_"),
        (Outcome, job_pb2.Outcome, "OUTCOME_"),
        (enums.ErrorClass, job_pb2.ErrorClass, "ERROR_CLASS_"),
        (enums.LogStream, job_pb2.LogStream, "LOG_STREAM_"),
        (SelectorOperator, job_pb2.SelectorOperator, "SELECTOR_OPERATOR_"),
        (enums.PendingReason, job_service_pb2.PendingReason, "PENDING_REASON_"),
        (enums.CancelResult, job_service_pb2.CancelResult, "CANCEL_RESULT_"),
        (enums.AgentState, fleet_service_pb2.AgentState, "AGENT_STATE_"),
    ],
)
def test_the_enumerations_are_those_of_the_contract(enum, proto, prefix) -> None:  # type: ignore[no-untyped-def]
    wire = {name.removeprefix(prefix): number for name, number in proto.items() if number}
    assert {member.name: member.value for member in enum} == wire


def test_a_number_of_a_newer_server_is_taken() -> None:
    assert enums.word(enums.PendingReason(999)) == "unknown_999"
    assert not enums.JobState(99).is_terminal
    assert enums.from_number(enums.JobState, 0) is None
    assert enums.from_number(Outcome, 999) is None
