"""The hub: one reader of ``event`` for all watchers of a replica.

It reads while somebody is subscribed and hands each event to the subscriptions
it concerns. A subscription holds a bounded number of changes; one that is not
read fast enough lets go of them and says so, and its reader goes on from the
database, by its position.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

from lessor_server.bells import Bell, Bells
from lessor_server.domain.errors import DatabaseUnavailable
from lessor_server.store.database import Database
from lessor_server.store.event_queries import Event, Position, read_events

_log = logging.getLogger(__name__)

POLL_S = 1.0
"""Without a bell the hub looks this often."""

HORIZON_POLL_S = 0.02
"""It looks this often while there are events that an older transaction keeps from being told."""

MAX_PENDING_CHANGES = 20_000
"""Changes that a subscription holds; one event is held whatever its size."""

_PAGE_EVENTS = 500
_OUTAGE_PAUSE_S = 1.0


class Subscription:
    """What one watcher has still to be told. Made by :meth:`WatchHub.subscribe`."""

    def __init__(self, since: Position, numbers: frozenset[int] | None, bell: Bell, max_pending: int) -> None:
        self.since = since
        """Every event after this position is handed to the subscription; what is before is in the database."""
        self.numbers = numbers
        """The jobs it is about; None: all."""
        self.overflowed = False
        """It let go of events: go on from the database."""
        self._bell = bell
        self._events: deque[Event] = deque()
        self._changes = 0
        self._max_pending = max_pending

    def put(self, event: Event) -> None:
        """Takes an event, unless it has let go of earlier ones."""
        if self.overflowed:
            return
        if self._events and self._changes + len(event.job_numbers) > self._max_pending:
            self.let_go()
            return
        self._events.append(event)
        self._changes += len(event.job_numbers)
        self._bell.ring()

    def let_go(self) -> None:
        """Forgets what waits to be taken; its reader goes on from the database."""
        self.overflowed = True
        self._events.clear()
        self._changes = 0
        self._bell.ring()

    def take(self) -> Event | None:
        """Returns the next event; None: there is none now."""
        if not self._events:
            return None
        event = self._events.popleft()
        self._changes -= len(event.job_numbers)
        return event

    @property
    def empty(self) -> bool:
        """Whether nothing waits to be taken."""
        return not self._events


class WatchHub:
    """Reads events once for all watchers. It works only while there are any."""

    def __init__(
        self,
        database: Database,
        bells: Bells,
        *,
        poll_s: float = POLL_S,
        max_pending_changes: int = MAX_PENDING_CHANGES,
    ) -> None:
        self._database = database
        self._bells = bells
        self._poll_s = poll_s
        self._max_pending = max_pending_changes
        self._everything: set[Subscription] = set()
        self._by_number: dict[int, set[Subscription]] = {}
        self._subscribers = 0
        self._position = Position(0, 0)
        self._task: asyncio.Task[None] | None = None
        # Held while the position moves: nobody subscribes between a read and its delivery.
        self._moving = asyncio.Lock()

    @property
    def position(self) -> Position:
        """Everything up to here was handed out."""
        return self._position

    @asynccontextmanager
    async def subscribe(self, numbers: Collection[int], bell: Bell) -> AsyncIterator[Subscription]:
        """Hands over every event after :attr:`Subscription.since` while the block runs.

        Args:
            numbers: The jobs of interest; empty: all.
            bell: Rung when there is something to take.

        Raises:
            DatabaseUnavailable: It cannot be read where the events stand.
        """
        async with self._moving:
            if not self._subscribers:
                page = await read_events(self._database, Position(_LAST_XID, 0), 1)
                self._position = Position(page.horizon, 0)
            subscription = Subscription(
                self._position, frozenset(numbers) if numbers else None, bell, self._max_pending
            )
            self._add(subscription)
        try:
            yield subscription
        finally:
            self._remove(subscription)

    async def close(self) -> None:
        """Stops reading."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def _add(self, subscription: Subscription) -> None:
        if subscription.numbers is None:
            self._everything.add(subscription)
        else:
            for number in subscription.numbers:
                self._by_number.setdefault(number, set()).add(subscription)
        self._subscribers += 1
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="watch-hub")

    def _remove(self, subscription: Subscription) -> None:
        self._everything.discard(subscription)
        for number in subscription.numbers or ():
            watchers = self._by_number[number]
            watchers.discard(subscription)
            if not watchers:
                del self._by_number[number]
        self._subscribers -= 1

    async def _run(self) -> None:
        """Reads and hands out until nobody is subscribed."""
        while self._subscribers:
            seen = self._bells.events.count
            try:
                pause_s = await self._step()
            except DatabaseUnavailable as error:
                _log.warning("watchers wait for the database", extra={"event": "watch_outage", "error": str(error)})
                await asyncio.sleep(_OUTAGE_PAUSE_S)
            except Exception:
                # A bug must not leave watchers waiting in silence: they go on from the database, and meet it there.
                _log.exception("the watch hub failed", extra={"event": "watch_failed"})
                await asyncio.sleep(_OUTAGE_PAUSE_S)
                self._let_go()
            else:
                if pause_s:
                    await self._bells.events.wait(seen, pause_s)

    async def _step(self) -> float:
        """Reads one page and hands it out. Returns how long to wait for the next, in seconds."""
        async with self._moving:
            page = await read_events(self._database, self._position, _PAGE_EVENTS)
            if self._position < page.floor:
                # Away so long that retention passed us: each watcher finds out how far it was.
                self._let_go()
            for event in page.events:
                self._hand_out(event)
            self._position = page.reached
        if page.full:
            return 0.0
        return HORIZON_POLL_S if page.above else self._poll_s

    def _let_go(self) -> None:
        for subscription in self._everything.union(*self._by_number.values()):
            subscription.let_go()

    def _hand_out(self, event: Event) -> None:
        for subscription in self._everything:
            subscription.put(event)
        if not self._by_number:
            return
        concerned: dict[Subscription, list[int]] = {}
        for index, number in enumerate(event.job_numbers):
            for subscription in self._by_number.get(number, ()):
                concerned.setdefault(subscription, []).append(index)
        for subscription, indexes in concerned.items():
            subscription.put(event.only(indexes))


_LAST_XID = (1 << 63) - 1
