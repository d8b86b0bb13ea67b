"""Quantities as people write them: CPUs, bytes, durations, label selectors.

Each ``parse_x`` has a ``format_x`` that is exact: what it writes is read back
as the same value. Every error is an
:class:`~lessor.errors.InvalidArgument` that names the field, the value and what
to write instead.

=========  ==================================  ===========================================================
quantity   examples                            rules
=========  ==================================  ===========================================================
CPUs       ``2``, ``"0.25"``, ``"500m"``       cores, or thousandths with ``m``; nothing finer than 1 m
bytes      ``123``, ``"512M"``, ``"4GiB"``     ``k M G T P`` are powers of 1000, ``Ki Mi Gi Ti Pi`` of
                                               1024; a final ``B`` changes nothing; case matters (``m``
                                               would be milli), but ``K`` is also taken for ``k``
durations  ``90``, ``"90s"``, ``"1h30m"``      ``d h m s ms us``, biggest first; a bare number is seconds
selectors  ``"gpu"``, ``"!gpu"``, ``"z=a"``,   the label is there, is not, has the value, has another or
           ``"z!=a"``, ``"z in (a,b)"``,       none, has one of the values, has none of them
           ``"z notin (a,b)"``
=========  ==================================  ===========================================================
"""

from __future__ import annotations

import re
from datetime import timedelta
from decimal import Decimal, InvalidOperation

from lessor.errors import InvalidArgument
from lessor.sdk.selectors import LabelSelector, SelectorOperator

_NUMBER = r"\d{1,30}(?:\.\d{1,30})?"
_CPU = re.compile(rf"({_NUMBER})(m?)")
_BYTES = re.compile(rf"({_NUMBER})\s?([A-Za-z]*)")
_DURATION_PART = re.compile(rf"({_NUMBER})([a-z]+)")
_KEY = r"[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?"
_SELECTOR_SET = re.compile(rf"({_KEY})\s+(in|notin)\s*\(([^()]*)\)")
_SELECTOR_VALUE = re.compile(rf"({_KEY})\s*(!?=)\s*([^=()\s,](?:[^()]*\S)?|)")
_SELECTOR_KEY = re.compile(rf"(!?)\s*({_KEY})")

_BYTE_UNITS = {
    "": 1,
    "k": 10**3,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "P": 10**15,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
    "Pi": 2**50,
}
_DURATION_UNITS_US = {
    "d": 86_400_000_000,
    "h": 3_600_000_000,
    "m": 60_000_000,
    "s": 1_000_000,
    "ms": 1_000,
    "us": 1,
}
_MAX_BYTES = 2**63 - 1

_CPU_REMEDY = 'write cores like 2 or "0.25", or thousandths like "500m"'
_BYTES_REMEDY = 'write bytes like 1048576, "512M" or "4GiB"'
_DURATION_REMEDY = 'write a duration like "90s", "30m", "1h30m" or "250ms"'
_SELECTOR_REMEDY = 'write "key", "!key", "key=value", "key!=value", "key in (a,b)" or "key notin (a,b)"'


def parse_cpu(value: str | int | float, *, field: str = "cpu") -> int:
    """Returns milli-CPUs: ``2`` and ``"2"`` are 2000, ``"0.25"`` is 250, ``"500m"`` is 500."""
    match = _CPU.fullmatch(_written(value, field, _CPU_REMEDY))
    if match is None:
        raise _refuse(field, value, "is not a number of CPUs", _CPU_REMEDY)
    millis = Decimal(match[1]) * (1 if match[2] else 1000)
    return _whole(millis, field, value, "is finer than a thousandth of a CPU", _CPU_REMEDY)


def format_cpu(millis: int) -> str:
    """Returns ``millis`` milli-CPUs as :func:`parse_cpu` reads them: ``"2"``, ``"500m"``."""
    return f"{millis}m" if millis % 1000 else str(millis // 1000)


def parse_bytes(value: str | int, *, field: str = "bytes") -> int:
    """Returns bytes: ``"4GiB"`` is 4 · 2³⁰, ``"512M"`` is 512 000 000."""
    match = _BYTES.fullmatch(_written(value, field, _BYTES_REMEDY))
    if match is None:
        raise _refuse(field, value, "is not a number of bytes", _BYTES_REMEDY)
    unit = match[2].removesuffix("B")
    factor = _BYTE_UNITS.get(unit)
    if factor is None:
        bare = match[2].lower().removesuffix("b")
        meant = next((known for known in _BYTE_UNITS if known and known.lower() == bare), None)
        hint = f'did you mean "{match[1]}{meant}B"?' if meant else _BYTES_REMEDY
        raise _refuse(field, value, f"has the unknown unit {match[2]!r}", hint)
    return _whole(Decimal(match[1]) * factor, field, value, "is not a whole number of bytes", _BYTES_REMEDY)


def format_bytes(count: int) -> str:
    """Returns ``count`` bytes with the biggest binary suffix that is exact: ``"4GiB"``, ``"1000"``."""
    for unit in ("Pi", "Ti", "Gi", "Mi", "Ki"):
        if count and count % _BYTE_UNITS[unit] == 0:
            return f"{count // _BYTE_UNITS[unit]}{unit}B"
    return str(count)


def parse_duration(value: str | int | float | timedelta, *, field: str = "duration") -> timedelta:
    """Returns a duration; a bare number is seconds. ``"1h30m"``, ``"250ms"``, ``90``."""
    if isinstance(value, timedelta):
        if value < timedelta(0):
            raise _refuse(field, value, "is negative", _DURATION_REMEDY)
        return value
    text = _written(value, field, _DURATION_REMEDY)
    if re.fullmatch(_NUMBER, text):
        text += "s"
    total = Decimal(0)
    position = 0
    smallest: int | None = None
    while position < len(text):
        part = _DURATION_PART.match(text, position)
        factor = _DURATION_UNITS_US.get(part[2]) if part else None
        if part is None or factor is None or (smallest is not None and factor >= smallest):
            raise _refuse(field, value, "is not a duration", _DURATION_REMEDY)
        total += Decimal(part[1]) * factor
        smallest = factor
        position = part.end()
    if not text:
        raise _refuse(field, value, "is not a duration", _DURATION_REMEDY)
    micros = _whole(total, field, value, "is finer than a microsecond", _DURATION_REMEDY)
    try:
        return timedelta(microseconds=micros)
    except OverflowError:
        raise _refuse(field, value, "is too long", _DURATION_REMEDY) from None


def format_duration(duration: timedelta) -> str:
    """Returns ``duration`` (not negative) exactly: ``"1h30m"``, ``"1s500ms"``, ``"0s"``."""
    rest = duration // timedelta(microseconds=1)
    parts = []
    for unit, factor in _DURATION_UNITS_US.items():
        count, rest = divmod(rest, factor)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def parse_selector(text: str, *, field: str = "selector") -> LabelSelector:
    """Returns the condition on an agent's labels that ``text`` writes; see the module's table."""
    if not isinstance(text, str):
        raise _refuse(field, text, "is not a label selector", _SELECTOR_REMEDY)
    stripped = text.strip()
    if match := _SELECTOR_SET.fullmatch(stripped):
        values = tuple(value.strip() for value in match[3].split(","))
        if not all(values):
            raise _refuse(field, text, "has an empty value", _SELECTOR_REMEDY)
        return LabelSelector(match[1], SelectorOperator.IN if match[2] == "in" else SelectorOperator.NOT_IN, values)
    if match := _SELECTOR_VALUE.fullmatch(stripped):
        return LabelSelector(match[1], SelectorOperator.IN if match[2] == "=" else SelectorOperator.NOT_IN, (match[3],))
    if match := _SELECTOR_KEY.fullmatch(stripped):
        return LabelSelector(match[2], SelectorOperator.NOT_EXISTS if match[1] else SelectorOperator.EXISTS)
    raise _refuse(field, text, "is not a label selector", _SELECTOR_REMEDY)


def format_selector(selector: LabelSelector) -> str:
    """Returns ``selector`` as :func:`parse_selector` reads it.

    Raises:
        InvalidArgument: A value has characters (comma, parenthesis, space at an
            end, …) that the written form has no place for.
    """
    key, values = selector.key, selector.values
    if selector.operator is SelectorOperator.EXISTS:
        text = key
    elif selector.operator is SelectorOperator.NOT_EXISTS:
        text = f"!{key}"
    elif len(values) == 1:
        text = f"{key}{'=' if selector.operator is SelectorOperator.IN else '!='}{values[0]}"
    else:
        text = f"{key} {'in' if selector.operator is SelectorOperator.IN else 'notin'} ({','.join(values)})"
    if parse_selector(text) != selector:
        raise _refuse("selector", text, "cannot be written in one line", "give key, operator and values")
    return text


def _written(value: object, field: str, remedy: str) -> str:
    """Returns a number or text as text without exponent; refuses everything else, bool and NaN included."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _refuse(field, value, f"is a {type(value).__name__}", remedy)
    try:
        text = format(Decimal(repr(value)), "f") if isinstance(value, float) else str(value).strip()
    except (InvalidOperation, ValueError):
        raise InvalidArgument(violations={field: "is not a number that can be read"}, remedy=remedy) from None
    if text.startswith("-"):
        raise _refuse(field, value, "is negative", remedy)
    return text


def _whole(number: Decimal, field: str, value: object, why: str, remedy: str) -> int:
    whole = int(number)
    if whole != number:
        raise _refuse(field, value, why, remedy)
    if whole > _MAX_BYTES:
        raise _refuse(field, value, "is too large", remedy)
    return whole


def _refuse(field: str, value: object, why: str, remedy: str) -> InvalidArgument:
    return InvalidArgument(violations={field: f"{value!r} {why}"}, remedy=remedy)
