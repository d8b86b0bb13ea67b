"""The messages of the contract, by their descriptors, and messages made from them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message_factory import GetMessageClass

from lessor.v1 import agent_service_pb2, errors_pb2, fleet_service_pb2, job_pb2, job_service_pb2

Write = Callable[[Any, str], None]
"""Writes a text into a message, at one place."""

_DEPTH = 7


def all_messages() -> list[Descriptor]:
    """Returns every message of the contract, those inside others included; no entries of maps."""
    found: list[Descriptor] = []

    def add(descriptor: Descriptor) -> None:
        if not descriptor.GetOptions().map_entry:
            found.append(descriptor)
            for nested in descriptor.nested_types:
                add(nested)

    for module in (job_pb2, job_service_pb2, agent_service_pb2, fleet_service_pb2, errors_pb2):
        for descriptor in module.DESCRIPTOR.message_types_by_name.values():
            add(descriptor)
    return found


def new(descriptor: Descriptor) -> Any:
    """Returns an empty message."""
    return GetMessageClass(descriptor)()


def is_map(field: FieldDescriptor) -> bool:
    """Returns whether a field is a map."""
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def copy_field(message: Any, field: FieldDescriptor, value: Any) -> None:
    """Gives ``message`` the value that another one of its type has in ``field``."""
    if field.is_repeated or field.message_type is not None:
        getattr(message, field.name).MergeFrom(value)
    else:
        setattr(message, field.name, value)


def text_places(descriptor: Descriptor, depth: int = _DEPTH) -> Iterator[tuple[str, Write]]:
    """Yields every place for a text in messages of a type: its path, and what writes a text there.

    Items of lists are put behind a harmless first one, so their paths end in ``[1]``.
    """
    if depth == 0:
        return
    for field in descriptor.fields:
        name, inner = field.name, field.message_type
        if is_map(field):
            yield from _map_places(field)
        elif field.type == FieldDescriptor.TYPE_STRING:
            if field.is_repeated:
                yield f"{name}[1]", partial(_write_second, name)
            else:
                yield name, partial(_write, name)
        elif inner is not None:
            for path, write in text_places(inner, depth - 1):
                if field.is_repeated:
                    yield f"{name}[1].{path}", partial(_write_into_second, name, write)
                else:
                    yield f"{name}.{path}", partial(_write_into, name, write)


def _write(name: str, message: Any, text: str) -> None:
    setattr(message, name, text)


def _write_second(name: str, message: Any, text: str) -> None:
    getattr(message, name).extend(["a", text])


def _write_into(name: str, write: Write, message: Any, text: str) -> None:
    write(getattr(message, name), text)


def _write_into_second(name: str, write: Write, message: Any, text: str) -> None:
    getattr(message, name).add()
    write(getattr(message, name).add(), text)


def _write_value(name: str, message: Any, text: str) -> None:
    getattr(message, name)["k"] = text


def _write_key(name: str, value: object, message: Any, text: str) -> None:
    getattr(message, name)[text] = value


def _map_places(field: FieldDescriptor) -> Iterator[tuple[str, Write]]:
    assert field.message_type is not None
    name, entry = field.name, field.message_type.fields_by_name
    value_is_text = entry["value"].type == FieldDescriptor.TYPE_STRING
    if value_is_text:
        yield f'{name}["k"]', partial(_write_value, name)
    if entry["key"].type == FieldDescriptor.TYPE_STRING:
        yield f'{name}["{{}}"]', partial(_write_key, name, "v" if value_is_text else 1)


_TEXTS = (
    "", "a", "default", "A-b.c/d", "x" * 63, "x" * 64, "x" * 128, "x" * 129, "é" * 128, "é" * 256, "x" * 257, "x" * 512,
    "x" * 513, "é" * 257, "a\n", "\n", "a b", "-a", "a-", "/abs", "rel/ative", "LESSOR_X", "A_LESSOR_X", "PATH", "1A",
    "\x7f", "\x01", "a\0b", "\0", "😀" * 64, "1f0e7f5c-9a3b-4c1d-8e2f-0a1b2c3d4e5f", "z|y", "host.example",
)  # fmt: skip
_INTEGERS = (0, 1, -1, 2, 3, 6, 100, 1000, 1001, -1000, -1001, 1024, 1025, 10**9, 10**9 + 1, 2**31 - 1, -(2**31))
_LARGE_INTEGERS = (*_INTEGERS, 1 << 50, (1 << 50) + 1, 2**63 - 1, -(2**63))
_DURATION_S = (0, 1, 9, 10, 60, 600, 601, 3600, 3601, 86400, 86401, 604800, 604801, 31536000, 31536001, -1)
_REALS = (0.0, 0.5, 1.0, 1.0000001, -0.1, float("nan"), float("inf"), -0.0)


def random_message(descriptor: Descriptor, rng: random.Random, depth: int = _DEPTH) -> Any:
    """Returns a message with values from both sides of the rules' bounds; most fields are left out."""
    message = new(descriptor)
    if descriptor.full_name == "google.protobuf.Duration":
        message.seconds = rng.choice(_DURATION_S)
        message.nanos = rng.choice((0, 0, 1, 999_999_999, 10**9, -1))
        return message
    for field in descriptor.fields:
        if depth and rng.random() < 0.5:
            _fill(message, field, rng, depth)
    return message


def _fill(message: Any, field: FieldDescriptor, rng: random.Random, depth: int) -> None:
    if is_map(field):
        assert field.message_type is not None
        entry = field.message_type.fields_by_name
        for _ in range(rng.randrange(3)):
            getattr(message, field.name)[_value(entry["key"], rng, depth)] = _value(entry["value"], rng, depth)
    elif field.is_repeated:
        getattr(message, field.name).extend([_value(field, rng, depth) for _ in range(rng.randrange(4))])
    elif field.message_type is not None:
        getattr(message, field.name).CopyFrom(_value(field, rng, depth))
    else:
        setattr(message, field.name, _value(field, rng, depth))


def _value(field: FieldDescriptor, rng: random.Random, depth: int) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_MESSAGE:
            assert field.message_type is not None
            return random_message(field.message_type, rng, depth - 1)
        case FieldDescriptor.CPPTYPE_STRING:
            text = rng.choice(_TEXTS)
            return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
        case FieldDescriptor.CPPTYPE_ENUM:
            return rng.randrange(8)
        case FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return rng.choice(_REALS)
        case FieldDescriptor.CPPTYPE_INT32:
            return rng.choice(_INTEGERS)
        case FieldDescriptor.CPPTYPE_UINT32 | FieldDescriptor.CPPTYPE_UINT64:
            return abs(rng.choice(_INTEGERS[:-1]))
        case _:
            return rng.choice(_LARGE_INTEGERS)
