"""Public job ids.

A job's number is a positive 63-bit integer that grows with its submit time; its
public id is ``j`` and 13 digits of Crockford's base 32, so that ids sort as
their numbers do and contain no letter that is misread.
"""

from __future__ import annotations

_DIGITS = "0123456789abcdefghjkmnpqrstvwxyz"
_VALID = frozenset(_DIGITS)
_WIDTH = 13
_MAX = (1 << 63) - 1

# Ids are written and read for every job on every way through the server: ten bits at a time, and by int().
_PAIRS = tuple(first + second for first in _DIGITS for second in _DIGITS)
_TO_BASE_32_OF_INT = str.maketrans(_DIGITS, "0123456789abcdefghijklmnopqrstuv")


def encode_job_id(number: int) -> str:
    """Returns the public id of job ``number`` (1 … 2**63 - 1).

    Raises:
        ValueError: The number is out of range.
    """
    if not 0 < number <= _MAX:
        raise ValueError(f"job number {number} is out of range")
    pairs = _PAIRS
    return (
        f"j{_DIGITS[number >> 60]}{pairs[number >> 50 & 1023]}{pairs[number >> 40 & 1023]}{pairs[number >> 30 & 1023]}"
        f"{pairs[number >> 20 & 1023]}{pairs[number >> 10 & 1023]}{pairs[number & 1023]}"
    )


def decode_job_id(text: str) -> int:
    """Returns the number of the public id ``text``.

    Raises:
        ValueError: The text is not a job id.
    """
    if len(text) != _WIDTH + 1 or text[0] != "j":
        raise ValueError(f"{text!r} is not a job id: expected 'j' and {_WIDTH} base-32 digits")
    digits = text[1:]
    if not _VALID.issuperset(digits):
        wrong = next(digit for digit in digits if digit not in _VALID)
        raise ValueError(f"{text!r} is not a job id: {wrong!r} is no base-32 digit")
    number = int(digits.translate(_TO_BASE_32_OF_INT), 32)
    if not 0 < number <= _MAX:
        raise ValueError(f"{text!r} is not a job id: out of range")
    return number
