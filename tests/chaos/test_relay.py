"""What a relay does to the bytes that go through it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.chaos.relay import Relay

pytestmark = pytest.mark.unit

LONG = b"x" * 100


class Link:
    """A relay in front of an echo, and a connection through it."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay

    async def connect(self) -> None:
        host, _, port = self.relay.address.rpartition(":")
        self.reader, self.writer = await asyncio.open_connection(host, int(port))

    async def echoed(self, data: bytes) -> bytes:
        self.writer.write(data)
        return await asyncio.wait_for(self.reader.readexactly(len(data)), 10)


@pytest.fixture
async def link() -> AsyncIterator[Link]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    # Port 1 is taken by nobody: the relay goes on to the next.
    async with server, Relay(lambda: [("127.0.0.1", 1), ("127.0.0.1", port)]) as relay:
        made = Link(relay)
        await made.connect()
        yield made
        made.writer.close()


async def test_it_passes_bytes_on(link: Link) -> None:
    assert await link.echoed(b"one" * 100_000) == b"one" * 100_000


async def test_what_is_held_comes_later_and_whole(link: Link) -> None:
    link.relay.up.hold()
    answer = asyncio.create_task(link.echoed(LONG))
    await asyncio.wait([answer], timeout=0.05)
    assert not answer.done()
    link.relay.up.flow()
    assert await answer == LONG


async def test_one_more_message_passes_and_no_ping_counts(link: Link) -> None:
    link.relay.up.hold_after_next()
    assert await link.echoed(b"ping") == b"ping"
    assert not link.relay.up.held
    assert await link.echoed(LONG) == LONG
    assert link.relay.up.held
    link.relay.mend()
    assert await link.echoed(b"again") == b"again"


async def test_delay_is_kept(link: Link) -> None:
    link.relay.down.delay_s = 0.1
    begin_s = asyncio.get_running_loop().time()
    assert await link.echoed(LONG) == LONG
    assert asyncio.get_running_loop().time() - begin_s >= 0.1


async def test_a_cut_loses_what_was_held_and_lets_new_connections_in(link: Link) -> None:
    link.relay.up.hold()
    link.writer.write(LONG)
    link.relay.cut()
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(link.reader.readexactly(1), 10)
    link.relay.up.flow()
    await link.connect()
    assert await link.echoed(b"new") == b"new"


async def test_a_closed_door_refuses_only_new_connections(link: Link) -> None:
    assert await link.echoed(b"before") == b"before"
    link.relay.close_door()
    assert await link.echoed(b"stands") == b"stands"
    other = Link(link.relay)
    await other.connect()
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await other.echoed(b"new")
    link.relay.refuse()
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await link.echoed(b"cut")
    link.relay.mend()
    await link.connect()
    assert await link.echoed(b"mended") == b"mended"
