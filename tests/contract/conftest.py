"""pytest-grpc's fixtures over the server's own endpoint: stubs as any blocking client has them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import asyncpg
import pytest

from lessor.v1 import agent_service_pb2_grpc
from lessor_server.bells import Bells
from lessor_server.rpc.endpoint import Endpoint
from lessor_server.services.jobs import Jobs
from lessor_server.services.lines import Lines
from lessor_server.store.catalog import Catalog
from lessor_server.store.database import Database
from tests.support.postgres import PostgresServer
from tests.support.rows import Rows

T = TypeVar("T")


class NoAgents(agent_service_pb2_grpc.AgentServiceServicer):
    """No agent connects to this server."""

    def Connect(self, request_iterator: Any, context: Any) -> Any:
        raise NotImplementedError


class ServerThread:
    """A server on an event loop of its own, so that blocking stubs can call it."""

    def __init__(self, database_url: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="contract-server", daemon=True)
        self._thread.start()
        self.port = 0
        self.bells: Bells
        self.run(self._start(database_url))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs ``work`` on the server's loop."""
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(60)

    async def _start(self, database_url: str) -> None:
        self._database = await Database.connect(database_url, pool_size=5)
        catalog, self.bells = Catalog(self._database), Bells()
        self._jobs = Jobs(self._database, catalog, self.bells, Lines(self._database, catalog, self.bells))
        self._jobs.start()
        self._endpoint = Endpoint(self._database, catalog, self.bells, self._jobs, NoAgents())
        self.port = await self._endpoint.start("127.0.0.1", 0)
        self.pool = await asyncpg.create_pool(database_url, min_size=1, max_size=2)
        self.rows = Rows(self.pool)

    async def _stop(self) -> None:
        await self._endpoint.stop(1)
        await self._jobs.close()
        await self.pool.close()
        await self._database.close()

    def close(self) -> None:
        """Stops the server and its loop."""
        try:
            self.run(self._stop())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


@pytest.fixture(scope="module")
def grpc_server(postgres_server: PostgresServer) -> Iterator[ServerThread]:
    """The server that pytest-grpc's channels lead to, on a fresh database per module."""
    url = postgres_server.create_migrated()
    server = ServerThread(url)
    yield server
    server.close()
    postgres_server.drop(url)


@pytest.fixture(scope="module")
def grpc_addr(grpc_server: ServerThread) -> str:
    """Where it listens."""
    return f"127.0.0.1:{grpc_server.port}"
