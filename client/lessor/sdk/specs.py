"""What to run: :class:`JobSpec`, its wire form and its JSON form.

The JSON form is also that of job files and of the keyword arguments of
``submit``: quantities may be written as :mod:`lessor.units` reads them.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import timedelta
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias, TypedDict, Unpack

from lessor import units
from lessor.errors import InvalidArgument
from lessor.sdk.checks import INT32_MAX, INT64_MAX, check_integer, check_mapping, check_text, refuse
from lessor.sdk.selectors import LabelSelector, SelectorOperator
from lessor.sdk.wire import JsonValue, duration_of
from lessor.v1 import job_pb2

DurationLike: TypeAlias = str | int | float | timedelta
"""``"1h30m"``, seconds, or a timedelta."""


class JobFields(TypedDict, total=False):
    """What ``submit`` takes beside the command. A field that is not given has the server's default."""

    name: str
    """A name for people. Default: the program's base name."""
    queue: str
    """Default ``"default"``."""
    labels: Mapping[str, str]
    """To find the job by."""
    runtime: str
    """Default ``"process"``."""
    env: Mapping[str, str]
    """Added to the variables the agent lets through. Names that start with LESSOR_ are refused."""
    working_dir: str | os.PathLike[str]
    """Absolute path on the agent's host. Default: a fresh directory of the attempt."""
    user: str
    """User on the agent's host. Default: the agent's own."""
    cpu: str | int | float
    """Cores, or ``"500m"``. Default 1."""
    memory: str | int
    """Bytes, or ``"4GiB"``. Default: nothing is reserved."""
    gpus: int
    """Whole GPUs, held exclusively. Default 0."""
    gpu_model: str
    """Part of the model's name, without regard to case. Default: any."""
    gpu_memory: str | int
    """Least memory of each GPU. Default: any."""
    selectors: Sequence[str | LabelSelector]
    """Conditions on the agent's labels, all of which must hold."""
    priority: int
    """-1000 … 1000, higher first. Default 0."""
    max_failures: int
    """Failures after which the job is FAILED. Default 1: no retry."""
    max_losses: int
    """Losses after which the job is FAILED. Default 10."""
    backoff: DurationLike
    """Wait before the first retry; doubles each time. Default 1 s."""
    backoff_max: DurationLike
    """The longest wait. Default 5 minutes."""
    timeout: DurationLike
    """From running to the end. Default: none."""
    queue_timeout: DurationLike
    """From submit to the first grant. Default: none."""
    start_timeout: DurationLike
    """From a grant to running. Default: none."""
    ttl: DurationLike
    """How long the lease stands without a renewal. Default 60 s."""
    grace: DurationLike
    """From SIGTERM to SIGKILL. Default 10 s, less under a short ttl."""
    on_lease_lost: Literal["freeze", "stop", "continue"]
    """What becomes of the job when its lease is lost while it runs: it stands still until the server says whether
    it goes on or is over; it is stopped; or it runs on, maybe beside its next attempt. Default ``"freeze"`` where
    the runtime can (``"process"`` can), else ``"stop"``."""
    dedupe_key: str
    """At most one live or succeeded job of a queue has a given key."""


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What to run, with which resources and policies. Immutable once submitted.

    Build one with :meth:`of`, which reads quantities as people write them.

    Raises:
        InvalidArgument: A value has the wrong type, is negative, or cannot be
            sent. The server checks the rest (names, ranges, combinations).
    """

    argv: tuple[str, ...]
    """Program and arguments; no shell is involved."""
    name: str = ""
    queue: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    runtime: str = ""
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    working_dir: str = ""
    user: str = ""
    cpu_millis: int | None = None
    """Milli-CPUs; None: the server's default, 1000."""
    memory_bytes: int = 0
    gpus: int = 0
    gpu_model: str = ""
    gpu_memory_bytes: int = 0
    """Least memory of each GPU."""
    selectors: tuple[LabelSelector, ...] = ()
    priority: int = 0
    max_failures: int = 0
    """0: the server's default, 1."""
    max_losses: int = 0
    """0: the server's default, 10."""
    backoff: timedelta | None = None
    backoff_max: timedelta | None = None
    timeout: timedelta | None = None
    """From running to the end; None: no limit."""
    queue_timeout: timedelta | None = None
    start_timeout: timedelta | None = None
    ttl: timedelta | None = None
    grace: timedelta | None = None
    on_lease_lost: str = ""
    """``"freeze"``, ``"stop"``, ``"continue"``, or empty: the server's default."""
    dedupe_key: str = ""

    def __post_init__(self) -> None:
        violations: dict[str, str] = {}
        for attribute, default, entry in _CHECKS:
            value = getattr(self, attribute)
            if value is default:
                continue
            try:
                entry.check(entry.key, value)
            except InvalidArgument as error:
                violations.update(error.violations)
        if violations:
            raise InvalidArgument(violations=violations)

    @classmethod
    def of(cls, command: str | Sequence[str], **job_fields: Unpack[JobFields]) -> JobSpec:
        """Returns the spec of ``command`` with the given fields.

        A text is split as a shell would (quotes, no more); no shell runs it.

        Raises:
            InvalidArgument: A field is unknown or its value is wrong; every such
                field is in ``violations``.
        """
        return cls.from_dict({"command": command, **job_fields})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> JobSpec:
        """Returns the spec that ``values`` (field → JSON value) write; the inverse of :meth:`to_dict`.

        Raises:
            InvalidArgument: As :meth:`of`.
        """
        violations: dict[str, str] = {}
        remedy = ""
        attributes: dict[str, Any] = {}
        for key, value in values.items():
            entry = _BY_KEY.get(key)
            if entry is None:
                violations[str(key)] = _unknown(str(key))
            elif value is not None:
                try:
                    attributes[entry.attribute] = entry.parse(key, value)
                except InvalidArgument as error:
                    violations.update(error.violations)
                    remedy = error.remedy
        if values.get("command") is None:
            violations["command"] = 'is missing; give a list like ["python", "train.py"]'
        if violations:
            raise InvalidArgument(violations=violations, remedy=remedy if len(violations) == 1 else "")
        return cls(**attributes)

    def to_dict(self) -> dict[str, JsonValue]:
        """Returns the JSON form; fields with the server's default are left out."""
        values: dict[str, JsonValue] = {}
        for entry in _FIELDS:
            value = getattr(self, entry.attribute)
            if entry.key == "command" or value != _DEFAULTS[entry.attribute]:
                values[entry.key] = entry.dump(value)
        return values

    @classmethod
    def from_proto(cls, message: job_pb2.JobSpec) -> JobSpec:
        """Reads it from the wire."""
        resources, command = message.resources, message.command
        return cls(
            argv=tuple(command.argv),
            name=message.name,
            queue=message.queue,
            labels=dict(message.labels),
            runtime=message.runtime,
            env=dict(command.env),
            working_dir=command.working_dir,
            user=command.user,
            cpu_millis=resources.cpu_millis if resources.HasField("cpu_millis") else None,
            memory_bytes=resources.memory_bytes,
            gpus=resources.gpu_count,
            gpu_model=resources.gpu_model,
            gpu_memory_bytes=resources.gpu_memory_bytes,
            selectors=tuple(LabelSelector.from_proto(selector) for selector in message.selectors),
            priority=message.priority,
            max_failures=message.retry.max_failures,
            max_losses=message.retry.max_losses,
            backoff=duration_of(message.retry, "backoff_initial"),
            backoff_max=duration_of(message.retry, "backoff_max"),
            timeout=duration_of(message.timeouts, "run"),
            queue_timeout=duration_of(message.timeouts, "queue"),
            start_timeout=duration_of(message.timeouts, "start"),
            ttl=duration_of(message.lease, "ttl"),
            grace=duration_of(message.lease, "grace"),
            # One that this version does not know is left out, as one that was not said.
            on_lease_lost=_POLICY_NAMES.get(message.lease.on_lost, ""),
            dedupe_key=message.dedupe_key,
        )

    def to_proto(self) -> job_pb2.JobSpec:
        """Writes it for the wire: what is not given is left out."""
        spec = job_pb2.JobSpec(name=self.name, queue=self.queue)
        command = spec.command
        command.SetInParent()
        command.argv.extend(self.argv)
        if self.env:
            command.env.update(self.env)
        if self.working_dir:
            command.working_dir = self.working_dir
        if self.user:
            command.user = self.user
        if self.labels:
            spec.labels.update(self.labels)
        if self.runtime:
            spec.runtime = self.runtime
        if self.priority:
            spec.priority = self.priority
        if self.dedupe_key:
            spec.dedupe_key = self.dedupe_key
        for selector in self.selectors:
            spec.selectors.append(selector.to_proto())
        self._write_resources(spec)
        self._write_policies(spec)
        return spec

    def _write_resources(self, spec: job_pb2.JobSpec) -> None:
        if self.cpu_millis is not None:
            spec.resources.cpu_millis = self.cpu_millis
        if self.memory_bytes:
            spec.resources.memory_bytes = self.memory_bytes
        if self.gpus:
            spec.resources.gpu_count = self.gpus
        if self.gpu_model:
            spec.resources.gpu_model = self.gpu_model
        if self.gpu_memory_bytes:
            spec.resources.gpu_memory_bytes = self.gpu_memory_bytes

    def _write_policies(self, spec: job_pb2.JobSpec) -> None:
        if self.max_failures:
            spec.retry.max_failures = self.max_failures
        if self.max_losses:
            spec.retry.max_losses = self.max_losses
        if self.backoff is not None:
            spec.retry.backoff_initial.FromTimedelta(self.backoff)
        if self.backoff_max is not None:
            spec.retry.backoff_max.FromTimedelta(self.backoff_max)
        if self.queue_timeout is not None:
            spec.timeouts.queue.FromTimedelta(self.queue_timeout)
        if self.start_timeout is not None:
            spec.timeouts.start.FromTimedelta(self.start_timeout)
        if self.timeout is not None:
            spec.timeouts.run.FromTimedelta(self.timeout)
        if self.ttl is not None:
            spec.lease.ttl.FromTimedelta(self.ttl)
        if self.grace is not None:
            spec.lease.grace.FromTimedelta(self.grace)
        if self.on_lease_lost:
            spec.lease.on_lost = _POLICIES[self.on_lease_lost]


@dataclass(frozen=True, slots=True)
class _Field:
    """How one field is read, written and checked."""

    key: str
    """In JSON, job files and keyword arguments."""
    attribute: str
    """Of JobSpec."""
    parse: Callable[[str, Any], Any]
    dump: Callable[[Any], JsonValue]
    check: Callable[[str, Any], None]


def _parse_text(key: str, value: object) -> str:
    check_text(key, value)
    return str(value)


def _parse_path(key: str, value: object) -> str:
    return _parse_text(key, os.fspath(value) if isinstance(value, os.PathLike) else value)


def _parse_mapping(key: str, value: Any) -> dict[str, str]:
    check_mapping(key, value)
    return dict(value)


_check_count = check_integer(0, INT32_MAX)
_check_priority = check_integer(-INT32_MAX, INT32_MAX)
_check_size = check_integer(0, INT64_MAX)


def _parse_with(check: Callable[[str, object], None]) -> Callable[[str, Any], Any]:
    def parse(key: str, value: Any) -> Any:
        check(key, value)
        return value

    return parse


def _check_optional_size(key: str, value: object) -> None:
    if value is not None:
        _check_size(key, value)


def _check_duration(key: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, timedelta):
        raise refuse(key, value, f"is a {type(value).__name__}; give a timedelta")
    if value < timedelta(0):
        raise refuse(key, value, "is negative")


def _check_argv(key: str, value: object) -> None:
    if not isinstance(value, tuple):
        raise refuse(key, value, f"is a {type(value).__name__}; give a tuple of texts, or use JobSpec.of")
    for index, text in enumerate(value):
        check_text(f"{key}[{index}]", text)


_SHELL_WORDS = frozenset({"|", "||", "&&", "&", ";", "<", ">", ">>", "2>", "2>&1"})


def _parse_argv(key: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        try:
            words = tuple(shlex.split(value))
        except ValueError as error:
            raise refuse(key, value, f"cannot be split into words: {error}", "give a list of texts") from None
        if found := _SHELL_WORDS.intersection(words):
            raise refuse(
                key, value, f"needs a shell for {sorted(found)[0]!r}", 'give ["sh", "-c", "…"] to run it in one'
            )
    elif isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        words = tuple(os.fspath(word) if isinstance(word, os.PathLike) else word for word in value)
    else:
        raise refuse(key, value, f"is a {type(value).__name__}; give a list of texts")
    if not words or not words[0]:
        raise refuse(key, list(words), 'names no program; give a list like ["python", "train.py"]')
    _check_argv(key, words)
    return words


def _check_selectors(key: str, value: object) -> None:
    if not isinstance(value, tuple):
        raise refuse(key, value, f"is a {type(value).__name__}; give a tuple of LabelSelectors")
    for index, selector in enumerate(value):
        if not isinstance(selector, LabelSelector):
            raise refuse(f"{key}[{index}]", selector, "is no LabelSelector; lessor.units.parse_selector makes one")
        for text in (selector.key, *selector.values):
            check_text(f"{key}[{index}]", text)


def _parse_selectors(key: str, value: Any) -> tuple[LabelSelector, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise refuse(key, value, f"is a {type(value).__name__}; give a list of selectors")
    return tuple(_parse_selector(f"{key}[{index}]", item) for index, item in enumerate(value))


def _parse_selector(key: str, value: Any) -> LabelSelector:
    if isinstance(value, LabelSelector):
        return value
    if isinstance(value, Mapping) and set(value) <= {"key", "operator", "values"}:
        try:
            operator = SelectorOperator[str(value.get("operator", "exists")).upper()]
        except KeyError:
            words = ", ".join(member.name.lower() for member in SelectorOperator)
            raise refuse(f"{key}.operator", value["operator"], f"is not one of {words}") from None
        values = value.get("values", ())
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise refuse(f"{key}.values", values, "is not a list")
        return LabelSelector(_parse_text(f"{key}.key", value.get("key", "")), operator, tuple(values))
    return units.parse_selector(value, field=key)


def _dump_selectors(selectors: Sequence[LabelSelector]) -> JsonValue:
    return [_dump_selector(selector) for selector in selectors]


def _dump_selector(selector: LabelSelector) -> JsonValue:
    try:
        return units.format_selector(selector)
    except InvalidArgument:
        return {
            "key": selector.key,
            "operator": selector.operator.name.lower(),
            "values": list(selector.values),
        }


def _same(value: Any) -> JsonValue:
    result: JsonValue = value
    return result


def _text(key: str) -> _Field:
    return _Field(key, key, _parse_text, _same, check_text)


def _mapping(key: str) -> _Field:
    return _Field(key, key, _parse_mapping, dict, check_mapping)


def _count(key: str) -> _Field:
    return _Field(key, key, _parse_with(_check_count), _same, _check_count)


def _duration(key: str) -> _Field:
    def parse(name: str, value: Any) -> timedelta:
        return units.parse_duration(value, field=name)

    return _Field(key, key, parse, units.format_duration, _check_duration)


def _size(key: str, attribute: str) -> _Field:
    def parse(name: str, value: Any) -> int:
        return units.parse_bytes(value, field=name)

    return _Field(key, attribute, parse, units.format_bytes, _check_size)


_POLICIES = {
    "freeze": job_pb2.ON_LEASE_LOST_FREEZE,
    "stop": job_pb2.ON_LEASE_LOST_STOP,
    "continue": job_pb2.ON_LEASE_LOST_CONTINUE,
}
_POLICY_NAMES = {number: name for name, number in _POLICIES.items()}


def _check_policy(key: str, value: object) -> None:
    check_text(key, value)
    if value and value not in _POLICIES:
        raise refuse(key, value, "is no policy; give freeze, stop or continue")


def _parse_cpu(key: str, value: Any) -> int:
    return units.parse_cpu(value, field=key)


_FIELDS = (
    _Field("command", "argv", _parse_argv, list, _check_argv),
    _text("name"),
    _text("queue"),
    _mapping("labels"),
    _text("runtime"),
    _mapping("env"),
    _Field("working_dir", "working_dir", _parse_path, _same, check_text),
    _text("user"),
    _Field("cpu", "cpu_millis", _parse_cpu, units.format_cpu, _check_optional_size),
    _size("memory", "memory_bytes"),
    _count("gpus"),
    _text("gpu_model"),
    _size("gpu_memory", "gpu_memory_bytes"),
    _Field("selectors", "selectors", _parse_selectors, _dump_selectors, _check_selectors),
    _Field("priority", "priority", _parse_with(_check_priority), _same, _check_priority),
    _count("max_failures"),
    _count("max_losses"),
    _duration("backoff"),
    _duration("backoff_max"),
    _duration("timeout"),
    _duration("queue_timeout"),
    _duration("start_timeout"),
    _duration("ttl"),
    _duration("grace"),
    _Field("on_lease_lost", "on_lease_lost", _parse_with(_check_policy), _same, _check_policy),
    _text("dedupe_key"),
)
_BY_KEY = {entry.key: entry for entry in _FIELDS}
_DEFAULTS: dict[str, Any] = {
    entry.name: {} if entry.name in ("labels", "env") else entry.default for entry in fields(JobSpec)
}

_CHECKS = tuple((entry.attribute, _DEFAULTS[entry.attribute], entry) for entry in _FIELDS)
"""What each new spec is checked by: most of its fields are left at their defaults, which need no check."""

FIELD_NAMES = tuple(_BY_KEY)
"""The fields of the JSON form, ``command`` first."""

_MEANT = {
    "argv": "command",
    "args": "command",
    "cmd": "command",
    "run": "command",
    "entrypoint": "command",
    "script": "command",
    "environment": "env",
    "workdir": "working_dir",
    "cwd": "working_dir",
    "gpu": "gpus",
    "gpu_count": "gpus",
    "cpus": "cpu",
    "retries": "max_failures",
    "selector": "selectors",
    "node_selector": "selectors",
    "run_timeout": "timeout",
    "timeouts": "timeout",
    "tags": "labels",
    "vram": "gpu_memory",
}
"""What other systems call a field → what it is called here."""


def _unknown(key: str) -> str:
    lowered = key.lower().replace("-", "_")
    meant = _MEANT.get(lowered) or next(iter(get_close_matches(lowered, FIELD_NAMES, 1)), None)
    hint = f"did you mean {meant!r}?" if meant else f"known fields: {', '.join(FIELD_NAMES)}"
    return f"unknown field; {hint}"
