"""The bytes under way of all leases together: whose turn it is, and what must be sent again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from lessor_agent.protocol.alarms import Alarms
from lessor_agent.protocol.logflow import DEFAULT_WINDOW_BYTES, MAX_CHUNK_BYTES, RESEND_AFTER_NS, Chunk, LeaseLog


class LogWindow:
    """Shares the window between the logs that have something to send, in turns.

    It knows those logs only: one that is quiet costs nothing. Whoever moves a
    log tells :meth:`moved`.
    """

    def __init__(self) -> None:
        """Begins with the window that holds until the server names another."""
        self.window_bytes = DEFAULT_WINDOW_BYTES
        """Unacked bytes allowed, all logs together."""
        self._in_flight_bytes = 0
        self._busy: dict[int, LeaseLog] = {}
        """Open logs with bytes that wait or are under way, by lease_id."""
        self._waiting: OrderedDict[int, LeaseLog] = OrderedDict()
        """Those whose turn comes; one that has its share of the window waits for an ack instead."""
        self._alarms = Alarms()

    def moved(self, lease_id: int, log: LeaseLog) -> None:
        """Takes note that a log has grown, was acked, goes on or is paused."""
        in_flight, pending = 0, False
        if log.is_open:
            sent = log.sent.offset
            in_flight, pending = sent - log.acked.offset, log.available.offset > sent
        self._in_flight_bytes += in_flight - log.counted_bytes
        log.counted_bytes = in_flight
        if pending:
            self._waiting.setdefault(lease_id, log)
        elif self._waiting:
            self._waiting.pop(lease_id, None)
        if pending or in_flight:
            self._busy[lease_id] = log
        elif self._busy.pop(lease_id, None) is not None:
            self._alarms.drop(lease_id)

    def forget(self, lease_id: int) -> None:
        """Takes a lease out that is no longer held."""
        if (log := self._busy.pop(lease_id, None)) is not None:
            self._in_flight_bytes -= log.counted_bytes
            log.counted_bytes = 0
            self._waiting.pop(lease_id, None)
            self._alarms.drop(lease_id)

    def pause(self, logs: Iterable[LeaseLog]) -> None:
        """Pauses all logs: none flows until the server says again where each one stands."""
        for log in logs:
            log.pause()
            log.counted_bytes = 0
        self._in_flight_bytes = 0
        self._busy.clear()
        self._waiting.clear()
        self._alarms.clear()

    @property
    def next_ns(self) -> int | None:
        """When bytes may have to be sent again, or earlier; None: none are under way."""
        return self._alarms.next_ns

    def take(self, now_ns: int) -> list[tuple[int, Chunk]]:
        """Returns (lease_id, chunk) while the window has room, no lease beyond its fair share; counts them as sent."""
        for lease_id in self._alarms.ring(now_ns):
            if (log := self._busy.get(lease_id)) is not None and log.in_flight:
                log.check(now_ns)
                self.moved(lease_id, log)
                if log.in_flight:
                    self._alarms.set(lease_id, log.moved_ns + RESEND_AFTER_NS)
        if not self._waiting:
            return []
        # A lease alone may fill the window; with others it leaves them theirs.
        share = max(MAX_CHUNK_BYTES, self.window_bytes // len(self._busy))
        chunks = []
        while self._waiting and (room := self.window_bytes - self._in_flight_bytes) > 0:
            lease_id, log = self._waiting.popitem(last=False)
            chunk = log.next_chunk(min(room, share - log.counted_bytes), now_ns)
            if chunk is None:
                # It has its share: an ack moves it, and then its turn comes again.
                continue
            chunks.append((lease_id, chunk))
            self.moved(lease_id, log)
            self._alarms.set(lease_id, log.moved_ns + RESEND_AFTER_NS)
        return chunks
