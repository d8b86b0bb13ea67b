"""Agents, GPUs, leases and queues, as FleetService shows and changes them."""

from __future__ import annotations

import base64
import binascii
import struct
from datetime import timedelta
from typing import Any

from google.protobuf.duration_pb2 import Duration

from lessor.ids import encode_job_id
from lessor.v1 import fleet_service_pb2 as pb
from lessor.v1 import job_pb2
from lessor_server.bells import Bells
from lessor_server.domain.errors import AgentNotFound, InvalidField, QueueNotFound
from lessor_server.services.job_view import timestamp
from lessor_server.store.database import Database
from lessor_server.store.fleet_queries import AgentRow, read_agent, read_agents
from lessor_server.store.fleet_status import (
    GpuRow,
    LeaseRow,
    QueueRow,
    create_queue,
    read_gpus,
    read_leases,
    read_queue,
    read_queues,
    set_drained,
    update_queue,
)

DEFAULT_PAGE_SIZE = 100

_TOKEN = struct.Struct(">q")


class Fleet:
    """The fleet and the queues of one database."""

    def __init__(self, database: Database, bells: Bells) -> None:
        self._database = database
        self._bells = bells

    async def agents(self) -> list[pb.Agent]:
        """Returns all agents, by name."""
        counts = await self._gpu_counts(None)
        return [_agent(row, counts) for row in await read_agents(self._database)]

    async def agent(self, named: str) -> pb.Agent:
        """Returns the agent of this id, else the one of this name that connected last.

        Raises:
            AgentNotFound: There is none.
        """
        row = await self._find(named)
        return _agent(row, await self._gpu_counts(row.id))

    async def gpus(self, agent: str) -> list[pb.GpuStatus]:
        """Returns the GPUs of one agent, by id or name; of all with an empty one.

        Raises:
            AgentNotFound: There is none.
        """
        agent_id = (await self._find(agent)).id if agent else None
        return [_gpu(row) for row in await read_gpus(self._database, agent_id)]

    async def leases(self, request: pb.ListLeasesRequest) -> pb.ListLeasesResponse:
        """Returns one page of live leases, oldest first.

        Raises:
            AgentNotFound: The agent asked for does not exist.
            InvalidField: The page token is not one.
        """
        after = _read_token(request.page_token) if request.page_token else 0
        agent_id = (await self._find(request.agent)).id if request.agent else None
        page_size = request.page_size or DEFAULT_PAGE_SIZE
        found = await read_leases(self._database, agent_id, after, page_size + 1)
        response = pb.ListLeasesResponse(leases=[_lease(row) for row in found[:page_size]])
        if len(found) > page_size:
            token = base64.urlsafe_b64encode(_TOKEN.pack(found[page_size - 1].lease_id))
            response.next_page_token = token.decode("ascii").rstrip("=")
        return response

    async def drain(self, named: str, drained: bool) -> pb.Agent:
        """Stops placing jobs on an agent, or takes that back. What runs there goes on.

        Raises:
            AgentNotFound: There is none.
        """
        row = await self._find(named)
        if not await set_drained(self._database, row.id, drained):
            raise AgentNotFound(named)
        self._bells.changed(orders=True)
        return await self.agent(row.id)

    async def queues(self) -> list[pb.Queue]:
        """Returns all queues, by name."""
        return [_queue(row) for row in await read_queues(self._database)]

    async def queue(self, name: str) -> pb.Queue:
        """Returns one queue.

        Raises:
            QueueNotFound: There is none.
        """
        row = await read_queue(self._database, name)
        if row is None:
            raise QueueNotFound(name)
        return _queue(row)

    async def create_queue(self, queue: pb.Queue) -> pb.Queue:
        """Makes a queue; its counters are ignored.

        Raises:
            QueueExists: There is one of this name.
        """
        await create_queue(
            self._database,
            queue.name,
            paused=queue.paused,
            max_running=queue.max_running if queue.HasField("max_running") else None,
            max_gpus=queue.max_gpus if queue.HasField("max_gpus") else None,
        )
        return await self.queue(queue.name)

    async def update_queue(self, request: pb.UpdateQueueRequest) -> pb.Queue:
        """Changes the given fields of a queue.

        Raises:
            QueueNotFound: There is none.
        """
        changes: dict[str, Any] = {}
        if request.HasField("paused"):
            changes["paused"] = request.paused
        if request.HasField("max_running"):
            changes["max_running"] = None if request.max_running < 0 else request.max_running
        if request.HasField("max_gpus"):
            changes["max_gpus"] = None if request.max_gpus < 0 else request.max_gpus
        if changes:
            if not await update_queue(self._database, request.name, changes):
                raise QueueNotFound(request.name)
            self._bells.changed(orders=True)
        return await self.queue(request.name)

    async def _find(self, named: str) -> AgentRow:
        row = await read_agent(self._database, named)
        if row is None:
            raise AgentNotFound(named)
        return row

    async def _gpu_counts(self, agent_id: str | None) -> dict[str, tuple[int, int]]:
        """Returns agent_id → (GPUs, those of them that are held)."""
        counts: dict[str, tuple[int, int]] = {}
        for gpu in await read_gpus(self._database, agent_id):
            total, used = counts.get(gpu.agent_id, (0, 0))
            counts[gpu.agent_id] = total + 1, used + (gpu.lease_id is not None)
        return counts


def _state(row: AgentRow) -> pb.AgentState.ValueType:
    if not row.fresh:
        return pb.AGENT_STATE_DISCONNECTED
    return pb.AGENT_STATE_DRAINING if row.drained else pb.AGENT_STATE_ACTIVE


def _duration(value: timedelta) -> Duration:
    result = Duration()
    result.FromTimedelta(value)
    return result


def _agent(row: AgentRow, gpu_counts: dict[str, tuple[int, int]]) -> pb.Agent:
    gpus, gpus_used = gpu_counts.get(row.id, (0, 0))
    return pb.Agent(
        id=row.id,
        name=row.name,
        state=_state(row),
        labels=row.labels,
        cpu_millis=row.cpu_millis,
        cpu_millis_used=row.cpu_millis_used,
        memory_bytes=row.memory_bytes,
        memory_bytes_used=row.memory_bytes_used,
        gpu_count=gpus,
        gpu_count_used=gpus_used,
        runtimes=[runtime["name"] for runtime in row.runtimes],
        version=row.version,
        connect_time=timestamp(row.connected_at),
        heartbeat_interval=_duration(timedelta(milliseconds=row.heartbeat_ms)),
        lease_count=row.leases,
        drained=row.drained,
    )


def _gpu(row: GpuRow) -> pb.GpuStatus:
    return pb.GpuStatus(
        uuid=row.uuid,
        agent=row.agent,
        index=row.index,
        model=row.model,
        memory_bytes=row.memory_bytes,
        lease_id=row.lease_id or 0,
        job_id=encode_job_id(row.job_number) if row.job_number is not None else "",
        utilization_percent=row.utilization_percent,
        memory_used_bytes=row.memory_used_bytes,
    )


def _lease(row: LeaseRow) -> pb.LeaseStatus:
    return pb.LeaseStatus(
        lease_id=row.lease_id,
        job_id=encode_job_id(row.job_number),
        attempt=row.attempt,
        phase=job_pb2.LeasePhase.ValueType(row.phase),
        agent=row.agent,
        gpu_uuids=row.gpu_uuids,
        grant_time=timestamp(row.granted_at),
        ttl=_duration(timedelta(milliseconds=row.ttl_ms)),
        time_left=_duration(row.time_left),
        cancel_requested=row.cancel_requested,
    )


def _queue(row: QueueRow) -> pb.Queue:
    return pb.Queue(
        name=row.name,
        paused=row.paused,
        max_running=row.max_running,
        max_gpus=row.max_gpus,
        queued=row.queued,
        running=row.running,
        gpus=row.gpus,
    )


def _read_token(text: str) -> int:
    try:
        (after,) = _TOKEN.unpack(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (binascii.Error, ValueError, struct.error):
        raise InvalidField(
            [("page_token", f"{text!r} is not a token of this server: pass next_page_token as it came")]
        ) from None
    lease_id: int = after
    return lease_id
