"""Watching jobs: every change once, in commit order, from now or from a cursor.

A watcher subscribes to the hub first and then reads what lies between its own
position and the subscription's from the database: nothing falls between, nothing
comes twice. One that cannot keep up goes through the same door again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field

from lessor.ids import encode_job_id
from lessor.v1 import job_pb2, job_service_pb2
from lessor_server.bells import Bell, Bells
from lessor_server.domain.errors import CursorExpired, CursorFault, JobNotFound
from lessor_server.services.cursors import decode_cursor, encode_cursor
from lessor_server.services.job_view import timestamp
from lessor_server.services.watch_filter import News, WatchFilter, matching, shown
from lessor_server.services.watch_hub import Subscription, WatchHub
from lessor_server.services.watch_progress import ProgressDesk, ProgressWatch
from lessor_server.store.database import Database
from lessor_server.store.event_queries import DatabaseIdentity, Event, EventPage, Position, read_events, read_identity
from lessor_server.store.job_queries import JobAttributes, Standings, read_standings

KEEP_ALIVE_S = 15.0

_PAGE_EVENTS = 500
_CHANGES_PER_RESPONSE = 5_000
"""A response ends after the event with which it has this many: an event is never split, or its cursor would lie."""
_PROGRESS_PER_RESPONSE = 25
"""Progress may have 128 metrics with long names; a response stays far below 4 MiB."""


@dataclass(frozen=True, slots=True)
class WatchRequest:
    """What to watch; all that is given must match."""

    numbers: Sequence[int] = ()
    """These jobs; empty: all."""
    queue_id: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    cursor: str = ""
    """Go on after this; empty: from now."""
    include_progress: bool = False

    @property
    def filter(self) -> WatchFilter:
        """What of it decides whether a change matches."""
        return WatchFilter(frozenset(self.numbers), self.queue_id, frozenset(self.labels.items()))


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """Which transactions a reader had seen, as ``pg_current_snapshot()`` writes it."""

    xmin: int
    xmax: int
    running: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> _Snapshot:
        xmin, xmax, running = text.split(":")
        return cls(int(xmin), int(xmax), frozenset(int(xid) for xid in running.split(",") if xid))

    def sees(self, xid: int) -> bool:
        return xid < self.xmin or (xid < self.xmax and xid not in self.running)


class Watches:
    """Serves WatchJobs on this replica. :meth:`close` it in the end."""

    def __init__(
        self, database: Database, bells: Bells, *, hub: WatchHub | None = None, keep_alive_s: float = KEEP_ALIVE_S
    ) -> None:
        self._database = database
        self._bells = bells
        self._hub = hub or WatchHub(database, bells)
        self._keep_alive_s = keep_alive_s
        self._desk = ProgressDesk(database, bells)
        self._identity: DatabaseIdentity | None = None

    async def close(self) -> None:
        """Stops the hub; open watches hear nothing more."""
        await self._hub.close()
        await self._desk.close()

    async def watch(self, request: WatchRequest) -> AsyncGenerator[job_service_pb2.WatchJobsResponse, None]:
        """Yields changes as they commit, for as long as it is read; a keep-alive when nothing changes.

        With ``numbers`` and no cursor the first response tells where each job stands,
        and the following ones only what changed after that. Each response's cursor
        resumes after it, on any replica.

        Raises:
            JobNotFound: One of ``numbers`` does not exist.
            InvalidField: The cursor is none.
            CursorExpired: The cursor is too old, or of another database.
            DatabaseUnavailable: The database does not answer.
        """
        if self._identity is None:
            self._identity = await read_identity(self._database)
        position = decode_cursor(self._identity, request.cursor) if request.cursor else None
        watcher = _Watcher(self._database, self._hub, self._identity, request, position)
        async with aclosing(watcher.run(self._desk, self._keep_alive_s)) as responses:
            async for response in responses:
                yield response


class _Watcher:
    """One WatchJobs call."""

    def __init__(
        self,
        database: Database,
        hub: WatchHub,
        identity: DatabaseIdentity,
        request: WatchRequest,
        position: Position | None,
    ) -> None:
        self._database = database
        self._hub = hub
        self._identity = identity
        self._request = request
        self._wanted = request.filter
        self._position = position
        self._bell = Bell()
        self._told: _Snapshot | None = None
        self._progress: ProgressWatch | None = None

    async def run(
        self, desk: ProgressDesk, keep_alive_s: float
    ) -> AsyncGenerator[job_service_pb2.WatchJobsResponse, None]:
        with ExitStack() as stack:
            if self._request.include_progress:
                self._progress = stack.enter_context(ProgressWatch(desk, self._request.numbers, self._bell))
            first = True
            while True:
                async with self._hub.subscribe(self._wanted, self._bell) as subscription:
                    if self._position is None:
                        self._position = subscription.since
                    if first:
                        async for response in self._begin():
                            yield response
                        first = False
                    async for response in self._catch_up(subscription.since):
                        yield response
                    async for response in self._live(subscription, keep_alive_s):
                        yield response
                # It could not keep up: from the database to where the hub is now, and on from there.

    async def _begin(self) -> AsyncGenerator[job_service_pb2.WatchJobsResponse, None]:
        """Tells where the given jobs stand, unless the caller goes on from a cursor and knows.

        The subscription stands already: what comes after is told.
        """
        assert self._position is not None
        if self._request.cursor:
            self._check(await read_events(self._database, self._position, 1), self._position)
        if not self._request.numbers:
            # At once, so that the caller has a cursor to come back with.
            yield self._response([])
            return
        standings = await read_standings(self._database, self._wanted.numbers)
        missing = self._wanted.numbers - standings.by_number.keys()
        if missing:
            raise JobNotFound(encode_job_id(min(missing)))
        changes = _standing_changes(standings, self._request.numbers)
        if self._progress is not None:
            self._progress.note(changes)
        if self._request.cursor:
            yield self._response([])
        else:
            self._told = _Snapshot.parse(standings.snapshot)
            yield self._response(changes)

    async def _catch_up(self, until: Position) -> AsyncGenerator[job_service_pb2.WatchJobsResponse, None]:
        """Tells from the database what lies between our position and ``until``."""
        assert self._position is not None
        while self._position < until:
            page = await read_events(self._database, self._position, _PAGE_EVENTS)
            self._check(page, self._position)
            news = await self._matching([event for event in page.events if event.position <= until])
            async for response in self._tell(news):
                yield response
            self._position = min(page.reached, until)

    async def _live(
        self, subscription: Subscription, keep_alive_s: float
    ) -> AsyncGenerator[job_service_pb2.WatchJobsResponse, None]:
        """Tells what the hub hands over, until the subscription lets go of events."""
        clock = asyncio.get_running_loop().time
        keep_alive_at = clock() + keep_alive_s
        while True:
            seen = self._bell.count
            news = _taken(subscription)
            spoke = False
            progress = await self._progress.news(bool(news)) if self._progress is not None else []
            for start in range(0, len(progress), _PROGRESS_PER_RESPONSE):
                spoke = True
                yield self._response(progress[start : start + _PROGRESS_PER_RESPONSE])
            async for response in self._tell(news):
                spoke = True
                yield response
            if subscription.overflowed and subscription.empty:
                return
            if subscription.empty and not subscription.overflowed:
                self._position = max(self._position or subscription.since, self._hub.position)
            if clock() >= keep_alive_at:
                yield self._response([])
                spoke = True
            if spoke:
                keep_alive_at = clock() + keep_alive_s
            await self._bell.wait(seen, max(keep_alive_at - clock(), 0.0))

    async def _tell(self, news: Sequence[News]) -> AsyncGenerator[job_service_pb2.WatchJobsResponse, None]:
        """Tells news; our position is then after them."""
        changes: list[job_service_pb2.JobChange] = []
        for each in news:
            if self._position is not None and each.position <= self._position:
                # The cursor came from a replica whose hub was ahead of ours.
                continue
            if self._told is None or not self._told.sees(each.position.xid):
                changes += each.changes
            self._position = each.position
            if len(changes) >= _CHANGES_PER_RESPONSE:
                yield self._response(changes)
                changes = []
        if changes:
            yield self._response(changes)

    async def _matching(self, events: Sequence[Event]) -> list[News]:
        """Returns what of events that were not handed to us is for us."""
        known: dict[int, JobAttributes] = {}
        if self._wanted.by_attributes:
            numbers = (number for event in events for number in event.job_numbers if self._wanted.wants(number))
            known = await self._hub.attributes.of(numbers)
        found = [matching(self._wanted, event, shown(event), known) for event in events]
        return [news for news in found if news is not None]

    def _response(self, changes: list[job_service_pb2.JobChange]) -> job_service_pb2.WatchJobsResponse:
        assert self._position is not None
        if self._progress is not None:
            self._progress.note(changes)
        return job_service_pb2.WatchJobsResponse(changes=changes, cursor=encode_cursor(self._identity, self._position))

    def _check(self, page: EventPage, asked: Position) -> None:
        """Makes sure that ``page`` has everything after ``asked``."""
        if asked < page.floor:
            raise CursorExpired(encode_cursor(self._identity, asked), CursorFault.TOO_OLD)
        if asked.xid > page.newest:
            # A position of a future that this database never had: it was restored from a backup.
            raise CursorExpired(encode_cursor(self._identity, asked), CursorFault.FOREIGN)


def _standing_changes(standings: Standings, numbers: Sequence[int]) -> list[job_service_pb2.JobChange]:
    at = timestamp(standings.at)
    found = [standings.by_number[number] for number in dict.fromkeys(numbers)]
    return [
        job_service_pb2.JobChange(
            job_id=encode_job_id(standing.number),
            state=job_pb2.JobState.ValueType(standing.state),
            attempt=standing.attempt,
            time=at,
        )
        for standing in found
    ]


def _taken(subscription: Subscription) -> list[News]:
    taken: list[News] = []
    while len(taken) < _PAGE_EVENTS and (news := subscription.take()) is not None:
        taken.append(news)
    return taken
