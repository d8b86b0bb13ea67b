"""Checks of values before they go into a message.

What protobuf itself would refuse ends here as an
:class:`~lessor.errors.InvalidArgument` that names the field and shows the value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lessor.errors import InvalidArgument

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1

_SHOWN = 100
"""Characters of a wrong value that a message shows."""


def refuse(key: str, value: object, why: str, remedy: str = "") -> InvalidArgument:
    """Returns the error for the ``value`` of the field ``key``, of which a long one is shown in part."""
    shown = repr(value)
    if len(shown) > _SHOWN:
        shown = shown[: _SHOWN - 3] + "..."
    return InvalidArgument(violations={key: f"{shown} {why}"}, remedy=remedy)


def check_text(key: str, value: object) -> None:
    """Checks that ``value`` is a text that the wire and the database can hold.

    Raises:
        InvalidArgument: It is no text, is not valid Unicode or has a NUL character.
    """
    if not isinstance(value, str):
        raise refuse(key, value, f"is a {type(value).__name__}; give a text")
    if "\0" in value:
        raise refuse(key, value, "contains a NUL character, which cannot be stored")
    try:
        value.encode()
    except UnicodeEncodeError:
        # Python stands a lone surrogate for a byte of the command line that is not UTF-8.
        raise refuse(key, value, "is not valid Unicode (a lone surrogate)") from None


def check_integer(low: int, high: int) -> Callable[[str, object], None]:
    """Returns the check of a field that takes whole numbers from ``low`` to ``high``, both included."""

    def check(key: str, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise refuse(key, value, f"is a {type(value).__name__}; give a whole number")
        if value < low:
            raise refuse(key, value, "is negative; give 0 or more" if low == 0 else f"is less than {low}")
        if value > high:
            raise refuse(key, value, f"is more than {high}")

    return check


def check_mapping(key: str, value: object) -> None:
    """Checks that ``value`` maps texts to texts.

    Raises:
        InvalidArgument: It does not; names the entry as ``key.name``.
    """
    if not isinstance(value, Mapping):
        raise refuse(key, value, f"is a {type(value).__name__}; give names and values")
    for name, text in value.items():
        check_text(key, name)
        if not isinstance(text, str):
            raise refuse(f"{key}.{name}", text, f"is a {type(text).__name__}; give a text (in quotes)")
        check_text(f"{key}.{name}", text)


_check_int32 = check_integer(0, INT32_MAX)
_check_int64 = check_integer(0, INT64_MAX)


def text(key: str, value: str) -> str:
    """Returns ``value`` once it is checked as a text; see :func:`check_text`."""
    check_text(key, value)
    return value


def texts(key: str, values: Mapping[str, str] | None) -> Mapping[str, str]:
    """Returns ``values`` (name → text; None: none) once they are checked; see :func:`check_mapping`."""
    if values is None:
        return {}
    check_mapping(key, values)
    return values


def int32(key: str, value: int) -> int:
    """Returns ``value`` once it is checked as a number from 0 to 2³¹ - 1.

    Raises:
        InvalidArgument: It is not one.
    """
    _check_int32(key, value)
    return value


def int64(key: str, value: int) -> int:
    """Returns ``value`` once it is checked as a number from 0 to 2⁶³ - 1.

    Raises:
        InvalidArgument: It is not one.
    """
    _check_int64(key, value)
    return value
