"""The group commits behind all agent streams of a replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lessor import timing
from lessor_server.bells import Bells
from lessor_server.services.picture import Picture
from lessor_server.store.database import Database
from lessor_server.store.group_commit import GroupCommit
from lessor_server.store.logs import Chunk, Position, ProgressRow, append, save_progress
from lessor_server.store.reports import Report, Verdict, commit_reports, finish_drained, report_bytes

_MAX_LOG_BATCH_BYTES = 8 << 20
_MAX_REPORT_BATCH_BYTES = 16 << 20
_MOST_DRAINING = 10_000


@dataclass(frozen=True, slots=True)
class Renewal:
    """A heartbeat: renew this session if its epoch still stands."""

    session_id: int
    epoch: int


class AgentCommits:
    """Commits what agents say: renewals, reports, logs and progress, each kind in its own batches."""

    def __init__(self, database: Database, bells: Bells, picture: Picture) -> None:
        self._database = database
        self._bells = bells
        self._picture = picture
        self._draining: dict[int, None] = {}
        """Jobs that wait for log bytes here, the oldest first."""
        self.renewals: GroupCommit[Renewal, bool] = GroupCommit(
            "renew", self._renew, max_items=20_000, linger_s=timing.RENEWAL_FLUSH.total_seconds()
        )
        # One worker: the events of a lease are committed in the order they came.
        self.reports: GroupCommit[Report, Verdict] = GroupCommit(
            "report", self._report, max_items=2000, weight=report_bytes, max_weight=_MAX_REPORT_BATCH_BYTES
        )
        self.logs: GroupCommit[Chunk, Position] = GroupCommit(
            "log",
            self._append,
            max_items=2000,
            weight=lambda chunk: len(chunk.data),
            max_weight=_MAX_LOG_BATCH_BYTES,
        )
        self.progress: GroupCommit[ProgressRow, None] = GroupCommit("progress", self._save_progress, max_items=2000)

    def start(self) -> None:
        """Starts the group commits."""
        for commit in (self.renewals, self.reports, self.logs, self.progress):
            commit.start()

    async def close(self) -> None:
        """Commits what was accepted, refuses what comes later."""
        for commit in (self.renewals, self.reports, self.logs, self.progress):
            await commit.close()

    async def _renew(self, renewals: Sequence[Renewal]) -> list[bool]:
        # Of two streams of one session the newer epoch counts, whichever came last.
        latest: dict[int, int] = {}
        for renewal in renewals:
            latest[renewal.session_id] = max(renewal.epoch, latest.get(renewal.session_id, 0))
        rows = await self._database.fetch("renew", session_ids=list(latest), epochs=list(latest.values()))
        renewed = {row["id"] for row in rows}
        return [r.session_id in renewed and latest[r.session_id] == r.epoch for r in renewals]

    async def _report(self, reports: Sequence[Report]) -> list[Verdict]:
        mark = self._picture.mark()
        committed = await commit_reports(self._database, reports)
        self._picture.answered(mark, [report.lease_id for report in reports])
        self._picture.ended(mark, [lease_id for _, lease_id in committed.ended])
        for job in committed.draining_jobs:
            self._draining[job] = None
        while len(self._draining) > _MOST_DRAINING:
            # The oldest were ended by the leader or on another replica long ago.
            del self._draining[next(iter(self._draining))]
        for job, _ in committed.ended:
            self._bells.logs.ring(job)
        if committed.moved or committed.ended:
            self._bells.changed(waiting=committed.may_wait_again)
        if committed.ended:
            self._bells.planning.ring()
        return committed.verdicts

    async def _append(self, chunks: Sequence[Chunk]) -> list[Position]:
        positions = await append(self._database, chunks)
        jobs = {chunk.job_number for chunk in chunks}
        # What another replica or an earlier process left draining is found by the leader.
        if waiting := sorted(jobs & self._draining.keys()):
            finished = await finish_drained(self._database, waiting)
            for job in finished:
                del self._draining[job]
            if finished:
                self._bells.changed(waiting=True)
        for job in jobs:
            self._bells.logs.ring(job)
        return [positions[chunk.lease_id] for chunk in chunks]

    async def _save_progress(self, updates: Sequence[ProgressRow]) -> list[None]:
        for job in await save_progress(self._database, updates):
            self._bells.progress.ring(job)
        return [None] * len(updates)
