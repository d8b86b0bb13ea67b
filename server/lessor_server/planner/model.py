"""What the planner is given and what it answers.

All of it is a snapshot: the store reads it without locks, the planner decides,
and the claim statement drops what has changed meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lessor_server.domain.shape import Shape
from lessor_server.planner.reasons import PendingReason

DEFAULT_MAX_OFFERS = 64
DEFAULT_MAX_GRANTS = 1000


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU of an agent."""

    uuid: str
    index: int
    """On its host."""
    model: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent, what it has, and what of it is in use.

    Raises:
        ValueError: Two of its GPUs have one UUID.
    """

    agent_id: str
    name: str
    session_id: int
    epoch: int
    labels: Mapping[str, str]
    runtimes: frozenset[str]
    can_set_user: frozenset[str]
    """Those of its runtimes that can run a job as another user."""
    heartbeat_ms: int
    cpu_millis: int
    memory_bytes: int
    gpus: tuple[Gpu, ...]
    fresh: bool
    """It is connected: its session was renewed within two heartbeat intervals."""
    drained: bool
    offers: int = 0
    """Leases offered to it and not accepted yet."""
    cpu_millis_used: int = 0
    memory_bytes_used: int = 0
    gpus_used: frozenset[str] = frozenset()
    """UUIDs held by live leases, or still held as the agent says."""

    def __post_init__(self) -> None:
        if len({gpu.uuid for gpu in self.gpus}) != len(self.gpus):
            raise ValueError(f"agent {self.agent_id} lists a GPU twice")


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue and what of its limits is used."""

    queue_id: int
    name: str
    paused: bool = False
    max_running: int | None = None
    """Live leases it may have; None: any number."""
    max_gpus: int | None = None
    """GPUs it may hold; None: any number."""
    running: int = 0
    """Live leases it has."""
    gpus: int = 0
    """GPUs it holds."""


class Candidate(NamedTuple):
    """A job that waits and may start."""

    job_id: int
    priority: int
    """Higher goes first."""
    seq: int
    """Age: lower goes first."""

    @property
    def order(self) -> tuple[int, int, int]:
        """What sorts jobs: the first in this order goes first."""
        return (-self.priority, self.seq, self.job_id)


@dataclass(frozen=True, slots=True)
class Group:
    """The waiting jobs of one queue and one shape."""

    queue_id: int
    shape_id: int
    shape: Shape
    candidates: tuple[Candidate, ...]
    """The first of them, in :attr:`Candidate.order`."""
    waiting: int
    """How many there are in all, at least as many as ``candidates``."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Bounds of a planning cycle."""

    max_offers: int = DEFAULT_MAX_OFFERS
    """Offers an agent may have that it has not accepted."""
    max_grants: int = DEFAULT_MAX_GRANTS
    """Grants of one cycle, and so the size of one claim statement."""


@dataclass(frozen=True, slots=True)
class Grant:
    """One job, one agent."""

    job_id: int
    queue_id: int
    shape_id: int
    agent_id: str
    session_id: int
    epoch: int
    gpu_uuids: tuple[str, ...]
    """In order of their index on the host."""


@dataclass(frozen=True, slots=True)
class Unplaced:
    """Jobs of one group that this cycle could not place, all for one reason."""

    queue_id: int
    shape_id: int
    reason: PendingReason
    waiting: int
    """How many, those not among the candidates included."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a planning cycle decided."""

    grants: tuple[Grant, ...]
    """In the order the jobs go."""
    unplaced: tuple[Unplaced, ...]
    """By queue and shape."""
    complete: bool
    """False: max_grants or the end of a group's candidates cut it short; another cycle may place more at once."""
