"""Shapes: what matters for placing a job, and nothing else.

Jobs of one shape are placed alike, so the planner works per shape, not per job.
HTCondor calls it an autocluster. A shape is stored once, found by its digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any

from lessor.timing import longest_heartbeat

_ENCODING = b"lessor.shape.1\n"
"""Begins what is hashed: a new encoding must not meet an old one's digests."""

_QUANTITIES = ("cpu_millis", "memory_bytes", "gpu_count", "gpu_memory_bytes", "max_heartbeat_ms")


class SelectorOperator(IntEnum):
    """What a selector asks of a label. The numbers are those of the proto enum."""

    IN = 1
    NOT_IN = 2
    EXISTS = 3
    NOT_EXISTS = 4


@dataclass(frozen=True, slots=True, order=True)
class Selector:
    """One condition on an agent's labels. Values come out sorted, each once.

    Raises:
        ValueError: Values are missing with IN or NOT_IN, or given with another operator.
    """

    key: str
    operator: SelectorOperator
    values: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        takes_values = self.operator in (SelectorOperator.IN, SelectorOperator.NOT_IN)
        if takes_values != bool(self.values):
            rule = "needs values" if takes_values else "takes no values"
            raise ValueError(f"selector on {self.key!r}: {self.operator.name} {rule}")
        object.__setattr__(self, "values", tuple(sorted(set(self.values))))

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Returns whether ``labels`` satisfy it. An absent label satisfies NOT_IN."""
        match self.operator:
            case SelectorOperator.IN:
                return labels.get(self.key) in self.values
            case SelectorOperator.NOT_IN:
                return labels.get(self.key) not in self.values
            case SelectorOperator.EXISTS:
                return self.key in labels
            case SelectorOperator.NOT_EXISTS:
                return self.key not in labels

    def __str__(self) -> str:
        """As the command line takes it: ``zone=a``, ``zone in (a,b)``, ``zone!=a``, ``zone``, ``!zone``."""
        match self.operator:
            case SelectorOperator.IN:
                one, many = "=", " in "
            case SelectorOperator.NOT_IN:
                one, many = "!=", " notin "
            case SelectorOperator.EXISTS:
                return self.key
            case SelectorOperator.NOT_EXISTS:
                return f"!{self.key}"
        if len(self.values) == 1:
            return f"{self.key}{one}{self.values[0]}"
        return f"{self.key}{many}({','.join(self.values)})"


def max_heartbeat_ms(ttl: timedelta) -> int:
    """Returns the longest heartbeat interval, in ms, of an agent that may take a lease of ``ttl``."""
    return longest_heartbeat(ttl) // timedelta(milliseconds=1)


@dataclass(frozen=True, slots=True)
class Shape:
    """What an agent must have to run a job.

    Equal needs are equal shapes: the model's case, the order and repetition of
    selectors, and GPU conditions without GPUs are normalised away.

    Raises:
        ValueError: A quantity is negative, or the runtime is empty.
    """

    cpu_millis: int
    """Milli-CPUs held while it runs, >= 0."""
    memory_bytes: int
    """Host memory held while it runs, >= 0; 0: nothing is reserved."""
    gpu_count: int
    """Whole GPUs, held exclusively, >= 0."""
    gpu_model: str
    """Case-folded substring of the model's name; empty: any."""
    gpu_memory_bytes: int
    """Least memory of each GPU; 0: any."""
    selectors: tuple[Selector, ...]
    """Sorted. All must match the agent's labels."""
    runtime: str
    """Name of the runtime."""
    max_heartbeat_ms: int
    """An agent that renews more rarely cannot take it."""
    needs_user: bool
    """It runs as a named user, so the runtime must be able to set one."""

    def __post_init__(self) -> None:
        for name in _QUANTITIES:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not self.runtime:
            raise ValueError("a shape needs a runtime")
        object.__setattr__(self, "gpu_model", self.gpu_model.casefold() if self.gpu_count else "")
        object.__setattr__(self, "gpu_memory_bytes", self.gpu_memory_bytes if self.gpu_count else 0)
        object.__setattr__(self, "selectors", tuple(sorted(set(self.selectors))))

    def takes_gpu(self, model: str, memory_bytes: int) -> bool:
        """Returns whether a GPU of this model and memory would do."""
        return memory_bytes >= self.gpu_memory_bytes and self.gpu_model in model.casefold()

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON values; :meth:`from_json` gives an equal shape."""
        return {
            "cpu_millis": self.cpu_millis,
            "memory_bytes": self.memory_bytes,
            "gpu_count": self.gpu_count,
            "gpu_model": self.gpu_model,
            "gpu_memory_bytes": self.gpu_memory_bytes,
            "selectors": [
                {"key": selector.key, "operator": selector.operator.name, "values": list(selector.values)}
                for selector in self.selectors
            ],
            "runtime": self.runtime,
            "max_heartbeat_ms": self.max_heartbeat_ms,
            "needs_user": self.needs_user,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Shape:
        """Returns the shape that :meth:`to_json` wrote.

        Raises:
            KeyError: A field or an operator is unknown here.
            ValueError: A value breaks a rule.
        """
        return cls(
            cpu_millis=data["cpu_millis"],
            memory_bytes=data["memory_bytes"],
            gpu_count=data["gpu_count"],
            gpu_model=data["gpu_model"],
            gpu_memory_bytes=data["gpu_memory_bytes"],
            selectors=tuple(
                Selector(item["key"], SelectorOperator[item["operator"]], tuple(item["values"]))
                for item in data["selectors"]
            ),
            runtime=data["runtime"],
            max_heartbeat_ms=data["max_heartbeat_ms"],
            needs_user=data["needs_user"],
        )

    def digest(self) -> bytes:
        """Returns 32 bytes that are equal for equal shapes, in every process and version, and differ for others."""
        encoded = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(_ENCODING + encoded.encode("ascii")).digest()
