"""Puts rows into a database, so that reads have something to find."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg

from lessor.v1 import job_pb2
from lessor_server.domain.shape import Shape

SHAPE = Shape(1000, 0, 0, "", 0, (), "process", 15_000, False)
GPU_SHAPE = Shape(2000, 1 << 30, 1, "H200", 0, (), "process", 15_000, False)


def spec(name: str = "train", **fields: Any) -> job_pb2.JobSpec:
    """Returns a small spec."""
    return job_pb2.JobSpec(name=name, queue="default", command=job_pb2.Command(argv=["true"]), **fields)


class Rows:
    """Writes jobs, leases, attempts, agents and events straight into the tables."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self.pool = pool

    async def queue(self, name: str, **columns: Any) -> int:
        await self.pool.execute(
            "INSERT INTO queue (name, paused, max_running, max_gpus) VALUES ($1, $2, $3, $4)",
            name, columns.get("paused", False), columns.get("max_running"), columns.get("max_gpus"),
        )  # fmt: skip
        return await self.queue_id(name)

    async def queue_id(self, name: str) -> int:
        number: int = await self.pool.fetchval("SELECT id FROM queue WHERE name = $1", name)
        return number

    async def shape(self, shape: Shape = SHAPE) -> int:
        await self.pool.execute(
            "INSERT INTO shape (digest, spec) VALUES ($1, $2) ON CONFLICT DO NOTHING",
            shape.digest(), json.dumps(shape.to_json()),
        )  # fmt: skip
        number: int = await self.pool.fetchval("SELECT id FROM shape WHERE digest = $1", shape.digest())
        return number

    async def agent(
        self, agent_id: str, *, name: str = "", renewed_at: int = 0, gpus: Sequence[str] = (), **columns: Any
    ) -> int:
        """Adds an agent with a session, which it returns."""
        session: int = await self.pool.fetchval(
            "INSERT INTO session (agent_id, epoch, renewed_at, heartbeat_ms, replica, drained) "
            "VALUES ($1, 1, $2, 5000, 'r', $3) RETURNING id",
            agent_id, renewed_at, columns.get("drained", False),
        )  # fmt: skip
        await self.pool.execute(
            "INSERT INTO agent (id, name, version, labels, runtimes, cpu_millis, memory_bytes, heartbeat_ms, hostname, "
            "boot_id, hardware_id, session_id, connected_at, drained) "
            "VALUES ($1, $2, '1.0', $3, $4, 8000, 64::bigint << 30, 5000, 'h', 'b', 'w', $5, $6, $7)",
            agent_id, name or agent_id, json.dumps(columns.get("labels", {})),
            json.dumps([{"name": "process", "can_set_user": False}]), session,
            columns.get("connected_at", datetime.now(UTC)), columns.get("drained", False),
        )  # fmt: skip
        for index, uuid in enumerate(gpus):
            await self.pool.execute(
                "INSERT INTO gpu (agent_id, uuid, index, model, memory_bytes) "
                "VALUES ($1, $2, $3, 'NVIDIA H200', 141::bigint << 30)",
                agent_id, uuid, index,
            )  # fmt: skip
        return session

    async def job(
        self,
        *,
        name: str = "train",
        queue: str = "default",
        labels: dict[str, str] | None = None,
        at: datetime | None = None,
        shape: Shape = SHAPE,
        priority: int = 0,
        retry_of: int | None = None,
        body: job_pb2.JobSpec | None = None,
    ) -> int:
        """Adds a job that stands nowhere yet; returns its number."""
        number: int = await self.pool.fetchval(
            "INSERT INTO job (id, queue_id, shape_id, priority, name, labels, spec, ttl_ms, max_failures, max_losses, "
            "backoff_initial_ms, backoff_max_ms, retry_of, submitted_at) "
            "VALUES (next_job_id($1), $2, $3, $4, $5, $6, $7, 60000, 3, 10, 1000, 300000, $8, COALESCE($1, now())) "
            "RETURNING id",
            at, await self.queue_id(queue), await self.shape(shape), priority, name, json.dumps(labels or {}),
            (body or spec(name)).SerializeToString(), retry_of,
        )  # fmt: skip
        return number

    async def ready(
        self, number: int, *, attempts: int = 0, failures: int = 0, losses: int = 0, last: int | None = None
    ) -> None:
        await self.pool.execute(
            "INSERT INTO ready (job_id, queue_id, shape_id, priority, attempts, failures, losses, last_lease_id) "
            "SELECT id, queue_id, shape_id, priority, $2, $3, $4, $5 FROM job WHERE id = $1",
            number, attempts, failures, losses, last,
        )  # fmt: skip

    async def delayed(
        self, number: int, not_before: datetime, *, attempts: int, failures: int, last: int | None = None
    ) -> None:
        await self.pool.execute(
            "INSERT INTO delayed (job_id, queue_id, shape_id, priority, attempts, failures, losses, last_lease_id, "
            "not_before) SELECT id, queue_id, shape_id, priority, $2, $3, 0, $4, $5 FROM job WHERE id = $1",
            number, attempts, failures, last, not_before,
        )  # fmt: skip

    async def lease(
        self,
        number: int,
        session: int,
        agent_id: str,
        *,
        attempt: int = 1,
        phase: int = 3,
        gpus: Sequence[str] = (),
        started_at: datetime | None = None,
        **columns: Any,
    ) -> int:
        """Adds a live lease; returns its number."""
        lease_id: int = await self.pool.fetchval(
            "INSERT INTO lease (job_id, lease_id, session_id, agent_id, attempt, phase, queue_id, shape_id, priority, "
            "failures, losses, max_failures, max_losses, backoff_initial_ms, backoff_max_ms, dedupe_key, ttl_ms, "
            "gpu_uuids, offered_at, granted_at, started_at, cancel_requested, outcome) "
            "SELECT id, nextval('lease_number'), $2, $3, $4, $5, queue_id, shape_id, priority, $6, $7, max_failures, "
            "max_losses, backoff_initial_ms, backoff_max_ms, dedupe_key, ttl_ms, $8, 0, now(), $9, $10, $11 "
            "FROM job WHERE id = $1 RETURNING lease_id",
            number, session, agent_id, attempt, phase, columns.get("failures", 0), columns.get("losses", 0), list(gpus),
            started_at, columns.get("cancel_requested", False), columns.get("outcome"),
        )  # fmt: skip
        if phase < 4:
            for uuid in gpus:
                await self.pool.execute(
                    "INSERT INTO lease_gpu (agent_id, gpu_uuid, lease_id, job_id) VALUES ($1, $2, $3, $4)",
                    agent_id, uuid, lease_id, number,
                )  # fmt: skip
        return lease_id

    async def attempt(
        self,
        number: int,
        *,
        attempt: int = 1,
        outcome: int = 1,
        final_state: int | None = None,
        lease_id: int | None = None,
        agent_id: str | None = "agent-00001",
        ended_at: datetime | None = None,
        **columns: Any,
    ) -> int:
        """Adds an ended attempt; returns its lease's number. lease_id 0: the job ended while it waited."""
        if lease_id is None:
            lease_id = await self.pool.fetchval("SELECT nextval('lease_number')")
        error: job_pb2.JobError | None = columns.get("error")
        ended_at = ended_at or datetime.now(UTC)
        await self.pool.execute(
            "INSERT INTO attempt (job_id, lease_id, attempt, agent_id, gpu_uuids, outcome, exit_code, signal, error, "
            "result, failures, losses, final_state, granted_at, started_at, ended_at, log_bytes, logs_truncated_at) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $14, $15, $16, $17)",
            number, lease_id, attempt, agent_id if lease_id else None, columns.get("gpus", []), outcome,
            columns.get("exit_code"), columns.get("signal", 0), error.SerializeToString() if error else None,
            columns.get("result"), columns.get("failures", 0), columns.get("losses", 0), final_state,
            ended_at - timedelta(minutes=1) if lease_id else None, ended_at, columns.get("log_bytes", 0),
            columns.get("logs_truncated_at"),
        )  # fmt: skip
        assert lease_id is not None
        return lease_id

    async def log(self, lease_id: int, *chunks: bytes, start: int = 0, streams: Sequence[int] = ()) -> int:
        """Adds chunks to a log, with its head; returns the log's end."""
        for index, data in enumerate(chunks):
            await self.pool.execute(
                "INSERT INTO log_chunk (lease_id, start_offset, stream, data, read_at) VALUES ($1, $2, $3, $4, now())",
                lease_id, start, streams[index] if streams else 1, data,
            )  # fmt: skip
            start += len(data)
        await self.pool.execute(
            "INSERT INTO log_head (lease_id, end_offset, stdout_bytes, stderr_bytes) VALUES ($1, $2, $2, 0) "
            "ON CONFLICT (lease_id) DO UPDATE SET end_offset = EXCLUDED.end_offset",
            lease_id, start,
        )  # fmt: skip
        return start

    async def progress(self, number: int, lease_id: int, fraction: float, message: str = "") -> None:
        await self.pool.execute(
            "INSERT INTO progress (lease_id, job_id, fraction, message, metrics, updated_at) "
            """VALUES ($1, $2, $3, $4, '{"loss": 0.5}', clock_timestamp()) """
            "ON CONFLICT (lease_id) DO UPDATE SET fraction = $3, message = $4, updated_at = clock_timestamp()",
            lease_id, number, fraction, message,
        )  # fmt: skip

    async def event(self, *changes: tuple[int, int, int], connection: Any = None) -> None:
        """Adds one event: (job, state, attempt) of each change."""
        await (connection or self.pool).execute(
            "INSERT INTO event (job_ids, states, attempts) VALUES ($1, $2, $3)",
            [c[0] for c in changes], [c[1] for c in changes], [c[2] for c in changes],
        )  # fmt: skip
