"""Drives the store as the server does: submits, claims, reports, expires, with lease time set by hand."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg

from lessor.lifecycle import LeasePhase, Outcome
from lessor.v1 import job_pb2
from lessor_server.bells import Bells
from lessor_server.maintenance.reaper import LEASE_EXPIRED
from lessor_server.services.jobs import Jobs
from lessor_server.services.lines import Lines
from lessor_server.store.catalog import Catalog
from lessor_server.store.claims import Offer, claim
from lessor_server.store.database import Database
from lessor_server.store.hello import AgentFacts, GpuFacts, SessionGrant, commit_session
from lessor_server.store.reports import Checkpoint, Committed, End, Phase, Report, Verdict, commit_reports

MIN_WAIT_MS = 11_200


def job_spec(**overrides: Any) -> job_pb2.JobSpec:
    """A spec of ``/bin/true``; keyword arguments set fields."""
    return job_pb2.JobSpec(command=job_pb2.Command(argv=["/bin/true"]), **overrides)


@dataclass
class Leased:
    """A lease as claim returned it."""

    job: int
    lease_id: int
    session: SessionGrant
    agent_id: str


class Store:
    """The store of one test, and the shortest way to each of its statements."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.catalog = Catalog(database)
        self.bells = Bells()
        self.lines = Lines(database, self.catalog, self.bells)
        self.jobs = Jobs(database, self.catalog, self.bells, self.lines)
        self.epoch = 0

    async def lead(self, holder: str = "test") -> int:
        """Takes the leadership over; returns the epoch."""
        (row,) = await self.database.fetch("read_leader")
        (taken,) = await self.database.fetch("take_over", holder=holder, seen_epoch=row["epoch"], seen_beat=row["beat"])
        self.epoch = taken["epoch"]
        return self.epoch

    async def set_clock(self, clock_ms: int) -> None:
        """Sets lease time."""
        await self.database.pool.execute("UPDATE leader SET clock = $1", clock_ms)

    async def submit(self, count: int = 1, request_id: str = "", **overrides: Any) -> list[int]:
        """Submits jobs; returns their numbers."""
        specs = [job_spec(**overrides) for _ in range(count)]
        submitted = await self.jobs.submit("tester", request_id or str(uuid.uuid4()), specs)
        return submitted.job_numbers

    async def hello(
        self, agent_id: str = "agent-one", *, session_id: int = 0, gpus: int = 0, **facts: Any
    ) -> SessionGrant:
        """Says hello as an agent; returns its session."""
        known: dict[str, Any] = {
            "name": agent_id, "version": "0", "labels": {}, "runtimes": [{"name": "process", "can_set_user": True}],
            "cpu_millis": 1_000_000, "memory_bytes": 1 << 40, "heartbeat_ms": 1000, "hostname": "host",
            "boot_id": "boot-1", "hardware_id": f"hw-{agent_id}",
            "gpus": [GpuFacts(f"GPU-{agent_id}-{n}", n, "Fake", 1 << 34) for n in range(gpus)],
        }  # fmt: skip
        known.update(facts)
        return await commit_session(self.database, AgentFacts(agent_id=agent_id, **known), session_id, "test")

    async def claim(
        self, jobs: Sequence[int], session: SessionGrant, *, agent_id: str = "agent-one", epoch: int | None = None,
        gpus: Sequence[str] = (),
    ) -> list[Leased]:  # fmt: skip
        """Claims jobs for a session; returns the leases made."""
        offers = [Offer(job, session.session_id, session.epoch, gpus) for job in jobs]
        rows = await claim(self.database, self.epoch if epoch is None else epoch, offers)
        return [Leased(row["job_id"], row["lease_id"], session, agent_id) for row in rows]

    async def report(self, lease: Leased, *events: Phase | Checkpoint | End) -> list[Verdict]:
        """Reports events of one lease; returns the verdicts."""
        return (await self.commit([self.said(lease, event) for event in events])).verdicts

    async def commit(self, reports: Sequence[Report]) -> Committed:
        """Commits reports."""
        return await commit_reports(self.database, reports)

    @staticmethod
    def said(lease: Leased, event: Phase | Checkpoint | End) -> Report:
        """A report of one event."""
        session = lease.session
        return Report(lease.job, lease.lease_id, lease.agent_id, session.session_id, session.epoch, event)

    async def running(self, **overrides: Any) -> Leased:
        """Submits a job and brings it to running on a new session of agent-one."""
        session = await self.hello()
        (job,) = await self.submit(**overrides)
        (lease,) = await self.claim([job], session)
        assert await self.report(lease, Phase(LeasePhase.ACCEPTED), Phase(LeasePhase.RUNNING)) == [Verdict.RECORDED] * 2
        return lease

    async def renew(self, *sessions: SessionGrant) -> set[int]:
        """Renews sessions; returns the ids renewed."""
        rows = await self.database.fetch(
            "renew", session_ids=[s.session_id for s in sessions], epochs=[s.epoch for s in sessions]
        )
        return {row["id"] for row in rows}

    async def expire(self, epoch: int | None = None) -> list[asyncpg.Record]:
        """Expires what is due."""
        return await self.database.fetch(
            "expire",
            epoch=self.epoch if epoch is None else epoch,
            now=None,
            min_wait_ms=MIN_WAIT_MS,
            max_leases=1000,
            error=LEASE_EXPIRED,
        )

    async def where(self, job: int) -> str:
        """Returns the table a job stands in, or its final state; asserts that it is exactly one place."""
        row = await self.database.pool.fetchrow(
            """
            SELECT (SELECT count(*) FROM ready WHERE job_id = $1) AS ready,
                (SELECT count(*) FROM delayed WHERE job_id = $1) AS delayed,
                (SELECT count(*) FROM lease WHERE job_id = $1) AS lease,
                (SELECT final_state FROM attempt WHERE job_id = $1 AND final_state IS NOT NULL) AS final
            """,
            job,
        )
        assert row is not None
        places = [name for name in ("ready", "delayed", "lease") if row[name]]
        if row["final"] is not None:
            places.append({4: "SUCCEEDED", 5: "FAILED", 6: "CANCELLED"}[row["final"]])
        assert len(places) == 1, f"job {job} stands in {places or 'nothing'}"
        return places[0]

    async def counters(self, job: int) -> tuple[int, int, int]:
        """Returns (attempts, failures, losses) of a waiting job."""
        row = await self.database.pool.fetchrow(
            "SELECT attempts, failures, losses FROM ready WHERE job_id = $1 "
            "UNION ALL SELECT attempts, failures, losses FROM delayed WHERE job_id = $1",
            job,
        )
        assert row is not None
        return row["attempts"], row["failures"], row["losses"]

    async def value(self, query: str, *arguments: object) -> Any:
        """Returns one value of a query."""
        return await self.database.pool.fetchval(query, *arguments)


@asynccontextmanager
async def open_store(database_url: str) -> AsyncIterator[Store]:
    """Opens a store on a migrated database, with a leader."""
    database = await Database.connect(database_url, pool_size=20)
    store = Store(database)
    store.jobs.start()
    try:
        await store.lead()
        yield store
    finally:
        await store.jobs.close()
        await database.close()


def succeeded(**fields: Any) -> End:
    """An end with exit code 0."""
    return End(outcome=Outcome.SUCCEEDED, exit_code=0, **fields)


def failed(**fields: Any) -> End:
    """An end with exit code 1."""
    return End(outcome=Outcome.FAILED, exit_code=1, **fields)


def at(text: str) -> datetime:
    """An instant, from ISO text with an offset."""
    return datetime.fromisoformat(text)
