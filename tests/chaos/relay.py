"""A TCP relay in front of the replicas: it can delay, hold and cut what goes through it.

The kernel of many hosts has no netem, so that delay is made here. Packets are
dropped elsewhere (:mod:`.network`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Self

_CHUNK_BYTES = 65536
_MESSAGE_BYTES = 32
"""What is longer than this is no mere ping or window update of HTTP/2."""


class Direction:
    """One way through a relay: bytes may be delayed, or held back until :meth:`flow` is called."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        self._open = asyncio.Event()
        self._open.set()
        self._holds_after_next = False

    def hold(self) -> None:
        """Holds everything back from now on; nothing is lost."""
        self._open.clear()

    def hold_after_next(self) -> None:
        """Lets one more message through, then holds everything back."""
        self._holds_after_next = True

    def flow(self) -> None:
        """Lets through what was held back, and all that comes."""
        self._holds_after_next = False
        self._open.set()

    @property
    def held(self) -> bool:
        """Whether it holds everything back now."""
        return not self._open.is_set()

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carries bytes until one end closes."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256)

        async def take() -> None:
            while data := await reader.read(_CHUNK_BYTES):
                await queue.put((loop.time(), data))
            await queue.put((loop.time(), b""))

        taking = asyncio.create_task(take())
        try:
            while True:
                came_s, data = await queue.get()
                if (late_s := came_s + self.delay_s - loop.time()) > 0:
                    await asyncio.sleep(late_s)
                await self._open.wait()
                if self._holds_after_next and len(data) > _MESSAGE_BYTES:
                    self._holds_after_next = False
                    self._open.clear()
                if not data:
                    return
                writer.write(data)
                await writer.drain()
        finally:
            taking.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await taking


class Relay:
    """Listens on one address and forwards each connection to the first target that takes it."""

    def __init__(self, targets: Callable[[], list[tuple[str, int]]], host: str = "127.0.0.1") -> None:
        """Describes a relay; :meth:`open` begins it.

        Args:
            targets: (host, port) of whom to try for the next connection, in order.
            host: The address to listen on, at a free port.
        """
        self.targets = targets
        self.up = Direction()
        """To the server."""
        self.down = Direction()
        """From the server."""
        self._host = host
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._refuses = False

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def address(self) -> str:
        """``host:port``."""
        assert self._server is not None
        return "{}:{}".format(*self._server.sockets[0].getsockname()[:2])

    async def open(self) -> None:
        """Begins to listen."""
        self._server = await asyncio.start_server(self._accept, self._host, 0)

    async def close(self) -> None:
        """Ends all connections and listens no more."""
        if self._server is not None:
            self._server.close()
        self.cut()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def cut(self) -> None:
        """Resets all connections; what was held in them is lost. New ones are taken."""
        for connection in list(self._connections):
            connection.cancel()

    def refuse(self) -> None:
        """Resets all connections, and every new one, until :meth:`mend`."""
        self._refuses = True
        self.cut()

    def close_door(self) -> None:
        """Resets every new connection until :meth:`mend`; those that stand go on."""
        self._refuses = True

    def mend(self) -> None:
        """Takes connections again, and holds and delays nothing."""
        self._refuses = False
        for direction in (self.up, self.down):
            direction.delay_s = 0.0
            direction.flow()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refuses:
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            there = await self._connect()
            if there is not None:
                await self._carry(reader, writer, *there)
        except asyncio.CancelledError:
            # Cut: this handler's own task is not asked to do anything else.
            pass
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        for host, port in self.targets():
            with contextlib.suppress(OSError):
                return await asyncio.open_connection(host, port)
        return None

    async def _carry(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        there_reader: asyncio.StreamReader,
        there_writer: asyncio.StreamWriter,
    ) -> None:
        pumps = [
            asyncio.create_task(self.up.pump(reader, there_writer)),
            asyncio.create_task(self.down.pump(there_reader, writer)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            there_writer.transport.abort()
