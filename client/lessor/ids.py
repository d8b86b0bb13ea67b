"""Public job ids.

A job's number is a positive 63-bit integer that grows with its submit time; its
public id is ``j`` and 13 digits of Crockford's base 32, so that ids sort as
their numbers do and contain no letter that is misread.
"""

from __future__ import annotations

_DIGITS = "0123456789abcdefghjkmnpqrstvwxyz"
_VALUES = {digit: value for value, digit in enumerate(_DIGITS)}
_WIDTH = 13
_MAX = (1 << 63) - 1


def encode_job_id(number: int) -> str:
    """Returns the public id of job ``number`` (1 … 2**63 - 1).

    Raises:
        ValueError: The number is out of range.
    """
    if not 0 < number <= _MAX:
        raise ValueError(f"job number {number} is out of range")
    digits = []
    for _ in range(_WIDTH):
        number, value = number >> 5, number & 31
        digits.append(_DIGITS[value])
    return "j" + "".join(reversed(digits))


def decode_job_id(text: str) -> int:
    """Returns the number of the public id ``text``.

    Raises:
        ValueError: The text is not a job id.
    """
    if len(text) != _WIDTH + 1 or text[0] != "j":
        raise ValueError(f"{text!r} is not a job id: expected 'j' and {_WIDTH} base-32 digits")
    number = 0
    for digit in text[1:]:
        value = _VALUES.get(digit)
        if value is None:
            raise ValueError(f"{text!r} is not a job id: {digit!r} is no base-32 digit")
        number = number << 5 | value
    if not 0 < number <= _MAX:
        raise ValueError(f"{text!r} is not a job id: out of range")
    return number
