"""The fleet as the planner is given it: agents and what is free on them, queues, the jobs that wait."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any

import asyncpg
from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    Integer,
    Select,
    Text,
    and_,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    or_,
    select,
    true,
    tuple_,
    union_all,
)

from lessor.lifecycle import LeasePhase
from lessor.timing import SESSION_FRESH_INTERVALS
from lessor_server.planner.model import Agent, Candidate, Gpu, Group, Queue
from lessor_server.store import tables as t
from lessor_server.store.catalog import Catalog
from lessor_server.store.database import Database
from lessor_server.store.fleet_status import queues_query
from lessor_server.store.reads import plain_rows, rows

# A draining lease has given back what it held: only its log is on the way.
_HOLDS = t.lease.c.phase < int(LeasePhase.DRAINING)


@dataclass(frozen=True, slots=True)
class AgentRow:
    """An agent and what of it is used."""

    id: str
    name: str
    version: str
    labels: dict[str, str]
    runtimes: list[dict[str, Any]]
    """``[{"name": …, "can_set_user": …}]``"""
    cpu_millis: int
    memory_bytes: int
    heartbeat_ms: int
    connected_at: datetime
    drained: bool
    session_id: int | None
    epoch: int | None
    fresh: bool
    """Its session was renewed within two heartbeat intervals of lease time."""
    leases: int
    """Live leases, draining ones included."""
    offers: int
    cpu_millis_used: int
    memory_bytes_used: int


# ---------------------------------------------------------------- agents


@cache
def agents_query(one: bool) -> Select[Any]:
    """All agents, by name; with ``one`` those whose id or name is the parameter ``agent``."""
    held = (
        select(
            t.lease.c.agent_id,
            t.lease.c.shape_id,
            func.count().label("leases"),
            func.count().filter(_HOLDS).label("holding"),
            func.count().filter(t.lease.c.phase == int(LeasePhase.OFFERED)).label("offers"),
        )
        .group_by(t.lease.c.agent_id, t.lease.c.shape_id)
        .subquery("held")
    )

    def needs(name: str) -> ColumnElement[int]:
        return func.sum(held.c.holding * cast(t.shape.c.spec[name].astext, BigInteger))

    used = (
        select(
            held.c.agent_id,
            func.sum(held.c.leases).label("leases"),
            func.sum(held.c.offers).label("offers"),
            needs("cpu_millis").label("cpu_millis"),
            needs("memory_bytes").label("memory_bytes"),
        )
        .select_from(held.join(t.shape, t.shape.c.id == held.c.shape_id))
        .group_by(held.c.agent_id)
        .subquery("used")
    )
    agent, session, leader = t.agent, t.session, t.leader
    fresh = leader.c.clock - session.c.renewed_at <= SESSION_FRESH_INTERVALS * session.c.heartbeat_ms

    def number(column: ColumnElement[Any]) -> ColumnElement[int]:
        return cast(func.coalesce(column, 0), BigInteger)

    query = (
        select(
            agent.c.id,
            agent.c.name,
            agent.c.version,
            agent.c.labels,
            agent.c.runtimes,
            agent.c.cpu_millis,
            agent.c.memory_bytes,
            agent.c.heartbeat_ms,
            agent.c.connected_at,
            agent.c.drained,
            agent.c.session_id,
            session.c.epoch,
            func.coalesce(and_(fresh, session.c.host_gone.is_(False)), False).label("fresh"),
            number(used.c.leases),
            number(used.c.offers),
            number(used.c.cpu_millis),
            number(used.c.memory_bytes),
        )
        .select_from(
            agent.join(leader, true())
            .outerjoin(session, session.c.id == agent.c.session_id)
            .outerjoin(used, used.c.agent_id == agent.c.id)
        )
        .order_by(agent.c.name, agent.c.id)
    )
    if one:
        named = bindparam("agent", type_=Text)
        query = query.where(or_(agent.c.id == named, agent.c.name == named))
    return query


async def read_agents(database: Database) -> list[AgentRow]:
    """Returns all agents, by name."""
    return [AgentRow(*tuple(row)) for row in await rows(database, agents_query(False))]


async def read_agent(database: Database, named: str) -> AgentRow | None:
    """Returns the agent of this id, else the one of this name that connected last; None: there is none."""
    found = [AgentRow(*tuple(row)) for row in await rows(database, agents_query(True), {"agent": named})]
    by_id = next((agent for agent in found if agent.id == named), None)
    return by_id or max(found, key=lambda agent: agent.connected_at, default=None)


# ---------------------------------------------------------------- what a planning cycle is given


@cache
def _fleet_gpus_query() -> Select[Any]:
    listed = select(
        t.gpu.c.agent_id,
        t.gpu.c.uuid,
        t.gpu.c.index,
        t.gpu.c.model,
        t.gpu.c.memory_bytes,
        literal_column("false", Boolean).label("held"),
    )
    held = select(
        t.lease_gpu.c.agent_id,
        t.lease_gpu.c.gpu_uuid,
        literal_column("0", Integer),
        literal_column("''", Text),
        literal_column("0", BigInteger),
        literal_column("true", Boolean),
    )
    every = union_all(listed, held).subquery("every")
    return select(every).order_by(every.c.agent_id, every.c.index, every.c.uuid)


async def load_fleet(database: Database) -> list[Agent]:
    """Returns all known agents with what is free on them, for the planner. Two statements, however many agents.

    The GPUs are read after the leases: one that was granted in between is taken
    for held, never for free. (Only the leader grants, and it is the one that plans.)
    """
    found = [AgentRow(*row.values()) for row in await plain_rows(database, agents_query(False))]
    gpus: defaultdict[str, list[Gpu]] = defaultdict(list)
    held: defaultdict[str, set[str]] = defaultdict(set)
    for row in await plain_rows(database, _fleet_gpus_query()):
        if row["held"]:
            held[row["agent_id"]].add(row["uuid"])
        else:
            gpus[row["agent_id"]].append(Gpu(row[1], row[2], row[3], row[4]))
    return [_planner_agent(row, gpus[row.id], held[row.id]) for row in found]


def _planner_agent(row: AgentRow, gpus: list[Gpu], held: set[str]) -> Agent:
    return Agent(
        agent_id=row.id,
        name=row.name,
        session_id=row.session_id or 0,
        epoch=row.epoch or 0,
        labels=row.labels,
        runtimes=frozenset(runtime["name"] for runtime in row.runtimes),
        can_set_user=frozenset(runtime["name"] for runtime in row.runtimes if runtime["can_set_user"]),
        heartbeat_ms=row.heartbeat_ms,
        cpu_millis=row.cpu_millis,
        memory_bytes=row.memory_bytes,
        gpus=tuple(gpus),
        fresh=row.fresh,
        drained=row.drained,
        offers=row.offers,
        cpu_millis_used=row.cpu_millis_used,
        memory_bytes_used=row.memory_bytes_used,
        gpus_used=frozenset(held),
    )


async def load_queues(database: Database) -> dict[int, Queue]:
    """Returns queue_id → queue with what of its limits is used, for the planner."""
    return {
        row[0]: Queue(row[0], row[1], row[2], row[3], row[4], running=row[6], gpus=row[7])
        for row in await plain_rows(database, queues_query(False, False))
    }


@cache
def groups_query() -> Select[Any]:
    """The statement of :func:`load_groups`; parameter per_group.

    It hops from one (queue, shape) to the next along the claim index, so it costs
    per group, not per waiting job.
    """
    ready, after = t.ready, t.ready.alias("after")
    first = (
        select(ready.c.queue_id, ready.c.shape_id)
        .order_by(ready.c.queue_id, ready.c.shape_id)
        .limit(1)
        .subquery("first")
    )
    groups = select(first).cte("groups", recursive=True)
    hop = (
        select(after.c.queue_id, after.c.shape_id)
        .where(tuple_(after.c.queue_id, after.c.shape_id) > tuple_(groups.c.queue_id, groups.c.shape_id))
        .order_by(after.c.queue_id, after.c.shape_id)
        .limit(1)
        .lateral("hop")
    )
    groups = groups.union_all(select(hop.c.queue_id, hop.c.shape_id).select_from(groups.join(hop, true())))
    best = (
        select(ready.c.job_id, ready.c.priority)
        .where(ready.c.queue_id == groups.c.queue_id, ready.c.shape_id == groups.c.shape_id)
        .order_by(ready.c.priority.desc(), ready.c.job_id)
        .limit(bindparam("per_group", type_=Integer))
        .lateral("best")
    )
    return select(groups.c.queue_id, groups.c.shape_id, best.c.job_id, best.c.priority).select_from(
        groups.join(best, true())
    )


async def load_groups(database: Database, catalog: Catalog, per_group: int) -> list[Group]:
    """Returns the waiting jobs of each (queue, shape), the first ``per_group`` of each in the order they go.

    ``waiting`` is exact up to ``per_group``; beyond it says only that there are more.
    """
    found = await plain_rows(database, groups_query(), {"per_group": per_group + 1})
    lines: dict[tuple[int, int], list[asyncpg.Record]] = {}
    for row in found:
        lines.setdefault((row["queue_id"], row["shape_id"]), []).append(row)
    shapes = await catalog.shapes(shape_id for _, shape_id in lines)
    groups = []
    for (queue_id, shape_id), line in sorted(lines.items()):
        candidates = sorted(
            (Candidate(row["job_id"], row["priority"], row["job_id"]) for row in line),
            key=lambda candidate: candidate.order,
        )
        groups.append(Group(queue_id, shape_id, shapes[shape_id], tuple(candidates[:per_group]), len(candidates)))
    return groups


# ---------------------------------------------------------------- one job to explain

AHEAD_COUNTED = 100_000
"""Jobs that go first are counted up to this number."""


@dataclass(frozen=True, slots=True)
class WaitingRow:
    """What is asked about a job that may be waiting."""

    queue_id: int
    shape_id: int
    priority: int
    max_failures: int
    backoff_left: timedelta | None
    """None: it is in no backoff."""
    ahead: int
    """Waiting jobs of queues that are not paused that go first."""


@cache
def _waiting_query() -> Select[Any]:
    number = bindparam("number", type_=BigInteger)
    job, ready = t.job, t.ready
    first = (
        select(literal_column("1"))
        .select_from(ready.join(t.queue, t.queue.c.id == ready.c.queue_id))
        .where(
            t.queue.c.paused.is_(False),
            or_(ready.c.priority > job.c.priority, and_(ready.c.priority == job.c.priority, ready.c.job_id < number)),
        )
        .correlate(job)
        .limit(AHEAD_COUNTED)
        .subquery("first_ones")
    )
    # Not counted for a job that does not wait: the count is the costly part.
    waits = or_(
        select(literal_column("true")).select_from(ready).where(ready.c.job_id == number).scalar_subquery(),
        t.delayed.c.job_id.is_not(None),
    )
    ahead = select(func.count()).select_from(first.lateral()).scalar_subquery()
    return (
        select(
            job.c.queue_id,
            job.c.shape_id,
            job.c.priority,
            job.c.max_failures,
            t.delayed.c.not_before - func.now(),
            case((waits, ahead), else_=0),
        )
        .select_from(job.outerjoin(t.delayed, t.delayed.c.job_id == job.c.id))
        .where(job.c.id == number)
    )


async def read_waiting(database: Database, number: int) -> WaitingRow | None:
    """Returns what there is to say about a job's wait; None: there is no such job."""
    found = await rows(database, _waiting_query(), {"number": number})
    return WaitingRow(*tuple(found[0])) if found else None
