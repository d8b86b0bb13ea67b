"""The contract's rules, compiled: the quick word that a message keeps all of them.

protovalidate decides what a message may be, and words what is wrong with it. It
takes 15–45 µs for a job's spec, more than the whole rest of a submit. So the
same annotations are compiled here, from the descriptors, to predicates that
take a fraction of that and know one answer only: *certainly valid*. Of whatever
they cannot say that (a value that breaks a rule, or a rule that is not known
here) protovalidate is asked. A rule that is new or changed in the proto files
therefore costs time at first, never correctness.

One more rule applies to all text: no NUL character, which neither PostgreSQL
nor the operating system's interfaces can hold.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any

import protovalidate
from google.protobuf.descriptor import Descriptor, FieldDescriptor, OneofDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from lessor_server.rpc.texts import nul_paths

Predicate = Callable[[Any], bool]
"""Says of a value that it certainly keeps its rules; False means: not known."""

_EXTENSION = 1159
"""Number of buf.validate's extensions in the options of messages, oneofs and fields."""

_ENDLESS = 1 << 70
_NANOS = 10**9

# Of a part whose rules are not known here the verdict is remembered: such parts are
# alike in many messages. The larger ones are not, and the memory has a bound.
_REMEMBERED_BYTES = 512
_REMEMBERED_PARTS = 10_000

# Escapes, alternatives, special groups and named classes.
_OTHER_SYNTAX = re.compile(r"[\\|]|\(\?|\[[:\[]")

_KNOWN_EXPRESSIONS: dict[str, tuple[str, Predicate]] = {
    "size(this.argv) == 0 || this.argv[0] != ''": ("argv", lambda argv: argv[0] != ""),
    "this.env.all(k, !k.startsWith('LESSOR_'))": ("env", lambda env: "LESSOR_" not in "".join(env)),
    "this.working_dir == '' || this.working_dir.startsWith('/')": ("working_dir", lambda path: path.startswith("/")),
}
"""CEL rule of a message, letter by letter → the one field it is about, and what of a value that is not empty
says that it is kept. All of them are kept by an empty one. A test holds both sides together."""


class _UnknownRuleError(Exception):
    """A rule that has no predicate here."""


def keeps_rules(message: Message) -> bool:
    """Returns whether ``message`` certainly keeps all rules; if not, ask :func:`broken_rules`."""
    return predicate_of(message.DESCRIPTOR)(message)


def broken_rules(message: Message) -> list[protovalidate.Violation]:
    """Returns protovalidate's violations: none, where the message is valid after all."""
    return protovalidate.collect_violations(message)


@cache
def predicate_of(descriptor: Descriptor) -> Predicate:
    """Returns the predicate of messages of one type; one that is never sure, if it has rules not known here."""
    try:
        return _message(descriptor)
    except _UnknownRuleError:
        return _never


def _never(_: Any) -> bool:
    return False


def _always(_: Any) -> bool:
    return True


# ------------------------------------------------------------------ messages


def _message(descriptor: Descriptor) -> Predicate:
    more = _whole_rules(descriptor)
    tests: dict[FieldDescriptor, Predicate] = {}
    counted: set[FieldDescriptor] = set()
    for field in descriptor.fields:
        rules = _Rules.of(field.GetOptions())
        required = rules.flag(25)
        test = _field(field, rules)
        empty_will_do = field.has_presence or test(_zero(field))
        if field.name in more:
            test = _both(test, more[field.name])
        if test is not _always:
            tests[field] = test
        if required or not empty_will_do:
            counted.add(field)
    wanted = len(counted)
    for oneof in descriptor.oneofs:
        if _required(oneof):
            wanted += 1
            counted.update(oneof.fields)
    if not (tests or counted):
        return _always

    plan = {field: (tests.get(field, _always), int(field in counted)) for field in (*tests, *counted)}
    not_planned = (_always, 0)

    def keeps(message: Message) -> bool:
        found = 0
        for field, value in message.ListFields():
            test, counts = plan.get(field, not_planned)
            if not test(value):
                return False
            found += counts
        return found == wanted

    return keeps


def _both(one: Predicate, other: Predicate) -> Predicate:
    def keeps(value: Any) -> bool:
        return one(value) and other(value)

    return other if one is _always else keeps


def _whole_rules(descriptor: Descriptor) -> dict[str, Predicate]:
    """Returns what the rules of a whole message ask of a field that is not empty."""
    rules = _Rules.of(descriptor.GetOptions())
    found: dict[str, Predicate] = {}
    for rule in rules.messages(3):
        expression = bytes(rule.one(3, b"")).decode()
        if expression not in _KNOWN_EXPRESSIONS:
            raise _UnknownRuleError(expression)
        name, test = _KNOWN_EXPRESSIONS[expression]
        found[name] = _both(found.get(name, _always), test)
    rules.all_known()
    return found


def _required(oneof: OneofDescriptor) -> bool:
    rules = _Rules.of(oneof.GetOptions())
    required = rules.flag(1)
    rules.all_known()
    return required


def _part(descriptor: Descriptor) -> Predicate:
    """Returns the predicate of a message inside another one."""
    try:
        return _message(descriptor)
    except _UnknownRuleError:
        return partial(_keeps_as_remembered, set())


def _keeps_as_remembered(valid: set[bytes], message: Message) -> bool:
    text = message.SerializeToString()
    if text in valid:
        return True
    if broken_rules(message) or next(nul_paths(message), None) is not None:
        return False
    if len(text) <= _REMEMBERED_BYTES:
        if len(valid) >= _REMEMBERED_PARTS:
            valid.clear()
        valid.add(text)
    return True


# -------------------------------------------------------------------- fields


def _field(field: FieldDescriptor, rules: _Rules) -> Predicate:
    if _is_map(field):
        return _map(field, rules)
    if field.is_repeated:
        return _repeated(field, rules)
    return _single(field, rules)


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _zero(field: FieldDescriptor) -> object:
    if _is_map(field):
        return {}
    return () if field.is_repeated else field.default_value


def _single(field: FieldDescriptor, rules: _Rules) -> Predicate:
    """Returns the predicate of one value of ``field``; takes its rules out of ``rules``."""
    if field.type in (FieldDescriptor.TYPE_MESSAGE, FieldDescriptor.TYPE_GROUP):
        assert field.message_type is not None
        test = _duration(rules.message(21)) if rules.has(21) else _part(field.message_type)
    elif field.type in _KINDS:
        number, make = _KINDS[field.type]
        test = make(rules.message(number), field) if rules.has(number) or field.type in _TEXT else _always
    else:
        test = _always
    rules.all_known()
    return test


def _repeated(field: FieldDescriptor, rules: _Rules) -> Predicate:
    own = rules.message(18)
    least, most = own.one(1, 0), own.one(2, _ENDLESS)
    item_rules = own.message(4)
    own.all_known()
    rules.all_known()
    limit = _plain_text_limit(item_rules) if field.type in _TEXT else None
    test = _single(field, item_rules)

    def keeps(values: Any) -> bool:
        if not least <= len(values) <= most:
            return False
        if limit is not None:
            # A slice is a list, which is joined in a third of the time.
            text = "".join(values[:])
            if 4 * len(text) <= limit:
                return "\0" not in text
        return test is _always or all(map(test, values))

    return keeps


def _map(field: FieldDescriptor, rules: _Rules) -> Predicate:
    own = rules.message(19)
    least, most = own.one(1, 0), own.one(2, _ENDLESS)
    entry = field.message_type
    assert entry is not None
    test_key = _single(entry.fields_by_name["key"], own.message(4))
    test_value = _single(entry.fields_by_name["value"], own.message(5))
    own.all_known()
    rules.all_known()

    def keeps(pairs: Mapping[Any, Any]) -> bool:
        if not least <= len(pairs) <= most:
            return False
        for key, value in pairs.items():  # noqa: SIM110 - half the time of a generator
            if not (test_key(key) and test_value(value)):
                return False
        return True

    return keeps


# -------------------------------------------------------------------- values


def _plain_text_limit(rules: _Rules) -> int | None:
    """Returns the most bytes of a text that has no other rule; None: it has others."""
    text = rules.copy().message(14)
    limit = text.one(5, _ENDLESS)
    return None if text.left else int(limit)


def _text(rules: _Rules, _: FieldDescriptor) -> Predicate:
    least: int = rules.one(2, 0)
    most: int = rules.one(3, _ENDLESS)
    least_bytes: int = rules.one(4, 0)
    most_bytes: int = rules.one(5, _ENDLESS)
    match = _matcher(bytes(rules.one(6)).decode()) if rules.has(6) else None
    rules.all_known()
    # A character has 1 to 4 bytes; the text is encoded only when that leaves a doubt.
    sure_least, sure_most = max(least, least_bytes), min(most, most_bytes // 4)

    def has_length(value: str) -> bool:
        return sure_least <= len(value) <= sure_most or (
            least <= len(value) <= most and least_bytes <= len(value.encode()) <= most_bytes
        )

    if match is None:
        return lambda value: has_length(value) and "\0" not in value
    if sure_least == 0 and sure_most >= _ENDLESS // 4:
        return _Remembered(lambda value: match(value) is not None and "\0" not in value).__getitem__
    return lambda value: match(value) is not None and has_length(value) and "\0" not in value


class _Remembered(dict[str, bool]):
    """The good verdicts on names: of queues, runtimes, labels and variables there are few, and each comes often."""

    def __init__(self, keeps: Callable[[str], bool]) -> None:
        super().__init__()
        self._keeps = keeps

    def __missing__(self, value: str) -> bool:
        verdict = self._keeps(value)
        if verdict and len(value) <= _REMEMBERED_BYTES:
            if len(self) >= _REMEMBERED_PARTS:
                self.clear()
            self[value] = verdict
        return verdict


def _matcher(pattern: str) -> Callable[[str], re.Match[str] | None]:
    """Returns the test for a pattern of RE2 that means the same in Python.

    That are those of literal characters, classes and repetitions from ^ to $, which in Python
    would let a line feed follow. None of them has two ways to match, so the test takes linear time.
    """
    body = pattern[1:-1].replace("[:cntrl:]", "")
    if pattern != f"^{pattern[1:-1]}$" or _OTHER_SYNTAX.search(body):
        raise _UnknownRuleError(pattern)
    return re.compile(pattern[1:-1].replace("[:cntrl:]", r"\x00-\x1f\x7f")).fullmatch


def _bytes(rules: _Rules, _: FieldDescriptor) -> Predicate:
    least, most = rules.one(2, 0), rules.one(3, _ENDLESS)
    rules.all_known()
    return lambda value: least <= len(value) <= most


def _integer(rules: _Rules, _: FieldDescriptor) -> Predicate:
    least = max(_signed(rules.one(5, -_ENDLESS)), _signed(rules.one(4, -_ENDLESS)) + 1)
    most = min(_signed(rules.one(3, _ENDLESS)), _signed(rules.one(2, _ENDLESS)) - 1)
    rules.all_known()
    return lambda value: least <= value <= most


def _real(rules: _Rules, _: FieldDescriptor) -> Predicate:
    least, most = _double(rules.one(5, None), float("-inf")), _double(rules.one(3, None), float("inf"))
    rules.all_known()
    return lambda value: least <= value <= most


def _enum(rules: _Rules, field: FieldDescriptor) -> Predicate:
    assert field.enum_type is not None
    # A number without a name is left to protovalidate.
    allowed = set(field.enum_type.values_by_number)
    rules.flag(2)
    if rules.has(3):
        allowed &= set(rules.integers(3))
    allowed -= set(rules.integers(5))
    rules.all_known()
    return frozenset(allowed).__contains__


def _duration(rules: _Rules) -> Predicate:
    least = max(_nanos(rules.one(6, None), 0), _nanos(rules.one(5, None), -1) + 1)
    most = min(_nanos(rules.one(4, None), _ENDLESS), _nanos(rules.one(3, None), _ENDLESS) - 1)
    rules.all_known()

    def keeps(value: Duration) -> bool:
        nanos = value.nanos
        return 0 <= nanos < _NANOS and least <= value.seconds * _NANOS + nanos <= most

    return keeps


_TEXT = (FieldDescriptor.TYPE_STRING,)
_KINDS: dict[int, tuple[int, Callable[[_Rules, FieldDescriptor], Predicate]]] = {
    FieldDescriptor.TYPE_DOUBLE: (2, _real),
    FieldDescriptor.TYPE_INT32: (3, _integer),
    FieldDescriptor.TYPE_INT64: (4, _integer),
    FieldDescriptor.TYPE_STRING: (14, _text),
    FieldDescriptor.TYPE_BYTES: (15, _bytes),
    FieldDescriptor.TYPE_ENUM: (16, _enum),
}
"""Type of a field → number of its kind of rules in FieldRules, and what makes them a predicate."""


# --------------------------------------------------------------------- rules


class _Rules:
    """One message of rules, read field by field; at the end none may be :attr:`left`.

    The module that would read them whole is not to be had (docs/adr/0001), so
    they are read as protobuf reads fields it does not know.
    """

    def __init__(self, encoded: bytes) -> None:
        self._encoded = encoded
        self.left: dict[int, list[Any]] = {}
        for field in _unknown_fields(Empty.FromString(encoded)):
            self.left.setdefault(field.field_number, []).append(field.data)

    @classmethod
    def of(cls, options: Message) -> _Rules:
        """Returns the rules in the options of a field, a oneof or a message."""
        return cls(b"".join(field.data for field in _unknown_fields(options) if field.field_number == _EXTENSION))

    def copy(self) -> _Rules:
        return _Rules(self._encoded)

    def has(self, number: int) -> bool:
        return number in self.left

    def one(self, number: int, default: Any = None) -> Any:
        """Takes a value out: an integer as it is encoded, or bytes."""
        return self.left.pop(number, [default])[-1]

    def flag(self, number: int) -> bool:
        return bool(self.one(number, 0))

    def message(self, number: int) -> _Rules:
        return _Rules(b"".join(self.left.pop(number, [])))

    def messages(self, number: int) -> Iterable[_Rules]:
        return [_Rules(encoded) for encoded in self.left.pop(number, [])]

    def integers(self, number: int) -> Iterable[int]:
        """Takes a repeated number out. Packed ones are small: one byte each, or not known here."""
        for value in self.left.pop(number, []):
            if isinstance(value, int):
                yield _signed(value)
            elif all(byte < 0x80 for byte in value):
                yield from value
            else:
                raise _UnknownRuleError(f"{number}: {value!r}")

    def all_known(self) -> None:
        """
        Raises:
            _UnknownRuleError: A rule was not taken out.
        """
        if self.left:
            raise _UnknownRuleError(f"rules {sorted(self.left)}")


def _unknown_fields(message: Message) -> Iterable[Any]:
    # What is typed of the set leaves out that it can be iterated.
    fields: Any = UnknownFieldSet(message)
    return list(fields)


def _signed(number: int) -> int:
    """Returns a 64-bit two's complement number, as the wire has negative ones, with its sign."""
    return number - (1 << 64) if 1 << 63 <= number < 1 << 64 else number


def _double(encoded: int | None, default: float) -> float:
    if encoded is None:
        return default
    (number,) = struct.unpack("<d", struct.pack("<Q", encoded))
    return float(number)


def _nanos(encoded: bytes | None, default: int) -> int:
    if encoded is None:
        return default
    duration = Duration.FromString(encoded)
    return duration.seconds * _NANOS + duration.nanos
