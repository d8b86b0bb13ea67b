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
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from lessor.v1 import job_service_pb2
from lessor_server.domain.errors import InvalidField
from lessor_server.rpc.handlers import Around, Rpc

MAX_SPECS = 10_000
"""As ``SubmitJobsRequest.specs`` says; a test holds the two together."""

_SPECS_PER_SLICE = 250
"""Checking a spec takes some 30 µs; between slices others get their turn."""

_OURS = "/lessor.v1."
_SHOWN_CHARS = 100


def check(message: Message) -> None:
    """Checks one message.

    Raises:
        InvalidField: It breaks rules; all of them are named.
    """
    violations = list(_violations(message))
    # Looking for the byte first makes the walk through all fields rare.
    if b"\0" in message.SerializeToString():
        violations += _nul_violations(message, "")
    if violations:
        raise InvalidField(violations)


def _violations(message: Message) -> Iterator[tuple[str, str]]:
    for violation in protovalidate.collect_violations(message):
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


def _nul_violations(message: Message, path: str) -> Iterator[tuple[str, str]]:
    for field, value in message.ListFields():
        if field.type not in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_MESSAGE):
            continue
        here = f"{path}.{field.name}" if path else field.name
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            for key, item in value.items():
                yield from _nul_in(key, f'{here}["{_escaped(key)}"]')
                yield from _nul_in(item, f'{here}["{_escaped(key)}"]')
        elif isinstance(value, (str, Message)):
            yield from _nul_in(value, here)
        else:
            for index, item in enumerate(value):
                yield from _nul_in(item, f"{here}[{index}]")


def _escaped(key: object) -> str:
    return str(key).replace("\0", "\\0")


def _nul_in(value: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Message):
        yield from _nul_violations(value, path)
    elif isinstance(value, str) and "\0" in value:
        yield path, "must not contain a NUL character"


async def check_specs(request: job_service_pb2.SubmitJobsRequest) -> None:
    """Checks a batch in slices, so that a large one does not hold up heartbeats.

    Raises:
        InvalidField: It breaks rules; those of the first slice that does are named.
    """
    count = len(request.specs)
    if count > MAX_SPECS:
        raise InvalidField([("specs", f"must contain no more than {MAX_SPECS} item(s), got {count}")])
    if count <= _SPECS_PER_SLICE:
        check(request)
        return
    for start in range(0, count, _SPECS_PER_SLICE):
        part = job_service_pb2.SubmitJobsRequest(
            request_id=request.request_id, specs=request.specs[start : start + _SPECS_PER_SLICE]
        )
        try:
            check(part)
        except InvalidField as error:
            raise InvalidField([(_moved(field, start), text) for field, text in error.violations]) from None
        await asyncio.sleep(0)


def _moved(path: str, start: int) -> str:
    """Returns the path in the whole batch of a path in the slice that begins at ``start``."""
    if not path.startswith("specs["):
        return path
    index, bracket, rest = path.removeprefix("specs[").partition("]")
    return f"specs[{int(index) + start}{bracket}{rest}"


class CheckRequests(Around):
    """Checks every message of this contract that comes in, those of streams included.

    For agents' streams that costs 7 µs a heartbeat and 10 µs a log chunk of
    256 KiB, against 80–100 µs that reading a message takes.
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
