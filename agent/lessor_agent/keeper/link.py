"""The agent's end of a socket to a keeper, or to the zygote: JSON lines go out and come in, on the running loop."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable

_READ_BYTES = 1 << 16


class Link:
    """One connection.

    Neither a task nor a stream stands behind it: most jobs exchange five short
    lines with their keeper, which fit into the socket's buffer.
    """

    def __init__(
        self,
        connection: socket.socket,
        *,
        hear: Callable[[dict[str, object]], None],
        lost: Callable[[Exception | None], None],
    ) -> None:
        """Begins to listen.

        Args:
            connection: Connected and non-blocking; it is closed by this object.
            hear: Called with each line, in order.
            lost: Called once, after the last line, when the other end has hung up; with an exception when
                it cannot be understood, and what it says from then on is not heard.
        """
        self._connection = connection
        self._hear = hear
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._inbox = b""
        self._outbox = b""
        """What the socket's buffer had no room for."""
        self._listening = True
        self._loop.add_reader(connection.fileno(), self._readable)

    def order(self, order: dict[str, object]) -> None:
        """Sends a line; one to somebody who has hung up goes nowhere."""
        if self._connection.fileno() < 0:
            return
        line = json.dumps(order).encode() + b"\n"
        if self._outbox:
            self._outbox += line
            return
        self._outbox = self._send(line)
        if self._outbox:
            self._loop.add_writer(self._connection.fileno(), self._write)

    def close(self) -> None:
        """Hangs up. Closing twice does nothing, and ``lost`` is not called any more."""
        if (fd := self._connection.fileno()) < 0:
            return
        self._listening = False
        self._loop.remove_reader(fd)
        self._loop.remove_writer(fd)
        self._connection.close()

    def _write(self) -> None:
        self._outbox = self._send(self._outbox)
        if not self._outbox:
            self._loop.remove_writer(self._connection.fileno())

    def _send(self, data: bytes) -> bytes:
        """Returns what is left."""
        try:
            return data[self._connection.send(data) :]
        except BlockingIOError:
            return data
        except OSError:
            # It has hung up, which is read as well.
            return b""

    def _readable(self) -> None:
        try:
            data = self._connection.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            # The same as its end of file.
            data = b""
        if not data:
            self._end(None)
            return
        *lines, self._inbox = (self._inbox + data).split(b"\n")
        try:
            for line in lines:
                if self._listening:
                    self._hear(json.loads(line))
        except Exception as error:
            self._end(error)

    def _end(self, error: Exception | None) -> None:
        self._listening = False
        # Orders may still be sent to one that is not understood.
        self._loop.remove_reader(self._connection.fileno())
        self._lost(error)
