"""Times and durations between Python and protobuf, and plain JSON values of the SDK's types."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any, Protocol, TypeAlias, runtime_checkable

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from lessor.sdk.checks import refuse
from lessor.sdk.enums import word

JsonValue: TypeAlias = bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"] | None


@runtime_checkable
class ToDict(Protocol):
    """A type with its own JSON form."""

    def to_dict(self) -> dict[str, JsonValue]:
        """Returns it as plain JSON values."""


def time_of(message: Message, field: str) -> datetime | None:
    """Returns the Timestamp ``field`` of ``message`` as an aware datetime (UTC); None when absent."""
    if not message.HasField(field):
        return None
    stamp: Timestamp = getattr(message, field)
    return stamp.ToDatetime(tzinfo=UTC)


def duration_of(message: Message, field: str) -> timedelta | None:
    """Returns the Duration ``field`` of ``message``; None when absent."""
    if not message.HasField(field):
        return None
    duration: Duration = getattr(message, field)
    return duration.ToTimedelta()


def duration_message(duration: timedelta | None) -> Duration | None:
    """Returns ``duration`` for the wire; None stays None."""
    if duration is None:
        return None
    message = Duration()
    message.FromTimedelta(duration)
    return message


def time_message(time: datetime | None, *, field: str) -> Timestamp | None:
    """Returns ``time`` for the wire; a naive one is taken as local time. None stays None.

    Raises:
        InvalidArgument: In UTC it is before the year 1 or after the year 9999; names ``field``.
    """
    if time is None:
        return None
    message = Timestamp()
    try:
        message.FromDatetime(time.astimezone(UTC))
    except (OverflowError, ValueError):
        raise refuse(field, time.isoformat(), "is outside of the years 1 to 9999 in UTC") from None
    return message


def plain(value: Any) -> JsonValue:
    """Returns a value of the SDK as plain JSON values.

    Enumerations are lower-case words, times RFC 3339 in UTC, durations seconds,
    bytes text where they are UTF-8 and ``{"base64": …}`` where they are not.
    Keys are the names of the dataclasses' fields, always all of them.
    """
    match value:
        case ToDict():
            return value.to_dict()
        case Enum():
            return word(value)
        case None | bool() | int() | float() | str():
            return value
        case datetime():
            return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
        case timedelta():
            return value.total_seconds()
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError:
                return {"base64": b64encode(value).decode()}
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case _ if is_dataclass(value):
            return plain_fields(value)
        case _:
            raise TypeError(f"{value!r} has no JSON form")


def plain_fields(value: Any) -> dict[str, JsonValue]:
    """Returns the fields of the dataclass instance ``value`` as plain JSON values."""
    return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
