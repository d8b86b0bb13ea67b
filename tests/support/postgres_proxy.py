"""A proxy in front of PostgreSQL that knows which statement passes, and can lose it, its answer, or everything.

What is lost is lost at an exact point: a *request* before Postgres has seen a byte of it, an *answer* after
Postgres has committed and said so. The client sees the same in both cases, a connection that was reset.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from dataclasses import dataclass, field
from enum import Enum, auto
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit

_STARTUP = 196608
_READY = b"Z"


class Fate(Enum):
    """What becomes of the statement that was named."""

    LOSE_REQUEST = auto()
    """It never arrives; the connection is reset."""
    LOSE_ANSWER = auto()
    """It is carried out to the end; the answer is lost and the connection is reset."""
    HOLD = auto()
    """It arrives when :meth:`PostgresProxy.release` says so."""


@dataclass(eq=False)
class _Link:
    """A client's connection and the one to Postgres that belongs to it."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    texts: dict[bytes, bytes] = field(default_factory=dict)
    """name of a prepared statement → its text"""
    started: bool = False
    unread: bytes = b""
    """What of the client's next message has come in."""
    swallowing: bool = False
    swallowed: bytes = b""
    frozen: bool = False
    holding: bool = False

    def reset(self) -> None:
        self.client.transport.abort()
        self.server.transport.abort()


class PostgresProxy:
    """Listens on a port of its own; :attr:`url` is the database's by way of it."""

    def __init__(self, database_url: str) -> None:
        self._target = urlsplit(database_url)
        self._links: set[_Link] = set()
        self._server: asyncio.Server | None = None
        self._words = b""
        self._fate: Fate | None = None
        self._released = asyncio.Event()
        self._away = False
        self.happened = asyncio.Event()
        """Set when the named statement has met its fate; of one that is held, when it stands still."""

    @property
    def url(self) -> str:
        """``postgresql://…`` by way of this proxy."""
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        login = self._target.netloc.rpartition("@")[0]
        return urlunsplit(self._target._replace(netloc=f"{login}@127.0.0.1:{port}"))

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.release()
        for link in list(self._links):
            link.reset()

    def expect(self, words: str, fate: Fate) -> None:
        """Has the next execution of a statement with these words in its text meet its fate, once."""
        self._words, self._fate = words.encode(), fate
        self.happened.clear()
        self._released.clear()

    def release(self) -> None:
        """Lets a held statement go on."""
        self._released.set()

    def go_away(self) -> None:
        """The database is gone: connections are reset, new ones too."""
        self._away = True
        for link in list(self._links):
            link.reset()

    def go_away_but_for_the_held(self) -> None:
        """As :meth:`go_away`, but what is held stays under way."""
        self._away = True
        for link in list(self._links):
            if not link.holding:
                link.reset()

    def come_back(self) -> None:
        """The database takes new connections."""
        self._away = False

    def freeze(self) -> None:
        """The host behind the connections there are vanishes without a word; new ones lead to its successor."""
        for link in self._links:
            link.frozen = True

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._away:
            writer.transport.abort()
            return
        there_reader, there_writer = await asyncio.open_connection(self._target.hostname, self._target.port)
        link = _Link(writer, there_writer)
        self._links.add(link)
        try:
            await asyncio.gather(self._to_server(link, reader), self._to_client(link, there_reader))
        finally:
            self._links.discard(link)
            link.reset()

    async def _to_server(self, link: _Link, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if link.frozen:
                    continue
                if self._meets(link, data):
                    fate, self._fate = self._fate, None
                    self.happened.set()
                    if fate is Fate.LOSE_REQUEST:
                        break
                    if fate is Fate.HOLD:
                        link.holding = True
                        await self._released.wait()
                        link.holding = False
                    else:
                        self.happened.clear()
                        link.swallowing = True
                link.server.write(data)
                await link.server.drain()
        link.reset()

    async def _to_client(self, link: _Link, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if link.frozen:
                    continue
                if link.swallowing:
                    link.swallowed += data
                    if self._answered(link):
                        self.happened.set()
                        break
                    continue
                link.client.write(data)
                await link.client.drain()
        link.reset()

    def _meets(self, link: _Link, data: bytes) -> bool:
        """Takes note of the statements prepared in ``data``; returns whether it runs the one that is waited for."""
        link.unread += data
        met = False
        while len(link.unread) >= 8:
            if not link.started:
                size, code = struct.unpack_from("!ii", link.unread)
                link.started = code == _STARTUP
                link.unread = link.unread[size:]
                continue
            kind, (size,) = link.unread[:1], struct.unpack_from("!i", link.unread, 1)
            if len(link.unread) < 1 + size:
                break
            body, link.unread = link.unread[5 : 1 + size], link.unread[1 + size :]
            text = self._run_by(link, kind, body)
            met |= self._fate is not None and self._words in text
        return met

    @staticmethod
    def _run_by(link: _Link, kind: bytes, body: bytes) -> bytes:
        """Returns the text of the statement that a message runs, if any does."""
        if kind == b"P":
            name, text, _ = body.split(b"\0", 2)
            link.texts[name] = text
        if kind == b"Q":
            return body
        if kind == b"B":
            return link.texts.get(body.split(b"\0", 2)[1], b"")
        return b""

    @staticmethod
    def _answered(link: _Link) -> bool:
        """Returns whether Postgres is ready for the next statement, so that this one is committed."""
        while len(link.swallowed) >= 5:
            (size,) = struct.unpack_from("!i", link.swallowed, 1)
            if len(link.swallowed) < 1 + size:
                return False
            if link.swallowed[:1] == _READY:
                return True
            link.swallowed = link.swallowed[1 + size :]
        return False
