"""Committing a Hello: who the agent is, its session, and what stands in its name.

The order is the protocol's: the new epoch is committed first, then leases are
read, in a new statement. A claim, an accept or a renewal in the old epoch's name
either committed before, and is seen, or is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from lessor import timing
from lessor.lifecycle import LeasePhase, Outcome
from lessor_server.domain.errors import AgentIdentityInUse
from lessor_server.store.database import Database
from lessor_server.store.logs import Position, read_positions


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """A GPU as the agent found it."""

    uuid: str
    index: int
    model: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class AgentFacts:
    """What a Hello says of the agent and its host."""

    agent_id: str
    name: str
    version: str
    labels: Mapping[str, str]
    runtimes: Sequence[Mapping[str, object]]
    cpu_millis: int
    memory_bytes: int
    heartbeat_ms: int
    hostname: str
    boot_id: str
    hardware_id: str
    gpus: Sequence[GpuFacts]


@dataclass(frozen=True, slots=True)
class Held:
    """A lease the agent says it holds."""

    job_number: int
    lease_id: int
    phase: LeasePhase


@dataclass(frozen=True, slots=True)
class SessionGrant:
    """The session the agent has from now on."""

    session_id: int
    epoch: int
    resumed: bool


class Answer:
    """Names of what to do with a held lease; the values of the proto's LeaseDecision."""

    KEEP = 1
    STALE = 2
    ENDED = 3


@dataclass(frozen=True, slots=True)
class HeldAnswer:
    """What to do with one held lease, and where its log stands."""

    lease_id: int
    decision: int
    log: Position


@dataclass(frozen=True, slots=True)
class Standing:
    """What stands in the agent's name after its Hello."""

    answers: list[HeldAnswer]
    """One per held lease."""
    unlisted: list[tuple[int, int]]
    """(job number, lease_id) that the database has and the agent did not list, offers of its session left out."""


async def commit_session(
    database: Database, facts: AgentFacts, session_id: int, replica: str, now: datetime | None = None
) -> SessionGrant:
    """Commits who the agent is and gives it a session with a new epoch.

    Args:
        database: The store.
        facts: What the Hello says.
        session_id: The session to resume; 0: begin a new one.
        replica: Name of this server process.
        now: The time; None: the database's clock.

    Raises:
        AgentIdentityInUse: Leases stand in its name on other hardware.
        DatabaseUnavailable: The outcome is unknown; the agent says Hello again.
    """
    async with database.transaction() as transaction:
        known = await transaction.fetch("lock_agent", agent_id=facts.agent_id)
        rebooted = False
        if known:
            before = known[0]
            same = _same_hardware(facts, before["hardware_id"], before["gpu_uuids"])
            if same is False and before["leases"]:
                raise AgentIdentityInUse(facts.agent_id, before["hostname"], before["leases"])
            rebooted = bool(same and facts.boot_id and before["boot_id"] and facts.boot_id != before["boot_id"])
        await transaction.fetch(
            "save_agent",
            now=now,
            agent_id=facts.agent_id,
            name=facts.name,
            version=facts.version,
            labels=json.dumps(dict(facts.labels)),
            runtimes=json.dumps([dict(r) for r in facts.runtimes]),
            cpu_millis=facts.cpu_millis,
            memory_bytes=facts.memory_bytes,
            heartbeat_ms=facts.heartbeat_ms,
            hostname=facts.hostname,
            boot_id=facts.boot_id,
            hardware_id=facts.hardware_id,
        )
        await transaction.fetch(
            "save_gpus",
            agent_id=facts.agent_id,
            uuids=[g.uuid for g in facts.gpus],
            indexes=[g.index for g in facts.gpus],
            models=[g.model for g in facts.gpus],
            memories=[g.memory_bytes for g in facts.gpus],
        )
        if session_id and known and known[0]["session_id"] == session_id and not rebooted:
            rows = await transaction.fetch(
                "resume_session",
                session_id=session_id,
                agent_id=facts.agent_id,
                heartbeat_ms=facts.heartbeat_ms,
                replica=replica,
            )
            if rows:
                return SessionGrant(session_id, rows[0]["epoch"], resumed=True)
        (row,) = await transaction.fetch(
            "begin_session",
            agent_id=facts.agent_id,
            heartbeat_ms=facts.heartbeat_ms,
            replica=replica,
            host_gone=rebooted,
        )
        await transaction.fetch("set_agent_session", agent_id=facts.agent_id, session_id=row["id"])
        return SessionGrant(row["id"], row["epoch"], resumed=False)


def _same_hardware(facts: AgentFacts, hardware_id: str, gpu_uuids: Sequence[str]) -> bool | None:
    """Returns whether the agent speaks from the hardware it had; None: nobody can tell."""
    if facts.hardware_id and hardware_id:
        return facts.hardware_id == hardware_id
    now = sorted(g.uuid for g in facts.gpus)
    if now and gpu_uuids:
        return now == sorted(gpu_uuids)
    return None


async def hold_back(database: Database, agent_id: str, held: Sequence[Held], now: datetime | None = None) -> None:
    """Keeps jobs that wait from being given to anybody while the agent that has finished them reports it.

    Call it before the agent's session is committed, which may have it given jobs.

    Args:
        database: The store.
        agent_id: The agent.
        held: As it lists them.
        now: The time; None: the database's clock.

    Raises:
        DatabaseUnavailable: The agent says Hello again.
    """
    ended = [h for h in held if h.phase is LeasePhase.DRAINING]
    if ended:
        await database.fetch(
            "hold_back",
            now=now,
            agent_id=agent_id,
            job_ids=[h.job_number for h in ended],
            lease_ids=[h.lease_id for h in ended],
            pause=timing.END_COMES,
        )


async def take_standing(database: Database, agent_id: str, session: SessionGrant, held: Sequence[Held]) -> Standing:
    """Moves the held leases to the session and tells what to do with each.

    Raises:
        DatabaseUnavailable: The agent says Hello again.
    """
    if held:
        await database.fetch(
            "adopt_leases",
            session_id=session.session_id,
            epoch=session.epoch,
            agent_id=agent_id,
            job_ids=[h.job_number for h in held],
            lease_ids=[h.lease_id for h in held],
        )
    rows = await database.fetch("read_agent_leases", agent_id=agent_id)
    standing = {(row["job_id"], row["lease_id"]): row for row in rows}
    listed = {(h.job_number, h.lease_id) for h in held}
    positions = await read_positions(database, [h.lease_id for h in held]) if held else {}
    gone = [h for h in held if (h.job_number, h.lease_id) not in standing]
    ended = await _decide_gone(database, agent_id, gone) if gone else {}
    answers = []
    for lease in held:
        row = standing.get((lease.job_number, lease.lease_id))
        if row is None:
            decision = ended[lease.lease_id]
        else:
            decision = Answer.ENDED if row["phase"] == LeasePhase.DRAINING else Answer.KEEP
        answers.append(HeldAnswer(lease.lease_id, decision, positions[lease.lease_id]))
    unlisted = [
        key
        for key, row in standing.items()
        if key not in listed
        # An offer of this very session is sent again instead.
        and not (row["phase"] == LeasePhase.OFFERED and row["session_id"] == session.session_id)
    ]
    return Standing(answers, unlisted)


async def _decide_gone(database: Database, agent_id: str, gone: Sequence[Held]) -> dict[int, int]:
    """Returns lease_id → what to do with a held lease that does not stand any more."""
    rows = await database.fetch(
        "settle_reports",
        job_ids=[h.job_number for h in gone],
        lease_ids=[h.lease_id for h in gone],
        agent_ids=[agent_id] * len(gone),
    )
    phases = {h.lease_id: h.phase for h in gone}
    decisions: dict[int, int] = {}
    for row in rows:
        lease_id, recorded = row["lease_id"], row["recorded"]
        if recorded is not None and recorded not in (Outcome.LOST, Outcome.WITHDRAWN):
            decisions[lease_id] = Answer.ENDED
        elif recorded is not None and row["waits"] and phases[lease_id] is LeasePhase.DRAINING:
            # It ended while we counted it lost, and nobody has had the job since:
            # let its end arrive, finished work is not run again.
            decisions[lease_id] = Answer.KEEP
        else:
            decisions[lease_id] = Answer.STALE
    return decisions
