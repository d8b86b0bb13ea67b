"""Progress of watched jobs: latest wins, told when it is stored here or found by looking."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from datetime import datetime
from types import TracebackType
from typing import Self

from lessor.ids import decode_job_id, encode_job_id
from lessor.v1 import job_pb2, job_service_pb2
from lessor_server.bells import Bell, Bells
from lessor_server.services.job_view import progress_proto, timestamp
from lessor_server.store.database import Database
from lessor_server.store.event_queries import read_progress

POLL_S = 0.5
"""Progress stored through another replica is found by looking, this often."""

_LISTEN_S = 3600.0


class ProgressWatch:
    """The progress of some jobs, for one watcher. A context: it listens while the block runs."""

    def __init__(
        self, database: Database, numbers: Sequence[int], bells: Bells, wake: Bell, *, poll_s: float = POLL_S
    ) -> None:
        """
        Args:
            database: The store.
            numbers: The jobs.
            bells: Those of this replica.
            wake: Rung when one of the jobs has news.
            poll_s: Look at least this often, in seconds.
        """
        self.poll_s = poll_s
        self._database = database
        self._numbers = sorted(set(numbers))
        self._bells = bells
        self._wake = wake
        self._rung = True
        self._looked_at_s = 0.0
        self._lease_of: dict[int, int] = {}
        self._told: dict[int, tuple[int, datetime]] = {}
        self._standing: dict[int, tuple[job_pb2.JobState.ValueType, int]] = {}
        self._listening = ExitStack()
        self._tasks: list[asyncio.Task[None]] = []

    def __enter__(self) -> Self:
        for number in self._numbers:
            bell = self._listening.enter_context(self._bells.progress.listen(number))
            self._tasks.append(asyncio.create_task(self._listen(bell)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        self._listening.close()

    async def _listen(self, bell: Bell) -> None:
        seen = bell.count
        while True:
            count = await bell.wait(seen, _LISTEN_S)
            if count != seen:
                seen = count
                self._rung = True
                self._wake.ring()

    def note(self, changes: Iterable[job_service_pb2.JobChange]) -> None:
        """Remembers where the jobs stand, as the watcher was told."""
        for change in changes:
            if not change.HasField("progress"):
                self._standing[decode_job_id(change.job_id)] = (change.state, change.attempt)

    async def news(self, before_changes: bool) -> list[job_service_pb2.JobChange]:
        """Returns progress that was not told yet; looks only when it rang or the poll is due.

        Args:
            before_changes: Changes of the jobs are about to be told: look now, so
                that the last progress of an attempt is told before its end.
        """
        now_s = asyncio.get_running_loop().time()
        if not (self._rung or before_changes or now_s >= self._looked_at_s + self.poll_s):
            return []
        self._rung = False
        self._looked_at_s = now_s
        found = await read_progress(self._database, self._numbers, sorted(self._lease_of.values()))
        changes = []
        for row in sorted(found, key=lambda row: row.lease_id):
            told = self._told.get(row.job_number)
            if told is not None and (row.lease_id, row.updated_at) <= told:
                continue
            self._told[row.job_number] = (row.lease_id, row.updated_at)
            self._lease_of[row.job_number] = row.lease_id
            state, attempt = self._standing.get(row.job_number, (job_pb2.JOB_STATE_RUNNING, 0))
            changes.append(
                job_service_pb2.JobChange(
                    job_id=encode_job_id(row.job_number),
                    state=state,
                    attempt=attempt,
                    time=timestamp(row.updated_at),
                    progress=progress_proto(row.fraction, row.message, row.metrics, row.updated_at),
                )
            )
        return changes
