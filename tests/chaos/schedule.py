"""Which fault hits whom, when and for how long: drawn from a seed, and nothing else.

The promises hold within stated assumptions (docs/lease-protocol.md, "What is
assumed"); what breaks an assumption is not drawn: a keeper is not stopped for
long while its agent is in trouble, and keeper and agent are not killed together.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

FIRST_S = 2.0
"""The world is left alone for so long at first."""
LAST_S = 4.0
"""No fault begins later than so long before the end."""
PAUSE_S = (1.0, 5.5)
"""Between the begins of two faults."""
APART_S = 25.0
"""Faults of which at most one may be at work leave so much time between them: a lease and its margin run out in it."""


RENEWED_S = 12.0
"""So long after a fault was healed every agent has connected again and renews its leases."""


@dataclass(frozen=True, slots=True)
class FaultKind:
    """A kind of fault and how it may be drawn."""

    name: str
    part: str
    """What it breaks: ``net``, ``agent``, ``disk`` or ``keeper`` of one agent; ``server``, ``postgres``."""
    weight: float
    lasts_s: tuple[float, float]
    """Shortest, longest. One that is over at once has (0, 0)."""
    rare_long_s: tuple[float, float] | None = None
    """One in three lasts so long instead: longer than the shortest lease."""


_LONG = (12.0, 18.0)

KINDS = (
    FaultKind("partition", "net", 2.0, (0.5, 6.0), _LONG),
    FaultKind("partition up", "net", 1.5, (0.5, 6.0), _LONG),
    FaultKind("partition down", "net", 1.5, (0.5, 6.0), _LONG),
    FaultKind("loss", "net", 1.5, (2.0, 12.0)),
    FaultKind("link down", "net", 1.0, (0.5, 5.0), _LONG),
    FaultKind("delay", "net", 1.5, (2.0, 12.0)),
    FaultKind("reset", "net", 1.0, (0.0, 0.0)),
    FaultKind("agent kill", "agent", 2.0, (0.1, 4.0), _LONG),
    FaultKind("agent stop", "agent", 2.0, (0.5, 6.0), _LONG),
    FaultKind("agent restart", "agent", 1.0, (0.0, 2.0)),
    FaultKind("zygote kill", "agent", 1.0, (0.0, 0.0)),
    FaultKind("disk full", "disk", 1.0, (2.0, 15.0)),
    FaultKind("keeper kill", "keeper", 1.5, (0.0, 0.0)),
    FaultKind("keeper stop", "keeper", 1.5, (0.1, 0.8)),
    FaultKind("keeper long stop", "keeper", 2.5, (4.0, 14.0)),
    FaultKind("server kill", "server", 1.5, (0.1, 4.0)),
    FaultKind("server stop", "server", 1.5, (0.5, 6.0), _LONG),
    FaultKind("server restart", "server", 1.0, (0.0, 2.0)),
    FaultKind("backend kill", "postgres", 0.7, (0.0, 0.0)),
    FaultKind("backend stop", "postgres", 1.0, (0.5, 8.0)),
    FaultKind("postgres restart", "postgres", 0.7, (0.1, 5.0)),
)
BY_NAME = {kind.name: kind for kind in KINDS}

_FORBIDDEN = {
    # The agent must be there to end what a dead keeper leaves, and the zygote to bury it.
    ("keeper kill", "agent"),
    # A full disk and a dead agent together lose what only the agent's memory had.
    ("disk full", "agent"),
    ("disk full", "keeper"),
}
"""(kind, part) that must not be at work on one agent at the same time, either way round."""
_ALONE = "keeper long stop"
"""Only while leases are renewed is a keeper allowed to stand still for longer than a second."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A fault to come."""

    kind: str
    target: int
    """Number of the agent or replica; 0 for PostgreSQL."""
    at_s: float
    """From the begin of the run."""
    lasts_s: float

    @property
    def part(self) -> str:
        """What it breaks."""
        return BY_NAME[self.kind].part

    @property
    def until_s(self) -> float:
        """When it is healed."""
        return self.at_s + self.lasts_s

    @property
    def whom(self) -> str:
        """Such as ``agent:2``, ``server:0``, ``postgres``."""
        part = self.part
        return part if part == "postgres" else f"{'server' if part == 'server' else 'agent'}:{self.target}"


def draw_schedule(
    seed: int, seconds: float, *, agents: int, replicas: int, certain: Sequence[Planned] = ()
) -> list[Planned]:
    """Returns the faults of a run; the same arguments give the same faults.

    Args:
        seed: Draws them.
        seconds: How long the run is.
        agents: How many there are.
        replicas: How many there are.
        certain: Faults that are among them whatever the seed is.
    """
    rng = random.Random(f"schedule {seed}")
    drawn = list(certain)
    at_s = FIRST_S
    while at_s < seconds - LAST_S:
        kind = rng.choices(KINDS, [kind.weight for kind in KINDS])[0]
        shortest, longest = kind.lasts_s
        if kind.rare_long_s is not None and rng.random() < 1 / 3:
            shortest, longest = kind.rare_long_s
        lasts_s = min(rng.uniform(shortest, longest), seconds - at_s)
        number = {"server": replicas, "postgres": 1}.get(kind.part, agents)
        planned = Planned(kind.name, rng.randrange(number), round(at_s, 3), round(lasts_s, 3))
        if fits(planned, drawn):
            drawn.append(planned)
        at_s += rng.uniform(*PAUSE_S)
    return drawn


def fits(planned: Planned, others: Sequence[Planned]) -> bool:
    """Returns whether a fault may be added to those that there are: no assumption of the protocol is broken."""
    return all(_together(planned, other) for other in others)


def _together(one: Planned, other: Planned) -> bool:
    if one.whom == other.whom and one.part == other.part:
        return not _meet(one, other, 1.0)
    if _ALONE in (one.kind, other.kind):
        # Nor anything else that keeps leases of that agent from being renewed.
        shared = one.whom == other.whom or not {"server", "postgres"}.isdisjoint((one.part, other.part))
        alone, beside = (one, other) if one.kind == _ALONE else (other, one)
        clear = beside.until_s + RENEWED_S <= alone.at_s or alone.until_s + 1.0 <= beside.at_s
        return not shared or clear
    if one.whom == other.whom and ((one.kind, other.part) in _FORBIDDEN or (other.kind, one.part) in _FORBIDDEN):
        return not _meet(one, other, APART_S)
    return True


def _meet(one: Planned, other: Planned, apart_s: float) -> bool:
    return one.at_s < other.until_s + apart_s and other.at_s < one.until_s + apart_s
