"""The durable events that the server has not acked yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lessor.v1 import agent_service_pb2 as pb

MAX_MESSAGE_BYTES = 1024 * 1024
MAX_MESSAGE_EVENTS = 1000
"""One LeaseEvents message carries at most this many events and about this many bytes."""

RESEND_AFTER_NS = 15_000_000_000
"""An event that is not acked for this long on a live stream is sent again."""


@dataclass(slots=True)
class PendingEvent:
    """An event on its way to the server."""

    event: pb.LeaseEvent
    committed: bool
    """It stands in the journal, or cannot: it may be sent."""
    sent_ns: int | None = None
    """When it was sent on the current stream; None: not yet."""

    @property
    def kind(self) -> str:
        """Name of the event: ``accepted``, ``ended``, …"""
        return self.event.WhichOneof("event") or ""


class EventLog:
    """Events in the order of their numbers; none leaves before it is acked or dropped."""

    def __init__(self, last_seq: int, events: Iterable[pb.LeaseEvent] = ()) -> None:
        """Begins after ``last_seq`` with the journalled ``events``."""
        self._pending: dict[int, PendingEvent] = {}
        for event in sorted(events, key=lambda event: event.seq):
            self._pending[event.seq] = PendingEvent(event, committed=True)
        self._last_seq = max([last_seq, *self._pending])
        self._unsent = bool(self._pending)
        self._resend_ns: int | None = None

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, event: pb.LeaseEvent, *, committed: bool = False) -> pb.LeaseEvent:
        """Numbers ``event`` and keeps it; it is sent once it is committed."""
        self._last_seq += 1
        event.seq = self._last_seq
        self._pending[event.seq] = PendingEvent(event, committed)
        self._unsent = self._unsent or committed
        return event

    def commit(self, seqs: Iterable[int]) -> None:
        """Marks events as journalled."""
        for seq in seqs:
            if (pending := self._pending.get(seq)) is not None:
                pending.committed = self._unsent = True

    def get(self, seq: int) -> PendingEvent | None:
        """Returns the unacked event ``seq``."""
        return self._pending.get(seq)

    def of_lease(self, lease_id: int) -> Iterator[PendingEvent]:
        """Yields the unacked events of a lease, oldest first."""
        return (pending for pending in self._pending.values() if pending.event.lease_id == lease_id)

    def remove(self, seqs: Iterable[int]) -> list[pb.LeaseEvent]:
        """Removes events and returns those that were there."""
        return [pending.event for seq in seqs if (pending := self._pending.pop(seq, None)) is not None]

    def remove_lease(self, lease_id: int) -> tuple[int, ...]:
        """Removes every event of a lease; returns their numbers."""
        seqs = tuple(pending.event.seq for pending in self.of_lease(lease_id))
        self.remove(seqs)
        return seqs

    def unsend(self, lease_id: int | None = None) -> None:
        """Has everything sent again, or everything of one lease."""
        for pending in self._pending.values():
            if lease_id is None or pending.event.lease_id == lease_id:
                pending.sent_ns = None
                self._unsent = True

    @property
    def resend_ns(self) -> int | None:
        """When events that are not acked by then are sent again; None: nothing is under way."""
        return self._resend_ns if self._pending else None

    def take_unsent(self, now_ns: int) -> Iterator[pb.LeaseEvents]:
        """Yields messages with every committed event that is due, in order, and counts them as sent."""
        if not self._unsent and (self._resend_ns is None or now_ns < self._resend_ns):
            return
        self._unsent, self._resend_ns = False, None
        message, size = pb.LeaseEvents(), 0
        for pending in self._pending.values():
            if not pending.committed:
                continue
            if pending.sent_ns is not None and now_ns - pending.sent_ns < RESEND_AFTER_NS:
                self._resend_ns = min(
                    self._resend_ns or pending.sent_ns + RESEND_AFTER_NS, pending.sent_ns + RESEND_AFTER_NS
                )
                continue
            self._resend_ns = min(self._resend_ns or now_ns + RESEND_AFTER_NS, now_ns + RESEND_AFTER_NS)
            length = pending.event.ByteSize()
            if message.events and (size + length > MAX_MESSAGE_BYTES or len(message.events) >= MAX_MESSAGE_EVENTS):
                yield message
                message, size = pb.LeaseEvents(), 0
            message.events.append(pending.event)
            size += length
            pending.sent_ns = now_ns
        if message.events:
            yield message
