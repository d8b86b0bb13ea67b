"""Waking the other replicas.

What changed is in the database; a NOTIFY only says: look now, not at the next
poll. One connection of its own sends them, many changes as one, never inside a
transaction that commits jobs: a NOTIFY takes a global lock at commit.
"""

from __future__ import annotations

import asyncio
import logging

import asyncpg

from lessor_server.bells import Bells
from lessor_server.store.database import SESSION_SETTINGS, plain_url

logger = logging.getLogger(__name__)

_CHANNEL = "lessor_changed"
_COALESCE_S = 0.02
_RECONNECT_S = 1.0
_TROUBLE = (
    OSError,
    asyncio.TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)


class Wakeups:
    """Rings this replica's bells when another changed something, and the other way round."""

    def __init__(self, database_url: str, bells: Bells, replica: str) -> None:
        """``database_url`` must lead to Postgres itself: LISTEN does not pass a pooler in transaction mode."""
        self._url = plain_url(database_url)
        self._bells = bells
        self._replica = replica
        self._pending = asyncio.Event()
        bells.on_changed = self._pending.set

    async def run(self) -> None:
        """Listens and notifies until cancelled. Without a connection the polls do."""
        while True:
            try:
                connection = await asyncpg.connect(self._url, timeout=5, server_settings=SESSION_SETTINGS)
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
        await connection.add_listener(_CHANNEL, self._heard)
        while True:
            await self._pending.wait()
            await asyncio.sleep(_COALESCE_S)
            self._pending.clear()
            await connection.execute("SELECT pg_notify($1, $2)", _CHANNEL, self._replica, timeout=5)

    def _heard(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        if payload == self._replica:
            return
        self._bells.waiting.ring()
        self._bells.fleet.ring()
        self._bells.planning.ring()
        self._bells.events.ring()
        self._bells.grants.ring()
