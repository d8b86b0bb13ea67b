"""What production code is given in place of asyncpg's pools: statements go to the simulated database."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self

import asyncpg

from tests.simulation.postgres import Session, SimulatedPostgres
from tests.simulation.process_loop import ProcessLoop
from tests.simulation.scheduler import Process


class SimulatedPool:
    """The connections of one life of a process."""

    def __init__(self, postgres: SimulatedPostgres, process: Process, loop: ProcessLoop) -> None:
        self._postgres = postgres
        self._process = process
        self._life = process.life
        self._loop = loop

    async def fetch(self, query: str, *arguments: Any, **_: object) -> Any:
        """See :meth:`asyncpg.Pool.fetch`. Timeouts are the simulated database's own."""
        return await self.ask(query, arguments, None)

    async def fetchval(self, query: str, *arguments: Any, **_: object) -> Any:
        """See :meth:`asyncpg.Pool.fetchval`."""
        rows = await self.fetch(query, *arguments)
        return rows[0][0] if rows else None

    def acquire(self) -> _Acquired:
        """See :meth:`asyncpg.Pool.acquire`."""
        return _Acquired(self)

    def open(self) -> Session:
        """Returns a transaction of this process."""
        return self._postgres.open(self._process)

    async def ask(self, query: str, arguments: tuple[Any, ...], session: Session | None) -> Any:
        """Runs a statement."""
        future = self._future()
        self._postgres.send(self._process, self._told(future), query, arguments, session)
        return await future

    async def finish(self, session: Session, how: str) -> None:
        """Ends a transaction."""
        future = self._future()
        self._postgres.finish(session, how, self._told(future))
        await future

    def _future(self) -> asyncio.Future[Any]:
        if self._postgres.closed or self._process.life != self._life:
            raise asyncpg.InterfaceError("this life of the process is over")
        return self._loop.create_future()

    def _told(self, future: asyncio.Future[Any]) -> Any:
        def answer(rows: Any, error: BaseException | None) -> None:
            def settle() -> None:
                if future.done():
                    return
                if error is None:
                    future.set_result(rows)
                else:
                    future.set_exception(error)

            self._loop.run(settle)

        return answer


class _Acquired:
    def __init__(self, pool: SimulatedPool) -> None:
        self._connection = SimulatedConnection(pool)

    async def __aenter__(self) -> SimulatedConnection:
        return self._connection

    async def __aexit__(self, *_: object) -> None:
        return None


class SimulatedConnection:
    """A connection that was taken out of a pool."""

    def __init__(self, pool: SimulatedPool) -> None:
        self._pool = pool
        self._session: Session | None = None

    def transaction(self) -> _Transaction:
        """See :meth:`asyncpg.Connection.transaction`."""
        return _Transaction(self)

    async def fetch(self, query: str, *arguments: Any, **_: object) -> Any:
        """See :meth:`asyncpg.Connection.fetch`."""
        return await self._pool.ask(query, arguments, self._session)

    async def execute(self, query: str, *arguments: Any, **_: object) -> str:
        """See :meth:`asyncpg.Connection.execute`; tells no count."""
        await self.fetch(query, *arguments)
        return ""

    def begin(self) -> None:
        """Opens a transaction."""
        self._session = self._pool.open()

    async def finish(self, how: str) -> None:
        """Ends it."""
        session, self._session = self._session, None
        if session is not None:
            await self._pool.finish(session, how)


class _Transaction:
    def __init__(self, connection: SimulatedConnection) -> None:
        self._connection = connection

    async def __aenter__(self) -> Self:
        self._connection.begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            await self._connection.finish("COMMIT")
            return
        try:
            await self._connection.finish("ROLLBACK")
        except (asyncpg.PostgresError, asyncpg.InterfaceError):
            # What ended the transaction is what the caller is to hear.
            return
