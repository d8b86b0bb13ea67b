"""Waking the other replicas.

What changed is in the database; a NOTIFY only says: look now, not at the next
poll. One connection of its own sends them, many changes as one, never inside a
transaction that commits jobs: a NOTIFY takes a global lock at commit.

Now and then replicas say that they are there, and one that hears of no other says
nothing else. Most servers are alone, and a NOTIFY is a transaction with a number:
for as long as it runs, watchers are not told of what was committed after it.
"""

from __future__ import annotations

import asyncio
import logging
import time

import asyncpg

from lessor_server.bells import Bells
from lessor_server.store.database import SESSION_SETTINGS, plain_url

logger = logging.getLogger(__name__)

BEACON_S = 5.0
"""A replica says so often that it is there, and at once to one that is new."""

ABSENT_S = 3 * BEACON_S
"""One that was not heard for so long is gone. Until then it is told of changes, which costs little."""

CHANNEL = "lessor_changed"
HERE = "here "
"""Begins the message of a replica that is there; one that has changed something says its name alone."""

_COALESCE_S = 0.02
_RECONNECT_S = 1.0
_TROUBLE = (
    OSError,
    asyncio.TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)


class Others:
    """Which other replicas there are, by what was heard of them. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._heard_at_s: dict[str, float] = {}

    def heard(self, replica: str, now_s: float) -> bool:
        """Takes note of a replica's word; returns whether it is new, or was gone."""
        is_new = now_s - self._heard_at_s.get(replica, -ABSENT_S) >= ABSENT_S
        # The one heard last stands last.
        self._heard_at_s.pop(replica, None)
        self._heard_at_s[replica] = now_s
        if is_new:
            self._heard_at_s = {name: at_s for name, at_s in self._heard_at_s.items() if now_s - at_s < ABSENT_S}
        return is_new

    def any(self, now_s: float) -> bool:
        """Returns whether there are any."""
        latest_s = next(reversed(self._heard_at_s.values()), None)
        return latest_s is not None and now_s - latest_s < ABSENT_S


class Wakeups:
    """Rings this replica's bells when another changed something, and the other way round."""

    def __init__(self, database_url: str, bells: Bells, replica: str, *, beacon_s: float = BEACON_S) -> None:
        """
        Args:
            database_url: Must lead to Postgres itself: LISTEN does not pass a pooler in transaction mode.
            bells: Those of this replica.
            replica: Its name.
            beacon_s: How often it says that it is there, in seconds; below :data:`ABSENT_S`.
        """
        self._url = plain_url(database_url)
        self._bells = bells
        self._replica = replica
        self._beacon_s = beacon_s
        self._others = Others()
        self._work = asyncio.Event()
        self._changed = False
        self._greet = False
        bells.on_changed = self._on_changed

    def _on_changed(self) -> None:
        # One that is not known yet reads everything when it starts, and then polls.
        if self._others.any(time.monotonic()):
            self._changed = True
            self._work.set()

    async def run(self) -> None:
        """Listens and notifies until cancelled. Without a connection the polls do."""
        while True:
            try:
                connection = await asyncpg.connect(
                    self._url,
                    timeout=5,
                    # Nothing of it is to last: it need not wait for the disk.
                    server_settings={**SESSION_SETTINGS, "synchronous_commit": "off"},
                )
            except _TROUBLE:
                await asyncio.sleep(_RECONNECT_S)
                continue
            try:
                await self._serve(connection)
            except _TROUBLE as error:
                logger.warning("wake-ups are interrupted", extra={"event": "wakeups", "error": str(error)})
            finally:
                connection.terminate()
            await asyncio.sleep(_RECONNECT_S)

    async def _serve(self, connection: asyncpg.Connection) -> None:
        await connection.add_listener(CHANNEL, self._heard)
        connection.add_termination_listener(lambda _: self._work.set())
        while True:
            self._greet = False
            await self._say(connection, HERE + self._replica)
            beacon_at_s = time.monotonic() + self._beacon_s
            while not self._greet and (left_s := beacon_at_s - time.monotonic()) > 0:
                try:
                    # Not wait_for: Python 3.11's takes no notice of a cancellation that comes together with work.
                    async with asyncio.timeout(left_s):
                        await self._work.wait()
                except TimeoutError:
                    break
                if self._changed:
                    await asyncio.sleep(_COALESCE_S)
                self._work.clear()
                if connection.is_closed():
                    # With another one it is heard again, though there is nothing to say.
                    raise ConnectionResetError("the connection was closed")
                if self._changed:
                    self._changed = False
                    await self._say(connection, self._replica)

    async def _say(self, connection: asyncpg.Connection, message: str) -> None:
        await connection.execute("SELECT pg_notify($1, $2)", CHANNEL, message, timeout=5)

    def _heard(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        message = str(payload)
        replica = message.removeprefix(HERE)
        if replica == self._replica:
            return
        if self._others.heard(replica, time.monotonic()):
            # It is to know of us before the next change here, not at our next beacon.
            self._greet = True
            self._work.set()
        if message.startswith(HERE):
            return
        self._bells.waiting.ring()
        self._bells.fleet.ring()
        self._bells.planning.ring()
        self._bells.events.ring()
        self._bells.grants.ring()
