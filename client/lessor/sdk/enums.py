"""The contract's enumerations, as Python's.

The numbers are those of ``proto/lessor/v1``; a test holds them together. Zero,
"never sent", is ``None`` here. A number of a newer server becomes a member
named ``UNKNOWN_<n>``, so that an older client keeps working.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Self, TypeVar

from lessor.lifecycle import LeasePhase, Outcome

AnyIntEnum = TypeVar("AnyIntEnum", bound=IntEnum)


class OpenEnum(IntEnum):
    """An enumeration that takes numbers it does not know yet."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, int) or value <= 0:
            return None
        member = int.__new__(cls, value)
        member._name_ = f"UNKNOWN_{value}"
        member._value_ = value
        return member


class JobState(OpenEnum):
    """Where a job stands."""

    QUEUED = 1
    """Waiting for a place, or for the end of a retry's backoff."""
    LEASED = 2
    """Offered to an agent or accepted by it, not yet running."""
    RUNNING = 3
    """An attempt runs, or has ended and its last log bytes are on their way."""
    SUCCEEDED = 4
    """The last attempt succeeded. Terminal."""
    FAILED = 5
    """A budget or a timeout is exhausted. Terminal."""
    CANCELLED = 6
    """Cancelled before it succeeded. Terminal."""

    @property
    def is_terminal(self) -> bool:
        """True when it never changes again."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


class ErrorClass(OpenEnum):
    """Whose fault an error is."""

    APPLICATION = 1
    INFRASTRUCTURE = 2
    TIMEOUT = 3
    INVALID = 4


class LogStream(OpenEnum):
    """Which of a workload's two output streams."""

    STDOUT = 1
    STDERR = 2


class PendingReason(OpenEnum):
    """Why a job is not running."""

    NOT_PENDING = 1
    BACKOFF = 2
    QUEUE_PAUSED = 3
    QUEUE_LIMIT = 4
    NO_AGENT_WITH_RUNTIME = 5
    NO_AGENT_FITS_EVER = 6
    FITS_BUT_BUSY = 7
    STARTING = 8
    LEASED = 9
    NO_AGENT_CONNECTED = 10


class CancelResult(OpenEnum):
    """What became of a cancel."""

    CANCELLED = 1
    """The job is CANCELLED."""
    REQUESTED = 2
    """Its running attempt was asked to stop."""
    ALREADY_TERMINAL = 3
    """It had ended before; nothing changed."""
    NOT_FOUND = 4
    """No such job."""


class AgentState(OpenEnum):
    """Where an agent stands."""

    ACTIVE = 1
    """Connected and renewing; gets jobs."""
    DRAINING = 2
    """Connected; gets no new jobs."""
    DISCONNECTED = 3
    """Has not renewed within two heartbeat intervals."""


def word(member: Enum) -> str:
    """Returns the lower-case word people and JSON see: ``"queued"``."""
    return member.name.lower()


def from_number(enum: type[AnyIntEnum], number: int) -> AnyIntEnum | None:
    """Returns the member with ``number``; None for 0 and for a number a closed enumeration does not know."""
    try:
        return enum(number) if number else None
    except ValueError:
        return None


__all__ = [
    "AgentState",
    "CancelResult",
    "ErrorClass",
    "JobState",
    "LeasePhase",
    "LogStream",
    "Outcome",
    "PendingReason",
    "from_number",
    "word",
]
