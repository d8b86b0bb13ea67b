"""The rules of the contract, checked for every message that comes in.

The rules stand in the proto files as protovalidate annotations, so every
language sees the same ones. One more applies to all text: PostgreSQL and the
operating system's interfaces cannot hold a NUL character. (Invalid UTF-8 is
refused earlier, when the message is parsed.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import protovalidate
from google.protobuf.message import Message

from lessor.v1 import job_pb2, job_service_pb2
from lessor_server.domain.errors import InvalidField
from lessor_server.rpc.handlers import Around, Rpc
from lessor_server.rpc.rules import broken_rules, keeps_rules, predicate_of
from lessor_server.rpc.texts import nul_paths

MAX_SPECS = 10_000
"""As ``SubmitJobsRequest.specs`` says; a test holds the two together."""

_SPECS_PER_SLICE = 250
"""Checking a spec takes 5 µs, or 30 µs where it must be looked at thoroughly; between slices others get their turn."""

_OURS = "/lessor.v1."
_SHOWN_CHARS = 100


def check(message: Message) -> None:
    """Checks one message.

    Raises:
        InvalidField: It breaks rules; all of them are named.
    """
    if not keeps_rules(message):
        _check_thoroughly(message)


def _check_thoroughly(message: Message) -> None:
    violations = list(_violations(message))
    # Looking for the byte first makes the walk through all texts rare.
    if b"\0" in message.SerializeToString():
        violations += [(path, "must not contain a NUL character") for path in nul_paths(message)]
    if violations:
        raise InvalidField(violations)


def _violations(message: Message) -> Iterator[tuple[str, str]]:
    for violation in broken_rules(message):
        path = _path(violation)
        yield path, f"{violation.proto.message}{_shown(violation, path)}"


def _path(violation: protovalidate.Violation) -> str:
    """Returns a path like ``spec.command.env["LD_PRELOAD"]`` or ``specs[3].name``."""
    parts: list[str] = []
    field = violation.proto.field
    for element in field.elements if field is not None else ():
        part = element.field_name
        subscript = element.subscript
        if subscript is not None:
            part += f'["{subscript.value}"]' if isinstance(subscript.value, str) else f"[{subscript.value}]"
        parts.append(part)
    return ".".join(parts)


def _shown(violation: protovalidate.Violation, path: str) -> str:
    """Returns the offending value as the end of a sentence; environment values may be secret and are not shown."""
    value = violation.field_value
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return ""
    if ".env[" in f".{path}" and not violation.proto.for_key:
        return ""
    text = repr(value)
    if len(text) > _SHOWN_CHARS:
        text = text[: _SHOWN_CHARS - 1] + "…"
    return f", got {text}"


async def check_specs(request: job_service_pb2.SubmitJobsRequest) -> None:
    """Checks a batch in slices, so that a large one does not hold up heartbeats.

    Raises:
        InvalidField: It breaks rules; those of the first slice that does are named.
    """
    count = len(request.specs)
    if count > MAX_SPECS:
        raise InvalidField([("specs", f"must contain no more than {MAX_SPECS} item(s), got {count}")])
    keeps_spec_rules = predicate_of(job_pb2.JobSpec.DESCRIPTOR)
    # Of the request itself the first slice tells; where it is valid, one spec does.
    check_first = not keeps_rules(
        job_service_pb2.SubmitJobsRequest(request_id=request.request_id, specs=request.specs[:1])
    )
    for start in range(0, max(count, 1), _SPECS_PER_SLICE):
        if start:
            await asyncio.sleep(0)
        specs = request.specs[start : start + _SPECS_PER_SLICE]
        if all(map(keeps_spec_rules, specs)) and not (check_first and start == 0):
            continue
        try:
            _check_thoroughly(job_service_pb2.SubmitJobsRequest(request_id=request.request_id, specs=specs))
        except InvalidField as error:
            raise InvalidField([(_moved(field, start), text) for field, text in error.violations]) from None


def _moved(path: str, start: int) -> str:
    """Returns the path in the whole batch of a path in the slice that begins at ``start``."""
    if not path.startswith("specs["):
        return path
    index, bracket, rest = path.removeprefix("specs[").partition("]")
    return f"specs[{int(index) + start}{bracket}{rest}"


class CheckRequests(Around):
    """Checks every message of this contract that comes in, those of streams included.

    For agents' streams that costs 2 µs a heartbeat and a log chunk, against
    80–100 µs that reading a message takes.
    """

    checks_requests = True

    async def request(self, message: Any, rpc: Rpc) -> None:
        """Checks one message.

        Raises:
            InvalidField: It breaks rules.
        """
        if isinstance(message, job_service_pb2.SubmitJobsRequest):
            await check_specs(message)
        elif rpc.method.startswith(_OURS):
            check(message)
