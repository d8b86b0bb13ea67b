"""What FleetService shows and changes: drains, GPUs, live leases, queues."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Integer,
    Select,
    Text,
    and_,
    bindparam,
    cast,
    func,
    insert,
    literal_column,
    select,
    true,
    update,
)
from sqlalchemy.exc import IntegrityError

from lessor.lifecycle import LeasePhase
from lessor.timing import margin
from lessor_server.domain.errors import QueueExists
from lessor_server.store import tables as t
from lessor_server.store.database import Database
from lessor_server.store.reads import rows, undisturbed


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
    agent_id: str


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


async def set_drained(database: Database, agent_id: str, drained: bool) -> bool:
    """Drains an agent or puts it back. Returns False when it is gone.

    No lease is made on a drained agent from the commit on: a claim that was
    planned before finds its session drained, which a trigger sees to. Locks: the
    agent, as a Hello does, then its sessions.
    """

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
            gpu.c.agent_id,
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
            # A draining lease has given back what it held.
            func.count().label("running"),
            func.sum(func.cardinality(t.lease.c.gpu_uuids)).label("gpus"),
        )
        .where(t.lease.c.phase < int(LeasePhase.DRAINING))
        .group_by(t.lease.c.queue_id)
        .subquery("holdings")
    )


@cache
def queues_query(counted: bool, one: bool) -> Select[Any]:
    """Queues by name, with their waiting jobs counted or 0; with ``one`` that of the parameter ``name``."""
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
    return [QueueRow(*tuple(row)) for row in await rows(database, queues_query(True, False))]


async def read_queue(database: Database, name: str) -> QueueRow | None:
    """Returns one queue with its counters; None: there is none of this name."""
    found = await rows(database, queues_query(True, True), {"name": name})
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
