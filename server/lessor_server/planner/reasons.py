"""Why a job is not running, as an enumeration with numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum


class PendingReason(IntEnum):
    """Why a job is not running. The numbers are those of the proto enum."""

    NOT_PENDING = 1
    """It is running or has ended."""
    BACKOFF = 2
    """A retry waits for its backoff to pass."""
    QUEUE_PAUSED = 3
    QUEUE_LIMIT = 4
    """Its queue is at its limit of running jobs or GPUs."""
    NO_AGENT_WITH_RUNTIME = 5
    """No connected agent has its runtime."""
    NO_AGENT_FITS_EVER = 6
    """No connected agent that takes jobs could hold it even when idle."""
    FITS_BUT_BUSY = 7
    """Agents fit but are full."""
    STARTING = 8
    """It could start now and will in the next planning cycle."""
    LEASED = 9
    """It has a lease; the agent prepares the start."""
    NO_AGENT_CONNECTED = 10
    """No agent is connected at all."""


@dataclass(frozen=True, slots=True)
class Reason:
    """One reason, with numbers."""

    reason: PendingReason
    message: str
    """One sentence for people, with the numbers in it."""
    remedy: str = ""
    """The smallest change that would help; empty: wait."""
    numbers: Mapping[str, int] = field(default_factory=dict)
    """The numbers, by name."""
