"""Errors: one leaf per reason of the proto, messages with the value and the remedy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lessor.v1 import errors_pb2
from lessor_server.domain import errors
from lessor_server.domain.errors import LessorServerError
from lessor_server.domain.states import JobState

EXAMPLES: list[tuple[LessorServerError, list[str], dict[str, str]]] = [
    (
        errors.InvalidField([("spec.queue", "must not be 'A'"), ("spec.argv", "is empty")]),
        ["spec.queue: must not be 'A'", "spec.argv: is empty"],
        {},
    ),
    (errors.JobNotFound("j0000000000001"), ["'j0000000000001'", "list jobs"], {"job_id": "j0000000000001"}),
    (errors.QueueNotFound("train"), ["'train'", "create it"], {"queue": "train"}),
    (errors.AgentNotFound("gpu1"), ["'gpu1'"], {"agent": "gpu1"}),
    (
        errors.AttemptNotFound("j0000000000001", 4, 2),
        ["no attempt 4", "1 to 2"],
        {"job_id": "j0000000000001", "attempt": "4", "last_attempt": "2"},
    ),
    (errors.AttemptNotFound("j0000000000001", 1, 0), ["none yet"], {"last_attempt": "0"}),
    (errors.QueueExists("train"), ["'train' exists"], {"queue": "train"}),
    (
        errors.JobNotTerminal("j0000000000001", JobState.RUNNING),
        ["is RUNNING", "cancel it"],
        {"job_id": "j0000000000001", "state": "RUNNING"},
    ),
    (
        errors.RequestIdReused("r-1", "a batch of 3 jobs"),
        ["'r-1'", "a batch of 3 jobs", "use a new one"],
        {"request_id": "r-1", "used_for": "a batch of 3 jobs"},
    ),
    (
        errors.CursorExpired("c1", errors.CursorFault.TOO_OLD),
        ["'c1'", "retention", "list the jobs again"],
        {"cursor": "c1", "fault": "TOO_OLD"},
    ),
    (errors.CursorExpired("c1", errors.CursorFault.FOREIGN), ["another database"], {"fault": "FOREIGN"}),
    (
        errors.ProtocolUnsupported(9, 1, 2),
        ["version 9", "1 to 2", "upgrade the server"],
        {"version": "9", "oldest": "1", "newest": "2"},
    ),
    (errors.ProtocolUnsupported(0, 1, 2), ["upgrade the agent"], {}),
    (
        errors.AgentIdentityInUse("agent-00000001", "gpu1", 3),
        ["'agent-00000001'", "'gpu1'", "3 live leases", "state directory"],
        {"agent_id": "agent-00000001", "incumbent_host": "gpu1", "leases": "3"},
    ),
    (
        errors.ProtocolViolation("gpu1", "sent Heartbeat before Hello"),
        ["'gpu1'", "it sent Heartbeat before Hello"],
        {"agent": "gpu1", "violation": "sent Heartbeat before Hello"},
    ),
    (errors.ProtocolViolation("", "sent nothing"), ["an agent broke"], {}),
    (
        errors.DatabaseUnavailable("connection refused"),
        ["connection refused", "same request_id"],
        {"cause": "connection refused"},
    ),
    (errors.Contended("j0000000000001", 5), ["5 times", "try again"], {"job_id": "j0000000000001", "tries": "5"}),
    (errors.Stopping(), ["stopping", "try again"], {}),
    (
        errors.TooLarge("specs[3]", 5_000_000, 1_000_000),
        ["specs[3]", "5000000", "1000000", "smaller"],
        {"what": "specs[3]", "size_bytes": "5000000", "limit_bytes": "1000000"},
    ),
]


AT_START_ONLY: set[type[LessorServerError]] = {errors.SchemaMismatch}
"""They keep a server from starting, so no RPC ever answers with them."""


def _leaves(base: type[LessorServerError]) -> Iterator[type[LessorServerError]]:
    children = base.__subclasses__()
    if not children:
        yield base
    for child in children:
        yield from _leaves(child)


def test_leaves_and_reasons_of_the_proto_are_the_same() -> None:
    proto = {name.removeprefix("ERROR_REASON_") for name in errors_pb2.ErrorReason.DESCRIPTOR.values_by_name} - {
        "UNSPECIFIED"
    }
    answered = set(_leaves(LessorServerError)) - AT_START_ONLY
    assert sorted(leaf.reason for leaf in answered) == sorted(proto)
    assert {type(error) for error, _, _ in EXAMPLES} == answered
    assert not {leaf.reason for leaf in AT_START_ONLY} & proto


@pytest.mark.parametrize(("error", "parts", "details"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_messages_and_details(error: LessorServerError, parts: list[str], details: dict[str, str]) -> None:
    assert str(error) == error.message
    for part in parts:
        assert part in error.message
    assert details.items() <= error.details.items()


def test_the_tree_in_the_module_names_every_class() -> None:
    assert errors.__doc__ is not None
    tree = errors.__doc__.split("Each leaf")[0]
    names = {
        word for word in tree.replace("├──", " ").replace("└──", " ").replace("│", " ").split() if word[0].isupper()
    }
    classes = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, LessorServerError)
    }
    assert classes <= names


def test_only_what_may_pass_is_tried_again() -> None:
    for error, _, _ in EXAMPLES:
        assert (error.retry_delay is not None) == isinstance(error, errors.Unavailable)


def test_a_hostile_value_cannot_fill_or_forge_a_message() -> None:
    error = errors.QueueNotFound("a\nlevel=info " + "x" * 1_000_000)
    assert len(error.message) < 400
    assert "\n" not in error.message
    assert len(error.details["queue"]) <= 128


def test_invalid_field_needs_a_violation() -> None:
    with pytest.raises(ValueError, match="at least one"):
        errors.InvalidField([])
