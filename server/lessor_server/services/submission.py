"""From a submitted spec to what is stored: defaults filled in, rules checked.

Rules that concern one field stand in the proto and are checked before; here are
those that need the lease protocol's numbers.

Of a thousand jobs that come together most differ in little more than name and
arguments. Everything else of a spec (queue, resources, policies) makes its
:class:`Terms`, which are worked out once and found again by their encoding.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

from google.protobuf.duration_pb2 import Duration

from lessor import timing
from lessor.v1 import job_pb2
from lessor_server.domain.errors import InvalidField, TooLarge
from lessor_server.domain.shape import Selector, SelectorOperator, Shape, max_heartbeat_ms

DEFAULT_QUEUE = "default"
DEFAULT_RUNTIME = "process"
FREEZING_RUNTIMES = frozenset({"process"})
"""Names of the runtimes that can let a job stand still, and go on later."""
MAX_SPEC_BYTES = 1 << 20
"""A larger spec, defaults filled in, belongs in a file."""

SPECS_PER_SLICE = 250
"""Preparing a spec takes some 10 µs; between slices others on the loop get their turn."""

REMEMBERED_TERMS = 20_000
"""Some 2 KB each. To work them out anew takes ten times as long as all else that is done to a spec."""


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """What jobs submitted together mostly share. Equal ones are one object, as long as they are remembered."""

    queue: str
    shape: Shape
    priority: int
    ttl_ms: int
    start_timeout_ms: int | None
    queue_timeout_ms: int | None
    max_failures: int
    max_losses: int
    backoff_initial_ms: int
    backoff_max_ms: int
    defaults: bytes
    """A JobSpec, serialized, of all that these terms leave to the server; to be merged into the spec."""
    late_defaults: bytes
    """The same of what was added to the contract since its beginning; to be appended to the encoded spec."""


class Submission(NamedTuple):
    """One job, ready to be stored."""

    terms: Terms
    name: str
    labels_json: str
    spec: bytes
    """Serialized JobSpec, defaults filled in."""
    dedupe_key: str | None
    said: bytes
    """What tells this job from another: the same for all versions of the server, so without late defaults."""


class Submissions:
    """Prepares specs."""

    def __init__(self) -> None:
        self._terms: dict[Hashable, Terms] = {}

    async def prepare_all(
        self, specs: Sequence[job_pb2.JobSpec], *, single: bool, stored: bool = False
    ) -> list[Submission]:
        """Returns what is stored of each spec. All problems of all specs are told at once.

        Between slices of specs other tasks run.

        Args:
            specs: As submitted, their fields checked against the proto's rules.
                Defaults are filled into them: they belong to this request.
            single: The request has one spec, called ``spec`` in messages.
            stored: They were accepted before, and are of any size: the late defaults that they carry
                since then did not count.

        Raises:
            InvalidField: Fields do not go together.
            TooLarge: A spec that was not stored before has more than 1 MiB.
        """
        prepared: list[Submission] = []
        violations: list[tuple[str, str]] = []
        for start in range(0, len(specs), SPECS_PER_SLICE):
            if start:
                await asyncio.sleep(0)
            for index, spec in enumerate(specs[start : start + SPECS_PER_SLICE], start):
                try:
                    prepared.append(self._prepare(spec, stored=stored))
                except InvalidField as error:
                    path = "spec" if single else f"specs[{index}]"
                    violations += [(f"{path}.{field}", text) for field, text in error.violations]
                except _TooLongError as error:
                    raise TooLarge("spec" if single else f"specs[{index}]", error.size, MAX_SPEC_BYTES) from None
        if violations:
            raise InvalidField(violations)
        return prepared

    def _prepare(self, spec: job_pb2.JobSpec, *, stored: bool) -> Submission:
        terms, name, labels = self._terms_of(spec), spec.name, spec.labels
        if not name:
            name = spec.name = _base_name(spec.command.argv[0])
        spec.MergeFromString(terms.defaults)
        encoded = spec.SerializeToString(deterministic=True)
        if len(encoded) > MAX_SPEC_BYTES and not stored:
            raise _TooLongError(len(encoded))
        labels_json = json.dumps(dict(labels), sort_keys=True) if labels else "{}"
        # To append an encoded message is to merge it.
        return Submission(
            terms, name, labels_json, encoded + terms.late_defaults, spec.dedupe_key or None, said=encoded
        )

    def _terms_of(self, spec: job_pb2.JobSpec) -> Terms:
        key = (
            spec.queue,
            spec.runtime,
            spec.priority,
            # Of the command, placing a job depends on whether it names a user.
            spec.command.user != "",
            spec.resources.SerializeToString() if spec.HasField("resources") else None,
            spec.retry.SerializeToString() if spec.HasField("retry") else None,
            spec.timeouts.SerializeToString() if spec.HasField("timeouts") else None,
            spec.lease.SerializeToString() if spec.HasField("lease") else None,
            tuple([selector.SerializeToString() for selector in spec.selectors]) if spec.selectors else (),
        )
        terms = self._terms.get(key)
        if terms is None:
            terms = _work_out(spec)
            if len(self._terms) >= REMEMBERED_TERMS:
                self._terms.clear()
            self._terms[key] = terms
        return terms


class _TooLongError(Exception):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


def _work_out(spec: job_pb2.JobSpec) -> Terms:
    """
    Raises:
        InvalidField: Fields do not go together.
    """
    defaults, late_defaults = _defaults(spec), _late_defaults(spec)
    filled = job_pb2.JobSpec()
    filled.CopyFrom(spec)
    filled.MergeFrom(defaults)
    filled.MergeFrom(late_defaults)
    ttl = filled.lease.ttl.ToTimedelta()
    _check_lease(filled, ttl)
    timeouts = filled.timeouts
    return Terms(
        queue=filled.queue,
        shape=_shape(filled, ttl),
        priority=filled.priority,
        ttl_ms=_ms(ttl),
        start_timeout_ms=_ms(timeouts.start.ToTimedelta()) if timeouts.HasField("start") else None,
        queue_timeout_ms=_ms(timeouts.queue.ToTimedelta()) if timeouts.HasField("queue") else None,
        max_failures=filled.retry.max_failures,
        max_losses=filled.retry.max_losses,
        backoff_initial_ms=_ms(filled.retry.backoff_initial.ToTimedelta()),
        backoff_max_ms=_ms(filled.retry.backoff_max.ToTimedelta()),
        defaults=defaults.SerializeToString(),
        late_defaults=late_defaults.SerializeToString(),
    )


def _defaults(spec: job_pb2.JobSpec) -> job_pb2.JobSpec:
    """Returns the defaults of all that ``spec`` leaves out, but for its name and :func:`_late_defaults`."""
    defaults = job_pb2.JobSpec()
    if not spec.queue:
        defaults.queue = DEFAULT_QUEUE
    if not spec.runtime:
        defaults.runtime = DEFAULT_RUNTIME
    if not spec.resources.HasField("cpu_millis"):
        defaults.resources.cpu_millis = timing.DEFAULT_CPU_MILLIS
    retry = defaults.retry
    if not spec.retry.max_failures:
        retry.max_failures = timing.DEFAULT_MAX_FAILURES
    if not spec.retry.max_losses:
        retry.max_losses = timing.DEFAULT_MAX_LOSSES
    if not spec.retry.HasField("backoff_initial"):
        retry.backoff_initial.CopyFrom(_duration(timing.DEFAULT_BACKOFF_INITIAL))
    if not spec.retry.HasField("backoff_max"):
        retry.backoff_max.CopyFrom(_duration(timing.DEFAULT_BACKOFF_MAX))
    if not spec.lease.HasField("ttl"):
        defaults.lease.ttl.CopyFrom(_duration(timing.DEFAULT_TTL))
    if not spec.lease.HasField("grace"):
        ttl = spec.lease.ttl.ToTimedelta() if spec.lease.HasField("ttl") else timing.DEFAULT_TTL
        defaults.lease.grace.CopyFrom(_duration(timing.default_grace(ttl)))
    return defaults


def _late_defaults(spec: job_pb2.JobSpec) -> job_pb2.JobSpec:
    """Returns the defaults of fields that an earlier server did not know.

    A submit may be said again to another version of the server than took it first,
    which must know it again (``Submission.said``).
    """
    defaults = job_pb2.JobSpec()
    if not spec.lease.on_lost:
        freezes = (spec.runtime or DEFAULT_RUNTIME) in FREEZING_RUNTIMES
        defaults.lease.on_lost = job_pb2.ON_LEASE_LOST_FREEZE if freezes else job_pb2.ON_LEASE_LOST_STOP
    return defaults


def _base_name(program: str) -> str:
    name = program.rstrip("/").rpartition("/")[2]
    return "".join(character for character in name if character.isprintable())[:128] or "job"


def _check_lease(spec: job_pb2.JobSpec, ttl: timedelta) -> None:
    """
    Raises:
        InvalidField: What is to become of the job when its lease is lost cannot be done.
    """
    if spec.lease.on_lost == job_pb2.ON_LEASE_LOST_FREEZE and spec.runtime not in FREEZING_RUNTIMES:
        text = f"FREEZE: the runtime {spec.runtime!r} cannot freeze a job: use STOP, or CONTINUE"
        raise InvalidField([("lease.on_lost", text)])
    if spec.lease.on_lost != job_pb2.ON_LEASE_LOST_STOP:
        # Nothing has to end before the lease does.
        return
    grace, longest = spec.lease.grace.ToTimedelta(), timing.longest_grace(ttl)
    if grace >= longest:
        text = (
            f"{grace.total_seconds():g} s leaves no room in a ttl of {ttl.total_seconds():g} s for two "
            f"heartbeats before the job must be stopped: use less than {longest.total_seconds():g} s, "
            "or a longer ttl"
        )
        if spec.runtime in FREEZING_RUNTIMES:
            text += ", or let on_lost be FREEZE"
        raise InvalidField([("lease.grace", text)])


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
