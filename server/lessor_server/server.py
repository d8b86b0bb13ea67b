"""One server process: its parts, how they start and how they stop."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
import uuid
from collections.abc import Coroutine
from typing import Any

from lessor_server.bells import Bells
from lessor_server.config import ListenError, ServerSettings, parse_listen
from lessor_server.maintenance.housekeeping import Housekeeping
from lessor_server.maintenance.leadership import Leadership
from lessor_server.maintenance.reaper import Reaper
from lessor_server.maintenance.storm_brake import StormBrake
from lessor_server.planner.model import Policy
from lessor_server.rpc.endpoint import Endpoint
from lessor_server.services.jobs import Jobs
from lessor_server.services.lines import Lines
from lessor_server.services.picture import Picture
from lessor_server.services.planning import Planning
from lessor_server.sessions.commits import AgentCommits
from lessor_server.sessions.delivery import Delivery
from lessor_server.sessions.readings import GpuReadings
from lessor_server.sessions.servicer import AgentServicer
from lessor_server.sessions.stream import Streams
from lessor_server.store import migrate
from lessor_server.store.catalog import Catalog
from lessor_server.store.database import Database, guarded
from lessor_server.store.partitions import ensure_partitions
from lessor_server.wakeups import Wakeups

logger = logging.getLogger(__name__)

_DRAIN_STREAMS_S = 3.0
_GRACE_S = 5.0


class Server:
    """A replica. :meth:`start` it, :meth:`stop` it; a crash in between loses nothing that was committed."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.replica = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.port = 0
        """The port it listens on, once started."""
        self._tasks: list[asyncio.Task[None]] = []
        self._failed: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Connects, checks the schema, and serves.

        Raises:
            ListenError: The address cannot be used.
            ValueError: The database URL is none.
            DatabaseUnavailable: The database does not answer.
            SchemaMismatch: It holds another schema.
        """
        self._address = parse_listen(self.settings.listen, insecure=self.settings.insecure)
        self._database = await Database.connect(self.settings.database_url, pool_size=self.settings.pool_size)
        try:
            await migrate.check(self._database.pool)
            async with self._database.pool.acquire() as connection:
                # A migration may hold a table just now.
                await guarded(lambda: ensure_partitions(connection))
            await self._build()
        except BaseException:
            await self._database.close()
            raise

    async def _build(self) -> None:
        bells = Bells()
        catalog = Catalog(self._database)
        streams = Streams()
        readings = GpuReadings(self._database)
        delivery = Delivery(self._database, streams, bells)
        wakeups = Wakeups(self._database.url, bells, self.replica)
        self._leadership = Leadership(
            self._database, self.replica, time.monotonic, StormBrake(self.settings.storm_brake_max)
        )
        policy = Policy()
        lines = Lines(self._database, catalog, bells)
        picture = Picture(self._database, bells, policy)
        self._jobs = Jobs(self._database, catalog, bells, lines)
        self._commits = AgentCommits(self._database, bells, picture)
        self._agents = AgentServicer(self._database, streams, self._commits, delivery, readings, bells, self.replica)
        self._endpoint = Endpoint(
            self._database, catalog, bells, self._jobs, self._agents, shared_port=self.settings.workers > 1
        )
        planning = Planning(self._database, self._leadership, picture, lines, delivery, bells, policy=policy)
        reaper = Reaper(self._database, self._leadership, bells)
        housekeeping = Housekeeping(self._database, self._leadership, self.settings.retention)
        self._jobs.start()
        self._commits.start()
        await self._leadership.step()
        self._failed = asyncio.get_running_loop().create_future()
        try:
            self.port = await self._endpoint.start(self._address.host, self._address.port)
        except OSError as error:
            await self._jobs.close()
            await self._commits.close()
            raise ListenError.refused(self.settings.listen, error) from None
        for name, work in {
            "leadership": self._leadership.run(),
            "planning": planning.run(),
            "reaper": reaper.run(),
            "housekeeping": housekeeping.run(),
            "delivery": delivery.run(),
            "readings": readings.run(),
            "wakeups": wakeups.run(),
        }.items():
            self._spawn(name, work)
        logger.info("the server is up", extra={"event": "up", "replica": self.replica, "port": self.port})

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._on_end)
        self._tasks.append(task)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """A loop that ends by itself is a broken invariant: the process goes down loudly, another takes over."""
        if task.cancelled() or self._failed is None or self._failed.done():
            return
        error = task.exception() or RuntimeError(f"the task {task.get_name()} ended")
        self._failed.set_exception(error)

    async def failed(self) -> None:
        """Waits until a part of the server breaks.

        Raises:
            Exception: What broke it.
        """
        assert self._failed is not None
        await asyncio.shield(self._failed)

    async def stop(self) -> None:
        """Stops gracefully: agents are sent elsewhere, RPCs under way end, leases stand."""
        logger.info("the server stops", extra={"event": "stopping", "replica": self.replica})
        self._endpoint.stop_serving()
        await self._agents.stop()
        await self._agents.ended(_DRAIN_STREAMS_S)
        await self._endpoint.stop(_GRACE_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            # Before the last commits, which may take long: nobody ticks any more, and others would have to notice.
            await self._leadership.resign()
        except Exception as error:
            logger.warning("could not resign", extra={"event": "resign", "error": str(error)})
        await self._jobs.close()
        await self._commits.close()
        await self._database.close()
        if self._failed is not None and not self._failed.done():
            self._failed.cancel()
