"""Progress of watched jobs: latest wins, told when it is stored here or found by looking.

One desk looks for all watchers of a replica, whatever number of them there is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from types import TracebackType
from typing import Self

from lessor.ids import decode_job_id, encode_job_id
from lessor.v1 import job_pb2, job_service_pb2
from lessor_server.bells import Bell, Bells
from lessor_server.domain.errors import DatabaseUnavailable
from lessor_server.services.job_view import progress_proto, timestamp
from lessor_server.store.database import Database
from lessor_server.store.event_queries import ProgressRow, read_progress

_log = logging.getLogger(__name__)

POLL_S = 0.5
"""Progress stored through another replica is found by looking, this often."""

_LISTEN_S = 3600.0
_READ_AT_ONCE = 5_000


class _Followed:
    """One job, and who follows it."""

    def __init__(self) -> None:
        self.listening = ExitStack()
        self.listener: asyncio.Task[None] | None = None
        self.wakes: list[Bell] = []
        self.rows: list[ProgressRow] = []
        """Of the lease that was known last and of the live one, oldest first."""


class ProgressDesk:
    """Reads progress for all watchers of a replica: of jobs that rang at once, of all of them now and then.

    However many ask, one reading is under way at a time, and the next is for all who asked meanwhile.
    It rests while nobody follows. :meth:`close` it in the end.
    """

    def __init__(self, database: Database, bells: Bells, *, poll_s: float = POLL_S) -> None:
        self._database = database
        self._bells = bells
        self._poll_s = poll_s
        self._followed: dict[int, _Followed] = {}
        self._poller: asyncio.Task[None] | None = None
        self._asked: set[int] = set()
        self._next: asyncio.Task[None] | None = None
        self._reading = asyncio.Lock()

    @contextmanager
    def follow(self, numbers: Sequence[int], wake: Bell) -> Iterator[None]:
        """Keeps an eye on jobs while the block runs; ``wake`` rings when there is progress of one of them."""
        for number in numbers:
            if number not in self._followed:
                self._begin(number)
            self._followed[number].wakes.append(wake)
        if self._poller is None:
            self._poller = asyncio.create_task(self._poll(self._poll_s), name="progress-poll")
        try:
            yield
        finally:
            for number in numbers:
                self._followed[number].wakes.remove(wake)
                if not self._followed[number].wakes:
                    self._end(number)
            if not self._followed and self._poller is not None:
                self._poller.cancel()
                self._poller = None

    def _begin(self, number: int) -> None:
        followed = self._followed[number] = _Followed()
        bell = followed.listening.enter_context(self._bells.progress.listen(number))
        followed.listener = asyncio.create_task(self._listen(number, bell), name="progress-listen")
        followed.listening.callback(followed.listener.cancel)

    def _end(self, number: int) -> None:
        self._followed.pop(number).listening.close()

    async def close(self) -> None:
        """Stops looking."""
        listeners = [followed.listener for followed in self._followed.values()]
        tasks = [task for task in (*listeners, self._poller, self._next) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def look(self, numbers: Iterable[int]) -> None:
        """Returns when the progress of these followed jobs was read, by a reading that began after the call.

        Raises:
            DatabaseUnavailable: The database does not answer.
        """
        self._asked.update(numbers)
        if self._next is None:
            self._next = asyncio.create_task(self._read(), name="progress-read")
        # Whoever gives up does not end it for the others.
        await asyncio.shield(self._next)

    def latest(self, number: int) -> Sequence[ProgressRow]:
        """Returns what is known of a followed job, oldest lease first."""
        return self._followed[number].rows

    async def _read(self) -> None:
        async with self._reading:
            asked, self._asked, self._next = sorted(self._asked), set(), None
            for start in range(0, len(asked), _READ_AT_ONCE):
                await self._read_some(asked[start : start + _READ_AT_ONCE])

    async def _read_some(self, numbers: Sequence[int]) -> None:
        numbers = [number for number in numbers if number in self._followed]
        leases = [row.lease_id for number in numbers for row in self._followed[number].rows[-1:]]
        found: dict[int, list[ProgressRow]] = {}
        for row in await read_progress(self._database, numbers, leases):
            found.setdefault(row.job_number, []).append(row)
        for number, rows in found.items():
            followed = self._followed.get(number)
            rows.sort(key=lambda row: row.lease_id)
            if followed is not None and rows != followed.rows:
                followed.rows = rows
                for wake in followed.wakes:
                    wake.ring()

    async def _listen(self, number: int, bell: Bell) -> None:
        seen = bell.count
        await self._look_quietly([number])
        while True:
            count = await bell.wait(seen, _LISTEN_S)
            if count != seen:
                seen = count
                await self._look_quietly([number])

    async def _poll(self, poll_s: float) -> None:
        while True:
            await asyncio.sleep(poll_s)
            await self._look_quietly(self._followed)

    async def _look_quietly(self, numbers: Iterable[int]) -> None:
        try:
            await self.look(numbers)
        except DatabaseUnavailable as error:
            # Nothing is lost: the next look finds what is the latest then.
            _log.warning("progress waits for the database", extra={"event": "watch_outage", "error": str(error)})


class ProgressWatch:
    """The progress of some jobs, for one watcher. A context: it follows them while the block runs."""

    def __init__(self, desk: ProgressDesk, numbers: Sequence[int], wake: Bell) -> None:
        """
        Args:
            desk: Where progress is looked up.
            numbers: The jobs.
            wake: Rung when one of the jobs has news.
        """
        self._desk = desk
        self._numbers = sorted(set(numbers))
        self._wake = wake
        self._told: dict[int, tuple[int, datetime]] = {}
        self._standing: dict[int, tuple[job_pb2.JobState.ValueType, int]] = {}
        self._following = ExitStack()

    def __enter__(self) -> Self:
        self._following.enter_context(self._desk.follow(self._numbers, self._wake))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._following.close()

    def note(self, changes: Iterable[job_service_pb2.JobChange]) -> None:
        """Remembers where the jobs stand, as the watcher was told."""
        for change in changes:
            if not change.HasField("progress"):
                self._standing[decode_job_id(change.job_id)] = (change.state, change.attempt)

    async def news(self, before_changes: bool) -> list[job_service_pb2.JobChange]:
        """Returns progress that was not told yet.

        Args:
            before_changes: Changes of the jobs are about to be told: look now, so
                that the last progress of an attempt is told before its end.

        Raises:
            DatabaseUnavailable: The database does not answer.
        """
        if before_changes:
            await self._desk.look(self._numbers)
        rows = [row for number in self._numbers for row in self._desk.latest(number)]
        changes = []
        for row in sorted(rows, key=lambda row: row.lease_id):
            told = self._told.get(row.job_number)
            if told is not None and (row.lease_id, row.updated_at) <= told:
                continue
            self._told[row.job_number] = (row.lease_id, row.updated_at)
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
