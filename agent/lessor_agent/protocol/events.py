"""The durable events that the server has not acked yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lessor.v1 import agent_service_pb2 as pb

MAX_MESSAGE_BYTES = 1024 * 1024
MAX_MESSAGE_EVENTS = 1000
"""One LeaseEvents message carries at most this many events and about this many bytes."""

RESEND_AFTER_NS = 15_000_000_000
"""An event that is not acked for this long on a live stream is sent again."""

_STEPS = {"accepted": 1, "running": 2, "ended": 3, "rejected": 3, "released": 3}
"""A later step of a lease says all that an earlier one would. Checkpoints are no step: each stands for itself."""

_TAG = bytes((pb.LeaseEvents.EVENTS_FIELD_NUMBER << 3 | 2,))
"""What stands before the length of each event in an encoded LeaseEvents."""


@dataclass(slots=True, eq=False)
class PendingEvent:
    """An event on its way to the server."""

    seq: int
    """Its number, in the journal and in acks."""
    lease_id: int
    kind: str
    """Name of the event: ``accepted``, ``ended``, …"""
    data: bytes
    """The encoded LeaseEvent, made once: for the journal, for the stream, for its size."""
    step: int
    """How far its lease has come by it; 0: no further than before."""
    committed: bool
    """It stands in the journal, or cannot: it may be sent."""
    sent_ns: int | None = None
    """When it was sent on the current stream; None: not yet."""
    told: bool = False
    """It was sent on some stream, or may have been by the agent before a restart."""
    removed: bool = False
    """It was acked or dropped."""

    @property
    def event(self) -> pb.LeaseEvent:
        """The event, read anew."""
        return pb.LeaseEvent.FromString(self.data)


class EventLog:
    """Events in the order of their numbers; none leaves before it is acked, dropped or superseded.

    What an input costs depends on the events it touches, never on how many wait.
    """

    def __init__(self, last_seq: int, events: Iterable[pb.LeaseEvent] = ()) -> None:
        """Begins after ``last_seq`` with the journalled ``events``."""
        self._last_seq = last_seq
        self._pending: dict[int, PendingEvent] = {}
        self._of_lease: dict[int, list[PendingEvent]] = {}
        self._ready: dict[int, PendingEvent] = {}
        """To be sent, by number."""
        self._under_way: deque[tuple[int, PendingEvent]] = deque()
        """(send time, event), oldest first. One whose event was acked or sent again since says nothing."""
        for event in sorted(events, key=lambda event: event.seq):
            kind = event.WhichOneof("event") or ""
            data = event.SerializeToString()
            self._last_seq = max(self._last_seq, event.seq)
            self._keep(
                PendingEvent(event.seq, event.lease_id, kind, data, _STEPS.get(kind, 0), committed=True, told=True)
            )

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, event: pb.LeaseEvent, kind: str, *, committed: bool = False) -> PendingEvent:
        """Numbers ``event`` and keeps it; it is sent once it is committed."""
        self._last_seq = event.seq = seq = self._last_seq + 1
        data = event.SerializeToString()
        pending = PendingEvent(seq, event.lease_id, kind, data, _STEPS.get(kind, 0), committed)
        self._keep(pending)
        return pending

    def commit(self, events: Iterable[PendingEvent], *, supersede: bool) -> list[int]:
        """Marks events as journalled.

        Args:
            events: As they were added.
            supersede: Drop earlier steps of the same lease that nobody was told of: Running says that the
                lease was accepted, and an end says all that came before it.

        Returns:
            Numbers of the events dropped.
        """
        dropped: list[int] = []
        for pending in events:
            if pending.removed:
                continue
            pending.committed = True
            self._ready[pending.seq] = pending
            if supersede and pending.step > 1 and len(owed := self._of_lease[pending.lease_id]) > 1:
                for earlier in tuple(owed):
                    if 0 < earlier.step < pending.step and not earlier.told:
                        self._take_out(earlier)
                        dropped.append(earlier.seq)
        return dropped

    def get(self, seq: int) -> PendingEvent | None:
        """Returns the unacked event ``seq``."""
        return self._pending.get(seq)

    def of_lease(self, lease_id: int) -> tuple[PendingEvent, ...]:
        """Returns the unacked events of a lease, oldest first."""
        return tuple(self._of_lease.get(lease_id, ()))

    def remove(self, seq: int) -> PendingEvent | None:
        """Removes an event; returns it if it was there."""
        pending = self._pending.get(seq)
        if pending is not None:
            self._take_out(pending)
        return pending

    def remove_lease(self, lease_id: int) -> tuple[int, ...]:
        """Removes every event of a lease; returns their numbers."""
        if lease_id not in self._of_lease:
            return ()
        owed = self.of_lease(lease_id)
        for pending in owed:
            self._take_out(pending)
        return tuple(pending.seq for pending in owed)

    def unsend(self, lease_id: int | None = None) -> None:
        """Has everything sent again, or everything of one lease."""
        for pending in self._pending.values() if lease_id is None else self.of_lease(lease_id):
            pending.sent_ns = None
            if pending.committed:
                self._ready[pending.seq] = pending

    @property
    def resend_ns(self) -> int | None:
        """When events that are not acked by then are sent again; None: nothing is under way."""
        under_way = self._under_way
        while under_way:
            sent_ns, pending = under_way[0]
            if pending.sent_ns == sent_ns and not pending.removed:
                return sent_ns + RESEND_AFTER_NS
            under_way.popleft()
        return None

    def take_due(self, now_ns: int) -> Iterator[pb.ConnectRequest]:
        """Yields messages with every committed event that is due, in order, and counts them as sent.

        Args:
            now_ns: CLOCK_BOOTTIME; never before that of an earlier call.
        """
        while (resend_ns := self.resend_ns) is not None and resend_ns <= now_ns:
            pending = self._under_way.popleft()[1]
            self._ready[pending.seq] = pending
        if not self._ready:
            return
        due = [self._ready[seq] for seq in sorted(self._ready)]
        self._ready.clear()
        batch: list[PendingEvent] = []
        size_bytes = 0
        for pending in due:
            pending.sent_ns = now_ns
            pending.told = True
            self._under_way.append((now_ns, pending))
            length = len(pending.data)
            if batch and (size_bytes + length > MAX_MESSAGE_BYTES or len(batch) >= MAX_MESSAGE_EVENTS):
                yield _message(batch)
                batch, size_bytes = [], 0
            batch.append(pending)
            size_bytes += length
        yield _message(batch)

    def _keep(self, pending: PendingEvent) -> None:
        self._pending[pending.seq] = pending
        owed = self._of_lease.get(pending.lease_id)
        if owed is None:
            self._of_lease[pending.lease_id] = [pending]
        else:
            owed.append(pending)
        if pending.committed:
            self._ready[pending.seq] = pending

    def _take_out(self, pending: PendingEvent) -> None:
        pending.removed = True
        del self._pending[pending.seq]
        self._ready.pop(pending.seq, None)
        owed = self._of_lease[pending.lease_id]
        if len(owed) == 1:
            del self._of_lease[pending.lease_id]
        else:
            owed.remove(pending)


def _message(events: Iterable[PendingEvent]) -> pb.ConnectRequest:
    """Returns one LeaseEvents message.

    The encoding of a repeated field is that of its elements, each behind its tag
    and length: put together from the events' bytes, it costs half of what
    copying the messages would.
    """
    parts: list[bytes] = []
    for pending in events:
        parts += (_TAG, _varint(len(pending.data)), pending.data)
    message = pb.ConnectRequest()
    message.lease_events.MergeFromString(b"".join(parts))
    return message


def _varint(number: int) -> bytes:
    if number < len(_SHORT_VARINTS):
        return _SHORT_VARINTS[number]
    return bytes((number & 0x7F | 0x80,)) + _varint(number >> 7)


_SHORT_VARINTS = [bytes((number,)) for number in range(0x80)]
