"""Bells: how one task of a replica tells others that there is something new.

A bell carries no data: whoever hears it looks in the database. A missed ring
costs a poll interval, never a change.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


class Bell:
    """Counts rings; a waiter names the count it has seen, so that no ring falls between look and wait."""

    def __init__(self) -> None:
        self.count = 0
        self._waiters: set[asyncio.Future[None]] = set()

    def ring(self) -> None:
        """Wakes all waiters. Call it on the event loop's thread."""
        self.count += 1
        for waiter in self._waiters:
            _wake(waiter)

    async def wait(self, seen: int, timeout_s: float) -> int:
        """Returns the count as soon as it is not ``seen`` any more, or after ``timeout_s`` seconds."""
        if self.count != seen:
            return self.count
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self._waiters.add(waiter)
        # Not wait_for: Python 3.11's takes no notice of a cancellation that comes together with a ring.
        timer = loop.call_later(timeout_s, _wake, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            self._waiters.discard(waiter)
        return self.count


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class KeyedBells:
    """A bell per key, kept only while somebody listens."""

    def __init__(self) -> None:
        self._bells: dict[int, tuple[Bell, int]] = {}

    def ring(self, key: int) -> None:
        """Wakes the listeners of ``key``, if there are any."""
        if key in self._bells:
            self._bells[key][0].ring()

    @contextmanager
    def listen(self, key: int) -> Iterator[Bell]:
        """Keeps the bell of ``key`` while the block runs."""
        bell, listeners = self._bells.get(key, (Bell(), 0))
        self._bells[key] = (bell, listeners + 1)
        try:
            yield bell
        finally:
            bell, listeners = self._bells[key]
            if listeners == 1:
                del self._bells[key]
            else:
                self._bells[key] = (bell, listeners - 1)


@dataclass(slots=True)
class Bells:
    """The bells of one replica."""

    planning: Bell = field(default_factory=Bell)
    """There may be something to place: a submit, an end, a new agent, a changed queue."""
    waiting: Bell = field(default_factory=Bell)
    """Jobs wait that the planner was not told of one by one: it reads what waits."""
    fleet: Bell = field(default_factory=Bell)
    """Agents came, went or have other room than the planner knows: it reads the fleet, in time."""
    orders: Bell = field(default_factory=Bell)
    """An operator changed an agent or a queue: the planner reads the fleet before it grants again."""
    expiries: Bell = field(default_factory=Bell)
    """Leases expired, by this replica's word."""
    events: Bell = field(default_factory=Bell)
    """Rows of ``event`` were committed."""
    grants: Bell = field(default_factory=Bell)
    """Leases were granted or revoked, perhaps for agents of this replica."""
    logs: KeyedBells = field(default_factory=KeyedBells)
    """By job number: log bytes of the job were committed, or an attempt of it began or ended."""
    progress: KeyedBells = field(default_factory=KeyedBells)
    """By job number: progress of the job was stored."""
    on_changed: Callable[[], None] = lambda: None
    """Called by :meth:`changed`; the wake-up of other replicas hangs here."""

    def changed(
        self, *, waiting: bool = False, fleet: bool = False, orders: bool = False, leases: bool = False
    ) -> None:
        """Says that jobs changed state: watchers look, here and on the other replicas.

        Args:
            waiting: Jobs may wait that the planner does not know of.
            fleet: Agents may have room that the planner does not know of.
            orders: An operator has changed an agent or a queue.
            leases: Leases were granted or asked back, so they are delivered too.
        """
        self.events.ring()
        for bell, rings in ((self.waiting, waiting), (self.fleet, fleet), (self.orders, orders)):
            if rings:
                bell.ring()
        if waiting or fleet or orders:
            self.planning.ring()
        if leases:
            self.grants.ring()
        self.on_changed()
