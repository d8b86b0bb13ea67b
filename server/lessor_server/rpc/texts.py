"""Finding a character that no text may have, wherever a message holds text.

PostgreSQL and the operating system's interfaces cannot hold a NUL character.
(Invalid UTF-8, a lone surrogate included, is refused earlier, when the message
is parsed.)
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto
from functools import cache

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message


class _Holds(Enum):
    """How a field holds text."""

    ONE = auto()
    LIST = auto()
    MAP = auto()


def nul_paths(message: Message, path: str = "") -> Iterator[str]:
    """Yields where a text of ``message`` has a NUL character, as ``specs[3].command.env["A"]``.

    Only fields that can hold text, themselves or further in, are looked at.
    """
    for name, holds, has_presence in _fields_with_text(message.DESCRIPTOR):
        if has_presence and not message.HasField(name):
            continue
        value = getattr(message, name)
        here = f"{path}.{name}" if path else name
        if holds is _Holds.ONE:
            yield from _in(value, here)
        elif holds is _Holds.LIST:
            for index, item in enumerate(value):
                yield from _in(item, f"{here}[{index}]")
        else:
            for key, item in value.items():
                place = f'{here}["{_escaped(key)}"]'
                yield from _in(key, place)
                yield from _in(item, place)


def _in(value: object, path: str) -> Iterator[str]:
    if isinstance(value, str):
        if "\0" in value:
            yield path
    elif isinstance(value, Message):
        yield from nul_paths(value, path)


def _escaped(key: object) -> str:
    return str(key).replace("\0", "\\0")


@cache
def _fields_with_text(descriptor: Descriptor) -> tuple[tuple[str, _Holds, bool], ...]:
    """Returns name, kind and presence of the fields that can hold text."""
    return tuple(
        (field.name, _how(field), field.has_presence)
        for field in descriptor.fields
        if _may_hold_text(field, frozenset({descriptor.full_name}))
    )


def _how(field: FieldDescriptor) -> _Holds:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return _Holds.MAP
    return _Holds.LIST if field.is_repeated else _Holds.ONE


def _may_hold_text(field: FieldDescriptor, above: frozenset[str]) -> bool:
    """Returns whether a field can; a type inside of itself adds nothing that is not found outside."""
    if field.type == FieldDescriptor.TYPE_STRING:
        return True
    inner = field.message_type
    if inner is None:
        return False
    if inner.full_name in above:
        return True
    return any(_may_hold_text(deeper, above | {inner.full_name}) for deeper in inner.fields)
