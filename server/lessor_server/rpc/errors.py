"""From the server's exceptions to gRPC statuses: one table, and what applies it to every RPC."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from grpc_status import rpc_status

from lessor_server.domain import errors
from lessor_server.rpc.handlers import Around, Call, Context, Rpc, Stream

_log = logging.getLogger(__name__)

DOMAIN = "lessor"

STATUS_CODES: dict[type[errors.LessorServerError], grpc.StatusCode] = {
    errors.InvalidField: grpc.StatusCode.INVALID_ARGUMENT,
    errors.JobNotFound: grpc.StatusCode.NOT_FOUND,
    errors.QueueNotFound: grpc.StatusCode.NOT_FOUND,
    errors.AgentNotFound: grpc.StatusCode.NOT_FOUND,
    errors.AttemptNotFound: grpc.StatusCode.NOT_FOUND,
    errors.QueueExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.JobNotTerminal: grpc.StatusCode.FAILED_PRECONDITION,
    errors.RequestIdReused: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ProtocolUnsupported: grpc.StatusCode.FAILED_PRECONDITION,
    errors.AgentIdentityInUse: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ProtocolViolation: grpc.StatusCode.FAILED_PRECONDITION,
    errors.CursorExpired: grpc.StatusCode.OUT_OF_RANGE,
    errors.DatabaseUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.Contended: grpc.StatusCode.UNAVAILABLE,
    errors.Stopping: grpc.StatusCode.UNAVAILABLE,
    errors.TooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
"""Every error an RPC answers with, and its status code."""

# Statuses travel in HTTP/2 headers, of which a peer takes 8 KiB. A message is
# percent-encoded (three bytes for one that is not ASCII), the details base64.
_MAX_MESSAGE_BYTES = 800
_MAX_DETAILS_BYTES = 3000
_MAX_DESCRIPTION_CHARS = 400


def to_status(error: errors.LessorServerError) -> status_pb2.Status:
    """Returns the google.rpc.Status of an error: code, message, ErrorInfo, and what its kind adds.

    Raises:
        KeyError: No RPC answers with this error.
    """
    status = status_pb2.Status(code=STATUS_CODES[type(error)].value[0], message=_cut(error.message, _MAX_MESSAGE_BYTES))
    _add(status, error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.details))
    if error.retry_delay is not None:
        delay = Duration()
        delay.FromTimedelta(error.retry_delay)
        _add(status, error_details_pb2.RetryInfo(retry_delay=delay))
    if isinstance(error, errors.InvalidField):
        _add(status, _bad_request(error, _MAX_DETAILS_BYTES - status.ByteSize()))
    elif STATUS_CODES[type(error)] is grpc.StatusCode.FAILED_PRECONDITION:
        violation = error_details_pb2.PreconditionFailure.Violation(
            type=error.reason, subject=next(iter(error.details.values()), ""), description=status.message
        )
        _add(status, error_details_pb2.PreconditionFailure(violations=[violation]))
    return status


def _bad_request(error: errors.InvalidField, room_bytes: int) -> error_details_pb2.BadRequest:
    """Returns the violations, as many as there is room for; the first one always."""
    result = error_details_pb2.BadRequest()
    for violation in error.violations:
        added = result.field_violations.add(
            field=violation.field[:_MAX_DESCRIPTION_CHARS], description=violation.description[:_MAX_DESCRIPTION_CHARS]
        )
        room_bytes -= added.ByteSize() + 2
        if room_bytes < 0 and len(result.field_violations) > 1:
            result.field_violations.pop()
            break
    return result


def _add(status: status_pb2.Status, detail: Message) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)


def _cut(text: str, limit_bytes: int) -> str:
    """Returns ``text`` as one line of at most ``limit_bytes``."""
    line = " ".join(text.split())
    encoded = line.encode("utf-8", "replace")
    return line if len(encoded) <= limit_bytes else encoded[: limit_bytes - 3].decode("utf-8", "ignore") + "…"


async def abort(context: Context, error: Exception) -> NoReturn:
    """Ends the RPC with the status of ``error``.

    What is not an error of ours is logged with its traceback; the caller is told
    a reference to it and nothing of what it was.
    """
    if isinstance(error, errors.LessorServerError) and type(error) in STATUS_CODES:
        status = rpc_status.to_status(to_status(error))
        await context.abort(status.code, status.details, tuple(status.trailing_metadata))
    reference = secrets.token_hex(4)
    _log.error("an RPC failed", exc_info=error, extra={"event": "rpc_failed", "reference": reference})
    await context.abort(
        grpc.StatusCode.INTERNAL, f"internal error {reference}: the server's log has it under this reference"
    )
    raise AssertionError("abort returned")


class MapErrors(Around):
    """Maps what an RPC raises to a status. The outermost thing around every RPC."""

    async def answer(self, call: Call, context: Context, rpc: Rpc) -> Any:
        """Runs a call."""
        try:
            return await call()
        except (aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as error:
            await abort(context, error)

    async def stream(self, call: Stream, context: Context, rpc: Rpc) -> AsyncGenerator[Any, None]:
        """Runs a stream."""
        try:
            async with aclosing(call()) as answers:
                async for answer in answers:
                    yield answer
        except (aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as error:
            await abort(context, error)
