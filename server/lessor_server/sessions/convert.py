"""Between the agent protocol's messages and what the store takes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

import asyncpg
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from lessor import timing
from lessor.ids import decode_job_id, encode_job_id
from lessor.lifecycle import LeasePhase, Outcome
from lessor.v1 import agent_service_pb2 as pb
from lessor_server.store.hello import AgentFacts, GpuFacts, Held
from lessor_server.store.logs import Chunk, Position, ProgressRow
from lessor_server.store.reports import Checkpoint, End, Phase, Report

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_OUTCOMES = {int(outcome): outcome for outcome in Outcome}


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
        case "ended":
            return _ended(event.ended)
        case "accepted":
            return Phase(LeasePhase.ACCEPTED)
        case "running":
            return Phase(LeasePhase.RUNNING, _time(event.running, "start_time"))
        case "checkpoint_saved":
            return Checkpoint(event.checkpoint_saved.cursor)
        case "released":
            return End(outcome=None)
        case "rejected":
            return End(outcome=Outcome.REJECTED, error=event.rejected.error.SerializeToString())
        case kind:
            raise ValueError(f"event: {kind or 'none'} is not known")


def _ended(ended: pb.Ended) -> End:
    outcome = _OUTCOMES.get(ended.outcome)
    if outcome is None:
        raise ValueError(f"outcome: {ended.outcome} is none")
    return End(
        outcome=outcome,
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


@lru_cache(maxsize=1024)
def _durations(ttl_ms: int) -> tuple[Duration, Duration]:
    """Returns ttl and margin as the contract has them; they are copied into each message."""
    ttl, margin = Duration(), Duration()
    ttl.FromMilliseconds(ttl_ms)
    margin.FromTimedelta(timing.margin(timedelta(milliseconds=ttl_ms)))
    return ttl, margin


@lru_cache(maxsize=1024)
def _shortened_grace(ttl_ms: int) -> Duration:
    shortened = Duration()
    shortened.FromTimedelta(timing.default_grace(timedelta(milliseconds=ttl_ms)))
    return shortened


def _fitting_grace(ttl_ms: int, asked: Duration) -> Duration:
    """Returns the grace of a job that is stopped when its lease is lost, whatever its policy asks for.

    An agent stops a job when it is older than the job's policy, or cannot do what
    that asks for. A grace that is not bound by the ttl, because the job is to be
    frozen, to go on, or to be treated in a way that only a later server knows,
    would have it stop at once.
    """
    fits = asked.ToTimedelta() < timing.longest_grace(timedelta(milliseconds=ttl_ms))
    return asked if fits else _shortened_grace(ttl_ms)


def add_grant(grants: pb.Grants, row: Mapping[str, Any] | asyncpg.Record) -> None:
    """Adds the Grant of a lease as claim and read_deliveries return it."""
    ttl, margin = _durations(row["ttl_ms"])
    message = grants.grants.add(
        job_id=encode_job_id(row["job_id"]),
        lease_id=row["lease_id"],
        attempt=row["attempt"],
        gpu_uuids=row["gpu_uuids"],
        checkpoint=row["cursor"],
        ttl=ttl,
        margin=margin,
    )
    message.spec.MergeFromString(row["spec"])
    message.grace.CopyFrom(_fitting_grace(row["ttl_ms"], message.spec.lease.grace))


def grant_bytes(row: Mapping[str, Any] | asyncpg.Record) -> int:
    """Returns about how many bytes a Grant adds to a message."""
    return 256 + len(row["spec"]) + len(row["cursor"] or "") + 64 * len(row["gpu_uuids"])


def revoke(job_number: int, lease_id: int, reason: pb.RevokeReason.ValueType) -> pb.Revoke:
    """Returns the question for one lease."""
    return pb.Revoke(job_id=encode_job_id(job_number), lease_id=lease_id, reason=reason)


def _time(message: Any, field: str) -> datetime | None:
    if not message.HasField(field):
        return None
    stamp: Timestamp = getattr(message, field)
    try:
        return _EPOCH + timedelta(seconds=stamp.seconds, microseconds=stamp.nanos // 1000)
    except OverflowError:
        raise ValueError(f"{field}: {stamp.seconds} seconds is out of range") from None
