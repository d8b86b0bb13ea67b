"""Conditions on an agent's labels."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from lessor.v1 import job_pb2


class SelectorOperator(IntEnum):
    """What a selector asks of a label."""

    IN = 1
    """The label is one of the values."""
    NOT_IN = 2
    """The label is absent or none of the values."""
    EXISTS = 3
    """The label is present."""
    NOT_EXISTS = 4
    """The label is absent."""


@dataclass(frozen=True, slots=True)
class LabelSelector:
    """One condition. ``lessor.units.parse_selector`` reads its written form."""

    key: str
    """The label's key."""
    operator: SelectorOperator = SelectorOperator.EXISTS
    values: tuple[str, ...] = ()
    """For IN and NOT_IN: at least one; else none."""

    @classmethod
    def from_proto(cls, message: job_pb2.LabelSelector) -> LabelSelector:
        """Reads it from the wire."""
        return cls(message.key, SelectorOperator(message.operator), tuple(message.values))

    def to_proto(self) -> job_pb2.LabelSelector:
        """Writes it for the wire."""
        return job_pb2.LabelSelector(
            key=self.key, operator=job_pb2.SelectorOperator.ValueType(self.operator), values=self.values
        )
