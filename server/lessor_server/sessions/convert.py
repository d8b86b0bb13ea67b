"""Between the agent protocol's messages and what the store takes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
from google.protobuf.timestamp_pb2 import Timestamp

from lessor import timing
from lessor.ids import decode_job_id, encode_job_id
from lessor.lifecycle import LeasePhase, Outcome
from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import job_pb2
from lessor_server.store.hello import AgentFacts, GpuFacts, Held
from lessor_server.store.logs import Chunk, Position, ProgressRow
from lessor_server.store.reports import Checkpoint, End, Phase, Report


def agent_facts(hello: pb.Hello) -> AgentFacts:
    """Returns what a Hello says of the agent and its host.

    Raises:
        ValueError: It lists a GPU twice.
    """
    uuids = [gpu.uuid for gpu in hello.inventory.gpus]
    if len(set(uuids)) != len(uuids):
        raise ValueError("inventory.gpus lists a GPU twice")
    return AgentFacts(
        agent_id=hello.agent_id,
        name=hello.agent_name,
        version=hello.version,
        labels=dict(hello.inventory.labels),
        runtimes=[{"name": r.name, "can_set_user": r.can_set_user} for r in hello.runtimes],
        cpu_millis=hello.inventory.cpu_millis,
        memory_bytes=hello.inventory.memory_bytes,
        heartbeat_ms=hello.heartbeat_interval.ToTimedelta() // timedelta(milliseconds=1),
        hostname=hello.host.hostname,
        boot_id=hello.host.boot_id,
        hardware_id=hello.host.hardware_id,
        gpus=[GpuFacts(g.uuid, g.index, g.model, g.memory_bytes) for g in hello.inventory.gpus],
    )


def held(lease: pb.HeldLease) -> Held:
    """Returns a lease of a Hello.

    Raises:
        ValueError: Its job id or phase is none.
    """
    return Held(decode_job_id(lease.job_id), lease.lease_id, LeasePhase(lease.phase))


def report(event: pb.LeaseEvent, agent_id: str, session_id: int, epoch: int) -> Report:
    """Returns what an event reports, in the name of a session.

    Raises:
        ValueError: Its job id is none.
    """
    return Report(decode_job_id(event.job_id), event.lease_id, agent_id, session_id, epoch, _reported(event))


def _reported(event: pb.LeaseEvent) -> Phase | Checkpoint | End:
    match event.WhichOneof("event"):
        case "accepted":
            return Phase(LeasePhase.ACCEPTED)
        case "running":
            return Phase(LeasePhase.RUNNING, _time(event.running, "start_time"))
        case "checkpoint_saved":
            return Checkpoint(event.checkpoint_saved.cursor)
        case "released":
            return End(outcome=None)
        case "rejected":
            error = event.rejected.error
            return End(outcome=Outcome.REJECTED, error=error.SerializeToString())
        case _:
            return _ended(event.ended)


def _ended(ended: pb.Ended) -> End:
    return End(
        outcome=Outcome(ended.outcome),
        exit_code=ended.exit_code if ended.HasField("exit_code") else None,
        signal=ended.signal,
        error=ended.error.SerializeToString() if ended.HasField("error") else None,
        retryable=ended.error.retryable if ended.HasField("error") else True,
        result=ended.result_json or None,
        final_log_offset=ended.final_log_offset,
        started_at=_time(ended, "start_time"),
        ended_at=_time(ended, "end_time"),
    )


def chunk(message: pb.LogChunk, agent_id: str) -> Chunk:
    """Returns a log chunk as it is stored.

    Raises:
        ValueError: Its job id is none.
    """
    return Chunk(
        decode_job_id(message.job_id),
        message.lease_id,
        agent_id,
        message.offset,
        message.stream,
        message.data,
        _time(message, "time") or datetime.now(UTC),
    )


def progress(update: pb.ProgressUpdate, agent_id: str) -> ProgressRow:
    """Returns news of progress as it is stored.

    Raises:
        ValueError: Its job id is none.
    """
    news = update.progress
    return ProgressRow(
        decode_job_id(update.job_id),
        update.lease_id,
        agent_id,
        news.fraction if news.HasField("fraction") else None,
        news.message,
        dict(news.metrics),
        _time(news, "update_time") or datetime.now(UTC),
    )


def log_position(position: Position) -> pb.LogPosition:
    """Returns how much of a log is committed."""
    return pb.LogPosition(
        lease_id=position.lease_id,
        end_offset=position.end_offset,
        stdout_bytes=position.stdout_bytes,
        stderr_bytes=position.stderr_bytes,
    )


def grant(row: Mapping[str, Any] | asyncpg.Record) -> pb.Grant:
    """Returns the Grant of a lease as claim and read_deliveries return it."""
    spec = job_pb2.JobSpec.FromString(row["spec"])
    ttl = timedelta(milliseconds=row["ttl_ms"])
    message = pb.Grant(
        job_id=encode_job_id(row["job_id"]),
        lease_id=row["lease_id"],
        attempt=row["attempt"],
        spec=spec,
        grace=spec.lease.grace,
        gpu_uuids=row["gpu_uuids"],
        checkpoint=row["cursor"],
    )
    message.ttl.FromTimedelta(ttl)
    message.margin.FromTimedelta(timing.margin(ttl))
    return message


def revoke(job_number: int, lease_id: int, reason: pb.RevokeReason.ValueType) -> pb.Revoke:
    """Returns the question for one lease."""
    return pb.Revoke(job_id=encode_job_id(job_number), lease_id=lease_id, reason=reason)


def _time(message: Any, field: str) -> datetime | None:
    if not message.HasField(field):
        return None
    stamp: Timestamp = getattr(message, field)
    return stamp.ToDatetime(UTC)
