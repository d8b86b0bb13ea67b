"""Agents, their GPUs, live leases and queues, as the server tells them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from lessor.sdk.enums import AgentState, LeasePhase, from_number
from lessor.sdk.wire import duration_of, time_of
from lessor.v1 import fleet_service_pb2


@dataclass(frozen=True, slots=True)
class Agent:
    """A program that runs jobs on a host."""

    id: str
    name: str
    state: AgentState | None
    drained: bool
    """True after drain, whether connected or not."""
    labels: Mapping[str, str]
    cpu_millis: int
    cpu_millis_used: int
    memory_bytes: int
    memory_bytes_used: int
    gpu_count: int
    gpu_count_used: int
    runtimes: tuple[str, ...]
    version: str
    connect_time: datetime | None
    """When its current session began."""
    heartbeat_interval: timedelta | None
    lease_count: int
    """Live leases."""

    @classmethod
    def from_proto(cls, message: fleet_service_pb2.Agent) -> Agent:
        """Reads it from the wire."""
        return cls(
            id=message.id,
            name=message.name,
            state=from_number(AgentState, message.state),
            drained=message.drained,
            labels=dict(message.labels),
            cpu_millis=message.cpu_millis,
            cpu_millis_used=message.cpu_millis_used,
            memory_bytes=message.memory_bytes,
            memory_bytes_used=message.memory_bytes_used,
            gpu_count=message.gpu_count,
            gpu_count_used=message.gpu_count_used,
            runtimes=tuple(message.runtimes),
            version=message.version,
            connect_time=time_of(message, "connect_time"),
            heartbeat_interval=duration_of(message, "heartbeat_interval"),
            lease_count=message.lease_count,
        )


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU of an agent."""

    uuid: str
    agent: str
    index: int
    """On its host."""
    model: str
    memory_bytes: int
    lease_id: int | None
    """The lease that holds it; None: free."""
    job_id: str | None
    utilization_percent: int
    """At the last heartbeat that told it."""
    memory_used_bytes: int
    """At the last heartbeat that told it."""

    @classmethod
    def from_proto(cls, message: fleet_service_pb2.GpuStatus) -> Gpu:
        """Reads it from the wire."""
        return cls(
            uuid=message.uuid,
            agent=message.agent,
            index=message.index,
            model=message.model,
            memory_bytes=message.memory_bytes,
            lease_id=message.lease_id or None,
            job_id=message.job_id or None,
            utilization_percent=message.utilization_percent,
            memory_used_bytes=message.memory_used_bytes,
        )


@dataclass(frozen=True, slots=True)
class Lease:
    """A live lease."""

    lease_id: int
    """The fencing token."""
    job_id: str
    attempt: int
    phase: LeasePhase | None
    agent: str
    gpu_uuids: tuple[str, ...]
    grant_time: datetime | None
    ttl: timedelta | None
    time_left: timedelta | None
    """Lease time left before it may expire if no renewal comes; may be negative."""
    cancel_requested: bool

    @classmethod
    def from_proto(cls, message: fleet_service_pb2.LeaseStatus) -> Lease:
        """Reads it from the wire."""
        return cls(
            lease_id=message.lease_id,
            job_id=message.job_id,
            attempt=message.attempt,
            phase=from_number(LeasePhase, message.phase),
            agent=message.agent,
            gpu_uuids=tuple(message.gpu_uuids),
            grant_time=time_of(message, "grant_time"),
            ttl=duration_of(message, "ttl"),
            time_left=duration_of(message, "time_left"),
            cancel_requested=message.cancel_requested,
        )


@dataclass(frozen=True, slots=True)
class Queue:
    """A named line of jobs."""

    name: str
    paused: bool
    """No job of it starts while true."""
    max_running: int | None
    """Leases it may have at once; None: any number."""
    max_gpus: int | None
    """GPUs it may hold at once; None: any number."""
    queued: int
    """Jobs waiting."""
    running: int
    """Leases live."""
    gpus: int
    """GPUs held."""

    @classmethod
    def from_proto(cls, message: fleet_service_pb2.Queue) -> Queue:
        """Reads it from the wire."""
        return cls(
            name=message.name,
            paused=message.paused,
            max_running=message.max_running if message.HasField("max_running") else None,
            max_gpus=message.max_gpus if message.HasField("max_gpus") else None,
            queued=message.queued,
            running=message.running,
            gpus=message.gpus,
        )
