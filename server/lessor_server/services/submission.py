"""From a submitted spec to what is stored: defaults filled in, rules checked.

Rules that concern one field stand in the proto and are checked before; here are
those that need the lease protocol's numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from google.protobuf.duration_pb2 import Duration

from lessor import timing
from lessor.v1 import job_pb2
from lessor_server.domain.errors import InvalidField, TooLarge
from lessor_server.domain.shape import Selector, SelectorOperator, Shape, max_heartbeat_ms

DEFAULT_QUEUE = "default"
DEFAULT_RUNTIME = "process"
MAX_SPEC_BYTES = 1 << 20
"""A larger spec belongs in a file."""


@dataclass(frozen=True, slots=True)
class Submission:
    """One job, ready to be stored."""

    queue: str
    shape: Shape
    priority: int
    name: str
    labels_json: str
    spec: bytes
    """Serialized JobSpec, defaults filled in."""
    ttl_ms: int
    start_timeout_ms: int | None
    queue_timeout_ms: int | None
    max_failures: int
    max_losses: int
    backoff_initial_ms: int
    backoff_max_ms: int
    dedupe_key: str | None


def prepare(spec: job_pb2.JobSpec, path: str) -> Submission:
    """Returns what is stored of ``spec``; ``spec`` itself is left as it is.

    Args:
        spec: As submitted, its fields checked against the proto's rules.
        path: Where it stands in the request, for messages: ``spec`` or ``specs[3]``.

    Raises:
        InvalidField: Two fields do not go together.
        TooLarge: It has more than 1 MiB.
    """
    if spec.ByteSize() > MAX_SPEC_BYTES:
        raise TooLarge(path, spec.ByteSize(), MAX_SPEC_BYTES)
    filled = job_pb2.JobSpec()
    filled.CopyFrom(spec)
    _fill_defaults(filled)
    ttl = filled.lease.ttl.ToTimedelta()
    _check_grace(filled.lease.grace.ToTimedelta(), ttl, path)
    timeouts = filled.timeouts
    return Submission(
        queue=filled.queue,
        shape=_shape(filled, ttl),
        priority=filled.priority,
        name=filled.name,
        labels_json=json.dumps(dict(filled.labels), sort_keys=True),
        spec=filled.SerializeToString(deterministic=True),
        ttl_ms=_ms(ttl),
        start_timeout_ms=_ms(timeouts.start.ToTimedelta()) if timeouts.HasField("start") else None,
        queue_timeout_ms=_ms(timeouts.queue.ToTimedelta()) if timeouts.HasField("queue") else None,
        max_failures=filled.retry.max_failures,
        max_losses=filled.retry.max_losses,
        backoff_initial_ms=_ms(filled.retry.backoff_initial.ToTimedelta()),
        backoff_max_ms=_ms(filled.retry.backoff_max.ToTimedelta()),
        dedupe_key=filled.dedupe_key or None,
    )


def prepare_all(specs: Sequence[job_pb2.JobSpec], *, single: bool) -> list[Submission]:
    """Returns what is stored of each spec. All problems of all specs are told at once.

    Raises:
        InvalidField: Fields do not go together.
        TooLarge: A spec has more than 1 MiB.
    """
    prepared: list[Submission] = []
    violations: list[tuple[str, str]] = []
    for index, spec in enumerate(specs):
        try:
            prepared.append(prepare(spec, "spec" if single else f"specs[{index}]"))
        except InvalidField as error:
            violations += error.violations
    if violations:
        raise InvalidField(violations)
    return prepared


def _fill_defaults(spec: job_pb2.JobSpec) -> None:
    spec.queue = spec.queue or DEFAULT_QUEUE
    spec.runtime = spec.runtime or DEFAULT_RUNTIME
    spec.name = spec.name or _base_name(spec.command.argv[0])
    if not spec.resources.HasField("cpu_millis"):
        spec.resources.cpu_millis = timing.DEFAULT_CPU_MILLIS
    retry = spec.retry
    retry.max_failures = retry.max_failures or timing.DEFAULT_MAX_FAILURES
    retry.max_losses = retry.max_losses or timing.DEFAULT_MAX_LOSSES
    if not retry.HasField("backoff_initial"):
        retry.backoff_initial.CopyFrom(_duration(timing.DEFAULT_BACKOFF_INITIAL))
    if not retry.HasField("backoff_max"):
        retry.backoff_max.CopyFrom(_duration(timing.DEFAULT_BACKOFF_MAX))
    if not spec.lease.HasField("ttl"):
        spec.lease.ttl.CopyFrom(_duration(timing.DEFAULT_TTL))
    if not spec.lease.HasField("grace"):
        spec.lease.grace.CopyFrom(_duration(timing.default_grace(spec.lease.ttl.ToTimedelta())))


def _base_name(program: str) -> str:
    name = program.rstrip("/").rpartition("/")[2]
    return "".join(character for character in name if character.isprintable())[:128] or "job"


def _check_grace(grace: timedelta, ttl: timedelta, path: str) -> None:
    longest = timing.longest_grace(ttl)
    if grace >= longest:
        raise InvalidField(
            [
                (
                    f"{path}.lease.grace",
                    f"{grace.total_seconds():g} s leaves no room in a ttl of {ttl.total_seconds():g} s for two "
                    f"heartbeats before the job must be stopped: use less than {longest.total_seconds():g} s, "
                    "or a longer ttl",
                )
            ]
        )


def _shape(spec: job_pb2.JobSpec, ttl: timedelta) -> Shape:
    resources = spec.resources
    return Shape(
        cpu_millis=resources.cpu_millis,
        memory_bytes=resources.memory_bytes,
        gpu_count=resources.gpu_count,
        gpu_model=resources.gpu_model,
        gpu_memory_bytes=resources.gpu_memory_bytes,
        selectors=tuple(Selector(s.key, SelectorOperator(s.operator), tuple(s.values)) for s in spec.selectors),
        runtime=spec.runtime,
        max_heartbeat_ms=max_heartbeat_ms(ttl),
        needs_user=bool(spec.command.user),
    )


def _ms(value: timedelta) -> int:
    return value // timedelta(milliseconds=1)


def _duration(value: timedelta) -> Duration:
    duration = Duration()
    duration.FromTimedelta(value)
    return duration
