"""Reads and writes of the fleet: agents, GPUs, leases, queues; and what a planning cycle is given."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    Integer,
    Row,
    Select,
    Text,
    and_,
    bindparam,
    case,
    cast,
    func,
    insert,
    literal_column,
    or_,
    select,
    true,
    tuple_,
    union_all,
    update,
)
from sqlalchemy.exc import IntegrityError

from lessor.lifecycle import LeasePhase
from lessor.timing import SESSION_FRESH_INTERVALS, margin
from lessor_server.domain.errors import QueueExists
from lessor_server.planner.model import Agent, Candidate, Gpu, Group, Queue
from lessor_server.store import tables as t
from lessor_server.store.catalog import Catalog
from lessor_server.store.database import Database
from lessor_server.store.reads import rows, undisturbed

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


@dataclass(frozen=True, slots=True)
class GpuRow:
    """A GPU and who holds it."""

    uuid: str
    agent: str
    index: int
    model: str
    memory_bytes: int
    lease_id: int | None
    job_number: int | None
    utilization_percent: int
    memory_used_bytes: int


@dataclass(frozen=True, slots=True)
class LeaseRow:
    """A live lease."""

    lease_id: int
    job_number: int
    attempt: int
    phase: int
    agent: str
    gpu_uuids: list[str]
    granted_at: datetime
    ttl_ms: int
    renewed_at: int
    """Of its session, in ms of lease time."""
    clock: int
    """Lease time now, in ms."""
    cancel_requested: bool

    @property
    def time_left(self) -> timedelta:
        """Lease time until it may expire if no renewal comes; negative: it is due."""
        ttl = timedelta(milliseconds=self.ttl_ms)
        return ttl + margin(ttl) - timedelta(milliseconds=self.clock - self.renewed_at)


@dataclass(frozen=True, slots=True)
class QueueRow:
    """A queue and its counters."""

    id: int
    name: str
    paused: bool
    max_running: int | None
    max_gpus: int | None
    queued: int
    """Jobs waiting, those in backoff included."""
    running: int
    """Leases that hold something."""
    gpus: int


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


async def set_drained(database: Database, agent_id: str, drained: bool) -> bool:
    """Drains an agent or puts it back. Returns False when it is gone."""

    async def write() -> bool:
        async with database.begin() as connection:
            done = await connection.execute(update(t.agent).where(t.agent.c.id == agent_id).values(drained=drained))
            return done.rowcount == 1

    return await undisturbed(write())


# ---------------------------------------------------------------- GPUs and leases


@cache
def _gpus_query(one: bool) -> Select[Any]:
    gpu, held, agent = t.gpu, t.lease_gpu, t.agent
    query = (
        select(
            gpu.c.uuid,
            agent.c.name,
            gpu.c.index,
            gpu.c.model,
            gpu.c.memory_bytes,
            held.c.lease_id,
            held.c.job_id,
            gpu.c.utilization_percent,
            gpu.c.memory_used_bytes,
        )
        .select_from(
            gpu.join(agent, agent.c.id == gpu.c.agent_id).outerjoin(
                held, and_(held.c.agent_id == gpu.c.agent_id, held.c.gpu_uuid == gpu.c.uuid)
            )
        )
        .order_by(agent.c.name, agent.c.id, gpu.c.index)
    )
    return query.where(agent.c.id == bindparam("agent_id", type_=Text)) if one else query


async def read_gpus(database: Database, agent_id: str | None) -> list[GpuRow]:
    """Returns the GPUs of one agent, or of all, by agent and index."""
    parameters = None if agent_id is None else {"agent_id": agent_id}
    return [GpuRow(*tuple(row)) for row in await rows(database, _gpus_query(agent_id is not None), parameters)]


@cache
def _leases_query(one: bool) -> Select[Any]:
    lease, agent = t.lease, t.agent
    query = (
        select(
            lease.c.lease_id,
            lease.c.job_id,
            lease.c.attempt,
            lease.c.phase,
            func.coalesce(agent.c.name, lease.c.agent_id),
            lease.c.gpu_uuids,
            lease.c.granted_at,
            lease.c.ttl_ms,
            t.session.c.renewed_at,
            t.leader.c.clock,
            lease.c.cancel_requested,
        )
        .select_from(
            lease.join(t.leader, true())
            .join(t.session, t.session.c.id == lease.c.session_id)
            .outerjoin(agent, agent.c.id == lease.c.agent_id)
        )
        .where(lease.c.lease_id > bindparam("after", type_=BigInteger))
        .order_by(lease.c.lease_id)
        .limit(bindparam("count", type_=Integer))
    )
    return query.where(lease.c.agent_id == bindparam("agent_id", type_=Text)) if one else query


async def read_leases(database: Database, agent_id: str | None, after: int, count: int) -> list[LeaseRow]:
    """Returns live leases with a lease_id above ``after``, of one agent or of all, by lease_id, at most ``count``."""
    parameters: dict[str, Any] = {"after": after, "count": count}
    if agent_id is not None:
        parameters["agent_id"] = agent_id
    return [LeaseRow(*tuple(row)) for row in await rows(database, _leases_query(agent_id is not None), parameters)]


# ---------------------------------------------------------------- queues


def _holdings_by_queue() -> Any:
    return (
        select(
            t.lease.c.queue_id,
            func.count().label("running"),
            func.sum(func.cardinality(t.lease.c.gpu_uuids)).label("gpus"),
        )
        .where(_HOLDS)
        .group_by(t.lease.c.queue_id)
        .subquery("holdings")
    )


@cache
def _queues_query(counted: bool, one: bool) -> Select[Any]:
    queue, holdings = t.queue, _holdings_by_queue()
    waiting: ColumnElement[Any] = literal_column("0", BigInteger)
    if counted:
        waiting = (
            select(func.count()).select_from(t.ready).where(t.ready.c.queue_id == queue.c.id).scalar_subquery()
            + select(func.count()).select_from(t.delayed).where(t.delayed.c.queue_id == queue.c.id).scalar_subquery()
        )
    query = (
        select(
            queue.c.id,
            queue.c.name,
            queue.c.paused,
            queue.c.max_running,
            queue.c.max_gpus,
            waiting.label("queued"),
            cast(func.coalesce(holdings.c.running, 0), BigInteger),
            cast(func.coalesce(holdings.c.gpus, 0), BigInteger),
        )
        .select_from(queue.outerjoin(holdings, holdings.c.queue_id == queue.c.id))
        .order_by(queue.c.name)
    )
    return query.where(queue.c.name == bindparam("name", type_=Text)) if one else query


async def read_queues(database: Database) -> list[QueueRow]:
    """Returns all queues with their counters, by name."""
    return [QueueRow(*tuple(row)) for row in await rows(database, _queues_query(True, False))]


async def read_queue(database: Database, name: str) -> QueueRow | None:
    """Returns one queue with its counters; None: there is none of this name."""
    found = await rows(database, _queues_query(True, True), {"name": name})
    return QueueRow(*tuple(found[0])) if found else None


async def create_queue(
    database: Database, name: str, *, paused: bool, max_running: int | None, max_gpus: int | None
) -> None:
    """Makes a queue.

    Raises:
        QueueExists: There is one of this name.
    """
    values = {"name": name, "paused": paused, "max_running": max_running, "max_gpus": max_gpus}

    async def write() -> None:
        async with database.begin() as connection:
            await connection.execute(insert(t.queue).values(**values))

    try:
        await undisturbed(write())
    except IntegrityError:
        raise QueueExists(name) from None


async def update_queue(database: Database, name: str, changes: Mapping[str, Any]) -> bool:
    """Sets columns (paused, max_running, max_gpus) of a queue. Returns False when there is none of this name."""

    async def write() -> bool:
        async with database.begin() as connection:
            done = await connection.execute(update(t.queue).where(t.queue.c.name == name).values(**changes))
            return done.rowcount == 1

    return await undisturbed(write())


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
    found = await read_agents(database)
    gpus: defaultdict[str, list[Gpu]] = defaultdict(list)
    held: defaultdict[str, set[str]] = defaultdict(set)
    for row in await rows(database, _fleet_gpus_query()):
        if row.held:
            held[row.agent_id].add(row.uuid)
        else:
            gpus[row.agent_id].append(Gpu(row.uuid, row.index, row.model, row.memory_bytes))
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
        for row in await rows(database, _queues_query(False, False))
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
    found = await rows(database, groups_query(), {"per_group": per_group + 1})
    lines: dict[tuple[int, int], list[Row[Any]]] = {}
    for row in found:
        lines.setdefault((row.queue_id, row.shape_id), []).append(row)
    shapes = await catalog.shapes(shape_id for _, shape_id in lines)
    groups = []
    for (queue_id, shape_id), line in sorted(lines.items()):
        candidates = sorted(
            (Candidate(row.job_id, row.priority, row.job_id) for row in line), key=lambda candidate: candidate.order
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
