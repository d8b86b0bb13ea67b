"""The limit of the store: our own statements in a bare loop, without gRPC, planner or agents.

Submit, claim and end in batches of 500 on two connections: the same files of ``store/sql`` that
the server runs, with the same durability. What Lessor does per second is given as a share of it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from benchmarks.system import Postgres
from lessor.lifecycle import Outcome
from lessor.v1 import job_pb2
from lessor_server.store import claims, reports, submit
from lessor_server.store.database import Database
from lessor_server.store.hello import AgentFacts, commit_session
from lessor_server.store.partitions import ensure_partitions

BATCH = 500
CONNECTIONS = 2


@dataclass(frozen=True)
class RawFigures:
    """What the bare loop did."""

    lifecycle_per_s: float
    """Jobs submitted, claimed and ended per second."""
    submit_per_s: float
    claim_end_per_s: float
    """The same jobs once they are stored: claim and end only."""


def measure(postgres: Postgres, jobs: int) -> RawFigures:
    """Runs ``jobs`` jobs through the bare store, once whole and once in two parts."""
    return asyncio.run(_measure(postgres, jobs))


async def _measure(postgres: Postgres, jobs: int) -> RawFigures:
    database = await Database.connect(postgres.url, pool_size=4)
    try:
        async with database.pool.acquire() as connection:
            await ensure_partitions(connection)
        bare = await _Bare.prepare(database)
        await bare.all_connections(bare.lifecycle, BATCH * CONNECTIONS * 4)
        lifecycle_s = await bare.all_connections(bare.lifecycle, jobs)
        submit_s = await bare.all_connections(bare.submit_only, jobs)
        claim_end_s = await bare.all_connections(bare.claim_end, jobs)
        return RawFigures(jobs / lifecycle_s, jobs / submit_s, jobs / claim_end_s)
    finally:
        await database.close()


class _Bare:
    """One agent's session and one queue and shape, and the statements on them."""

    def __init__(self, database: Database, session: Any, epoch: int, queue_id: int, shape_id: int) -> None:
        self._database = database
        self._session = session
        self._epoch = epoch
        self._queue_id = queue_id
        self._shape_id = shape_id
        self._stored: list[list[int]] = []
        self._spec = job_pb2.JobSpec(command=job_pb2.Command(argv=["/bin/true"])).SerializeToString()
        self._numbers = itertools.count()

    @classmethod
    async def prepare(cls, database: Database) -> _Bare:
        facts = AgentFacts(
            agent_id="raw", name="raw", version="0", labels={}, runtimes=[], cpu_millis=1, memory_bytes=1,
            heartbeat_ms=5000, hostname="raw", boot_id="raw", hardware_id="raw", gpus=[],
        )  # fmt: skip
        session = await commit_session(database, facts, 0, "raw")
        await database.query(
            "INSERT INTO leader (epoch, holder, clock, beat) SELECT 1, 'raw', 0, 0 "
            "WHERE NOT EXISTS (SELECT FROM leader)"
        )
        epoch = (await database.query("SELECT epoch FROM leader"))[0]["epoch"]
        queue_id = (
            await database.query(
                "INSERT INTO queue (name) VALUES ('raw') ON CONFLICT (name) DO UPDATE SET name = 'raw' RETURNING id"
            )
        )[0]["id"]
        shape_id = (
            await database.query(
                "INSERT INTO shape (digest, spec) VALUES ('raw', '{}') "
                "ON CONFLICT (digest) DO UPDATE SET digest = 'raw' RETURNING id"
            )
        )[0]["id"]
        return cls(database, session, epoch, queue_id, shape_id)

    async def all_connections(self, work: Any, jobs: int) -> float:
        """Runs ``work(batch size)`` on all connections until ``jobs`` are done. Returns the seconds it took."""
        batches = itertools.repeat(BATCH, jobs // BATCH)
        began = time.perf_counter()

        async def connection() -> None:
            for size in batches:
                await work(size)

        await asyncio.gather(*(connection() for _ in range(CONNECTIONS)))
        return time.perf_counter() - began

    async def lifecycle(self, size: int) -> None:
        await self._end(await self._claim(await self._submit(size)))

    async def submit_only(self, size: int) -> None:
        self._stored.append(await self._submit(size))

    async def claim_end(self, size: int) -> None:
        await self._end(await self._claim(self._stored.pop()))

    async def _submit(self, size: int) -> list[int]:
        terms = submit.JobTerms(self._queue_id, self._shape_id, 0, 60_000, None, None, 1, 10, 1000, 300_000)
        row = submit.JobRow(terms, "", "{}", self._spec)
        request = submit.Request("", uuid.uuid4().hex, os.urandom(32), [row] * size)
        (answer,) = await submit.submit_batch(self._database, [request])
        assert isinstance(answer, submit.Submitted)
        return answer.job_numbers

    async def _claim(self, jobs: Sequence[int]) -> Sequence[tuple[int, int]]:
        session = self._session
        offers = [claims.Offer(job, session.session_id, session.epoch) for job in jobs]
        rows = await claims.claim(self._database, self._epoch, offers)
        assert len(rows) == len(jobs)
        return [(row["job_id"], row["lease_id"]) for row in rows]

    async def _end(self, leases: Sequence[tuple[int, int]]) -> None:
        now = datetime.now(UTC)
        end = reports.End(Outcome.SUCCEEDED, exit_code=0, started_at=now, ended_at=now)
        committed = await reports.commit_reports(
            self._database,
            [
                reports.Report(job, lease, "raw", self._session.session_id, self._session.epoch, end)
                for job, lease in leases
            ],
        )
        assert len(committed.ended) == len(leases)
