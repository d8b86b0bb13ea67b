"""From a gRPC status to an exception of :mod:`lessor.errors`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import timedelta
from typing import cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from lessor.errors import (
    BY_REASON,
    REMEDIES,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    LessorError,
    NotFound,
    RequestTimeout,
    ServerError,
    ServerUnreachable,
    TooLarge,
)
from lessor.units import format_bytes

DOMAIN = "lessor"
"""Of the ErrorInfo whose reasons are ours."""

_DETAILS_KEY = "grpc-status-details-bin"

_BY_CODE: dict[grpc.StatusCode, type[LessorError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: TooLarge,
    grpc.StatusCode.UNAVAILABLE: ServerUnreachable,
    grpc.StatusCode.CANCELLED: ServerUnreachable,
    grpc.StatusCode.DEADLINE_EXCEEDED: RequestTimeout,
}
"""For a status without a reason of ours: gRPC itself made it, or a proxy did."""


def error_from(error: aio.AioRpcError, address: str) -> LessorError:
    """Returns the exception for a failed call to the server at ``address``."""
    status = _status(error)
    violations: dict[str, str] = {}
    for detail in status.details:
        bad_request = error_details_pb2.BadRequest()
        if detail.Unpack(bad_request):
            for violation in bad_request.field_violations:
                violations.setdefault(violation.field, violation.description)
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN and info.reason in BY_REASON:
            return _make(BY_REASON[info.reason], error, violations, dict(info.metadata))
    kind = _BY_CODE.get(error.code())
    if kind is TooLarge and (sizes := _OVER_LIMIT.search(error.details() or "")):
        return _over_limit(answer=sizes[1] == "CLIENT", size=int(sizes[2]), limit=int(sizes[3]))
    if kind is ServerUnreachable:
        return unreachable(address, _cause(error))
    if kind is RequestTimeout:
        return RequestTimeout(
            f"the server at {address} did not answer in time", remedy="what was asked may or may not have been done"
        )
    if kind is None:
        code = error.code()
        detail_text = error.details() or "no details"
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return ServerError(
                f"{address} does not know this call: {detail_text}",
                remedy="is it a Lessor server, and as new as this client?",
            )
        return ServerError(
            f"the server at {address} failed with {code.name}: {detail_text}", remedy="look at the server's log"
        )
    return _make(kind, error, violations, {})


_OVER_LIMIT = re.compile(r"(CLIENT|SERVER)?:? ?Received message larger than max \((\d+) vs\. (\d+)\)")
"""How gRPC words that a message is over the receiver's limit: who received it, its bytes, the limit in bytes."""


def _over_limit(*, answer: bool, size: int, limit: int) -> TooLarge:
    if answer:
        return TooLarge(
            f"the server's answer has {size} bytes, more than the limit of {limit} ({format_bytes(limit)}) here",
            remedy="ask for fewer things at once",
        )
    return TooLarge(
        f"the request has {size} bytes, more than the server's limit of {limit} ({format_bytes(limit)})",
        remedy="pass large inputs as files that the job reads, and submit many jobs in smaller parts",
    )


def unreachable(address: str, cause: str) -> ServerUnreachable:
    """Returns the error for a server of which nothing was heard."""
    return ServerUnreachable(
        f"no server answers at {address}: {cause}", remedy="is the server running? set LESSOR_ADDRESS or --address"
    )


def retry_delay(error: aio.AioRpcError) -> timedelta | None:
    """Returns how long the server asks to wait before a retry (RetryInfo); None: it does not say."""
    for detail in _status(error).details:
        info = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            delay: timedelta = info.retry_delay.ToTimedelta()
            return delay
    return None


def _make(
    kind: type[LessorError], error: aio.AioRpcError, violations: dict[str, str], metadata: dict[str, str]
) -> LessorError:
    message = error.details() or kind.__name__
    if issubclass(kind, InvalidArgument):
        return kind("" if violations else message, violations=violations, metadata=metadata)
    return kind(message, remedy=REMEDIES.get(kind, ""), metadata=metadata)


def _status(error: aio.AioRpcError) -> status_pb2.Status:
    status = status_pb2.Status()
    metadata = cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ())
    for key, value in metadata:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                status.ParseFromString(value)
            except DecodeError:
                status.Clear()
    return status


def _cause(error: aio.AioRpcError) -> str:
    """Returns the part of gRPC's text that tells people something."""
    text = error.details() or "no details"
    if error.code() is grpc.StatusCode.CANCELLED:
        return "it stopped while it was asked"
    for known in ("Connection refused", "DNS resolution failed", "Connection reset", "Socket closed", "GOAWAY"):
        if known.lower() in text.lower():
            return known.lower() if known not in ("GOAWAY", "DNS resolution failed") else _NAMES[known]
    return text


_NAMES = {"GOAWAY": "the connection was closed", "DNS resolution failed": "its name cannot be resolved"}
