"""Collects what a run left behind: the workloads' diaries, the database, what still runs."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime

import asyncpg

from lessor.lifecycle import LeasePhase, Outcome
from lessor.v1 import job_pb2
from tests.chaos import audit
from tests.chaos.history import AttemptRow, Fault, History, StoredLog, Submitted, read_executions
from tests.chaos.workload import now_ns
from tests.chaos.world import World, read_proc

_UNFINISHED = """
SELECT job_id, 'ready' AS place, last_lease_id AS lease_id FROM ready
UNION ALL SELECT job_id, 'delayed', last_lease_id FROM delayed
UNION ALL SELECT job_id, CAST(phase AS text), lease_id FROM lease
"""
_ATTEMPTS = """
SELECT job_id, lease_id, agent_id, outcome, exit_code, signal, error, final_state, granted_at, ended_at, log_bytes,
    logs_truncated_at
FROM attempt
"""


async def unfinished(connection: asyncpg.Connection) -> dict[int, str]:
    """Returns job number → where it stands, of all jobs that have not ended."""
    found = {}
    for row in await connection.fetch(_UNFINISHED):
        place = row["place"]
        place = LeasePhase(int(place)).name if place.isdigit() else place
        found[row["job_id"]] = f"{place}, lease {row['lease_id']}"
    return found


async def collect(world: World, submitted: Iterable[Submitted], faults: Sequence[Fault]) -> History:
    """Returns everything the checker needs. The world is at rest: all jobs have ended, or never will."""
    # The wall clock is not set while a run lasts; both are read together.
    wall_to_boot_ns = now_ns() - time.time_ns()

    def instant_ns(value: datetime) -> int:
        return round(value.timestamp() * 1_000_000) * 1000 + wall_to_boot_ns

    async with world.database() as connection:
        jobs = await connection.fetch("SELECT id, name FROM job")
        rows = await connection.fetch(_ATTEMPTS)
        agents = await connection.fetch("SELECT id, name, cpu_millis FROM agent")
        held = await connection.fetchval("SELECT count(*) FROM lease_gpu")
        reports = await connection.fetch(audit.REPORTS)
        logs = await _read_logs(connection)
        waiting = await unfinished(connection)
    ids = {f"agent:{row['name'].removeprefix('agent-')}": row["id"] for row in agents}
    attempts = [
        AttemptRow(
            job_number=row["job_id"],
            lease_id=row["lease_id"],
            agent_id=row["agent_id"] or "",
            outcome=Outcome(row["outcome"]),
            exit_code=row["exit_code"],
            signal=row["signal"],
            error_type=job_pb2.JobError.FromString(row["error"]).type if row["error"] else "",
            final_state=row["final_state"],
            granted_ns=None if row["granted_at"] is None else instant_ns(row["granted_at"]),
            ended_ns=instant_ns(row["ended_at"]),
            log_bytes=row["log_bytes"],
            logs_truncated_at=row["logs_truncated_at"],
        )
        for row in rows
    ]
    return History(
        submitted=list(submitted),
        stored_jobs={row["id"]: row["name"] for row in jobs},
        executions=read_executions(world.diaries),
        attempts=attempts,
        logs=logs,
        unfinished=waiting,
        held_gpus=held,
        slots={row["id"]: row["cpu_millis"] // 1000 for row in agents},
        leaked=jobs_that_run(world),
        audit=[row["text"] for row in reports],
        faults=[replace(fault, agent_id=ids.get(fault.whom, "")) for fault in faults],
    )


async def _read_logs(connection: asyncpg.Connection) -> dict[int, StoredLog]:
    heads = {row["lease_id"]: row["end_offset"] for row in await connection.fetch("SELECT * FROM log_head")}
    stdout: dict[int, list[bytes]] = defaultdict(list)
    ends: dict[int, int] = defaultdict(int)
    gaps: dict[int, int] = defaultdict(int)
    rows = await connection.fetch("SELECT * FROM log_chunk ORDER BY lease_id, start_offset")
    for row in rows:
        lease_id = row["lease_id"]
        gaps[lease_id] += row["start_offset"] != ends[lease_id]
        ends[lease_id] = row["start_offset"] + len(row["data"])
        if row["stream"] == job_pb2.LOG_STREAM_STDOUT:
            stdout[lease_id].append(row["data"])
    for lease_id, end in heads.items():
        gaps[lease_id] += end != ends[lease_id]
    return {
        lease_id: StoredLog(heads.get(lease_id, 0), b"".join(stdout[lease_id]), gaps[lease_id]) for lease_id in gaps
    }


def jobs_that_run(world: World) -> list[str]:
    """Returns the processes of jobs that live, each in words."""
    found = []
    for pid in world.processes():
        variables = dict(
            part.partition(b"=")[::2] for part in read_proc(pid, "environ").split(b"\0") if part.startswith(b"LESSOR_")
        )
        if (token := variables.get(b"LESSOR_FENCING_TOKEN")) is not None:
            found.append(f"process {pid} of lease {token.decode()}")
    return found
