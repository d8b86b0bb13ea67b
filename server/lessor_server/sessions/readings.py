"""The latest GPU readings of heartbeats, written to the database now and then."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from lessor.v1 import agent_service_pb2 as pb
from lessor_server.domain.errors import LessorServerError
from lessor_server.store.database import Database

logger = logging.getLogger(__name__)

_WRITE_EVERY_S = 10.0


class GpuReadings:
    """Collects readings; latest wins, one statement per interval however many agents."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._latest: dict[tuple[str, str], tuple[int, int]] = {}

    def note(self, agent_id: str, readings: Iterable[pb.GpuReading]) -> None:
        """Remembers what an agent's GPUs do."""
        for reading in readings:
            self._latest[agent_id, reading.uuid] = (reading.utilization_percent, reading.memory_used_bytes)

    async def run(self) -> None:
        """Writes readings until cancelled."""
        while True:
            await asyncio.sleep(_WRITE_EVERY_S)
            try:
                await self.write()
            except LessorServerError as error:
                logger.warning("readings wait for the database", extra={"event": "readings", "error": error.message})

    async def write(self) -> None:
        """Writes what came in since the last time."""
        if not self._latest:
            return
        latest, self._latest = self._latest, {}
        keys = sorted(latest)
        await self._database.fetch(
            "save_readings",
            agent_ids=[agent for agent, _ in keys],
            uuids=[uuid for _, uuid in keys],
            utilizations=[latest[key][0] for key in keys],
            memories=[latest[key][1] for key in keys],
        )
