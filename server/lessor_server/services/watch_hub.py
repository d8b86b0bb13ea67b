"""The hub: one reader of ``event`` for all watchers of a replica.

It reads while somebody is subscribed, finds out once for each filter what of an
event matches, and hands that to the subscriptions it concerns. A subscription
holds a bounded number of changes; one that is not read fast enough lets go of
them and says so, and its reader goes on from the database, by its position.

The hub is quick when little happens and slow when much does: after each reading
it rests for as long as that took, or as its watchers need to pass it on. What
happens meanwhile reaches each of them in one message.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Hashable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from lessor_server.bells import Bell, Bells
from lessor_server.domain.errors import DatabaseUnavailable
from lessor_server.services.watch_filter import AttributeCache, News, WatchFilter, matching, shown
from lessor_server.store.database import Database
from lessor_server.store.event_queries import Event, Position, read_events

_log = logging.getLogger(__name__)

Key = TypeVar("Key", bound=Hashable)

POLL_S = 1.0
"""Without a bell the hub looks this often."""

HORIZON_POLL_S = 0.02
"""It looks this often while there are events that an older transaction keeps from being told."""

MAX_PENDING_CHANGES = 20_000
"""Changes that a subscription holds; one event is held whatever its size."""

REST_PER_DELIVERY_S = 0.00025
"""To pass news on to one watcher takes about 0.1 ms of the event loop: watchers get at most 40 % of it."""

MAX_REST_S = 1.0

_PAGE_EVENTS = 500
_OUTAGE_PAUSE_S = 1.0
_RUNG_AT_ONCE = 50
"""After so many subscriptions everything else on the event loop has its turn: heartbeats, before all."""


class Subscription:
    """What one watcher has still to be told. Made by :meth:`WatchHub.subscribe`."""

    def __init__(self, since: Position, wanted: WatchFilter, bell: Bell, max_pending: int) -> None:
        self.since = since
        """All that matches after this position is handed to the subscription; what is before is in the database."""
        self.wanted = wanted
        self.overflowed = False
        """It let go of events: go on from the database."""
        self._bell = bell
        self._news: deque[News] = deque()
        self._changes = 0
        self._max_pending = max_pending

    def put(self, news: Sequence[News]) -> None:
        """Takes news, unless it has let go of earlier ones."""
        if self.overflowed:
            return
        for each in news:
            if self._news and self._changes + len(each.changes) > self._max_pending:
                self.let_go()
                return
            self._news.append(each)
            self._changes += len(each.changes)
        self._bell.ring()

    def let_go(self) -> None:
        """Forgets what waits to be taken; its reader goes on from the database."""
        self.overflowed = True
        self._news.clear()
        self._changes = 0
        self._bell.ring()

    def take(self) -> News | None:
        """Returns the next news; None: there is none now."""
        if not self._news:
            return None
        news = self._news.popleft()
        self._changes -= len(news.changes)
        return news

    @property
    def empty(self) -> bool:
        """Whether nothing waits to be taken."""
        return not self._news


@dataclass(frozen=True, slots=True)
class _Step:
    """What one reading came to."""

    poll_s: float
    """Look again after this long, whatever rings or not; 0: at once."""
    events: int
    deliveries: int


class WatchHub:
    """Reads events once for all watchers. It works only while there are any."""

    def __init__(
        self,
        database: Database,
        bells: Bells,
        *,
        poll_s: float = POLL_S,
        max_pending_changes: int = MAX_PENDING_CHANGES,
        attributes: AttributeCache | None = None,
    ) -> None:
        self._database = database
        self._bells = bells
        self._poll_s = poll_s
        self._max_pending = max_pending_changes
        self.attributes = attributes or AttributeCache(database)
        self._by_filter: dict[WatchFilter, set[Subscription]] = {}
        """Subscriptions to jobs that are not given by number."""
        self._by_number: dict[int, set[Subscription]] = {}
        self._subscribers = 0
        self._by_attributes = 0
        self._position = Position(0, 0)
        self._task: asyncio.Task[None] | None = None
        # Held while the position moves: nobody subscribes between a read and its delivery.
        self._moving = asyncio.Lock()

    @property
    def position(self) -> Position:
        """Everything up to here was handed out."""
        return self._position

    @asynccontextmanager
    async def subscribe(self, wanted: WatchFilter, bell: Bell) -> AsyncIterator[Subscription]:
        """Hands over all that matches after :attr:`Subscription.since` while the block runs.

        Args:
            wanted: The jobs of interest.
            bell: Rung when there is something to take.

        Raises:
            DatabaseUnavailable: It cannot be read where the events stand.
        """
        async with self._moving:
            if not self._subscribers:
                page = await read_events(self._database, Position(_LAST_XID, 0), 1)
                self._position = Position(page.horizon, 0)
            subscription = Subscription(self._position, wanted, bell, self._max_pending)
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
        wanted = subscription.wanted
        if not wanted.numbers:
            self._by_filter.setdefault(wanted, set()).add(subscription)
        for number in wanted.numbers:
            self._by_number.setdefault(number, set()).add(subscription)
        self._subscribers += 1
        self._by_attributes += wanted.by_attributes
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="watch-hub")

    def _remove(self, subscription: Subscription) -> None:
        wanted = subscription.wanted
        if not wanted.numbers:
            _discard(self._by_filter, wanted, subscription)
        for number in wanted.numbers:
            _discard(self._by_number, number, subscription)
        self._subscribers -= 1
        self._by_attributes -= wanted.by_attributes

    async def _run(self) -> None:
        """Reads and hands out until nobody is subscribed."""
        clock = asyncio.get_running_loop().time
        while self._subscribers:
            seen = self._bells.events.count
            began_s = clock()
            try:
                step = await self._step()
            except DatabaseUnavailable as error:
                _log.warning("watchers wait for the database", extra={"event": "watch_outage", "error": str(error)})
                await asyncio.sleep(_OUTAGE_PAUSE_S)
            except Exception:
                # A bug must not leave watchers waiting in silence: they go on from the database, and meet it there.
                _log.exception("the watch hub failed", extra={"event": "watch_failed"})
                await asyncio.sleep(_OUTAGE_PAUSE_S)
                self._let_go()
            else:
                if step.events:
                    rest_s = max(clock() - began_s, step.deliveries * REST_PER_DELIVERY_S)
                    await asyncio.sleep(min(rest_s, MAX_REST_S))
                if step.poll_s:
                    await self._bells.events.wait(seen, step.poll_s)

    async def _step(self) -> _Step:
        """Reads one page and hands it out."""
        async with self._moving:
            page = await read_events(self._database, self._position, _PAGE_EVENTS)
            if self._position < page.floor:
                # Away so long that retention passed us: each watcher finds out how far it was.
                self._let_go()
            deliveries = await self._hand_out(page.events)
            self._position = page.reached
        poll_s = 0.0 if page.full else HORIZON_POLL_S if page.above else self._poll_s
        return _Step(poll_s, len(page.events), deliveries)

    def _let_go(self) -> None:
        for subscription in set().union(*self._by_filter.values(), *self._by_number.values()):
            subscription.let_go()

    async def _hand_out(self, events: Sequence[Event]) -> int:
        """Hands events to whom they concern. Returns to how many subscriptions."""
        known = {}
        if self._by_attributes:
            # Before anything is handed out: where this fails, all of it is read again.
            known = await self.attributes.of(number for event in events for number in event.job_numbers)
        deliveries: dict[Subscription, list[News]] = {}
        for event in events:
            concerned = {
                subscription
                for number in self._by_number.keys() & set(event.job_numbers)
                for subscription in self._by_number[number]
            }
            if not concerned and not self._by_filter:
                continue
            changes = shown(event)
            for wanted, subscriptions in self._by_filter.items():
                if news := matching(wanted, event, changes, known):
                    for subscription in subscriptions:
                        deliveries.setdefault(subscription, []).append(news)
            for subscription in concerned:
                if news := matching(subscription.wanted, event, changes, known):
                    deliveries.setdefault(subscription, []).append(news)
        for number, (subscription, line) in enumerate(deliveries.items(), start=1):
            subscription.put(line)
            if not number % _RUNG_AT_ONCE:
                await asyncio.sleep(0)
        return len(deliveries)


def _discard(index: dict[Key, set[Subscription]], key: Key, subscription: Subscription) -> None:
    index[key].discard(subscription)
    if not index[key]:
        del index[key]


_LAST_XID = (1 << 63) - 1
