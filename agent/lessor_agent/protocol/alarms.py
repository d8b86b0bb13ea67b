"""When something is due, by lease: the next one is found without looking at the others."""

from __future__ import annotations

import heapq

_SPARE_ENTRIES = 64


class Alarms:
    """One alarm per lease, in CLOCK_BOOTTIME nanoseconds.

    An alarm may ring early and never late: whoever set it looks at what is so
    and sets it again. Setting and ringing cost O(log n) of the alarms that
    stand.
    """

    __slots__ = ("_at_ns", "_heap")

    def __init__(self) -> None:
        """Begins with none."""
        self._at_ns: dict[int, int] = {}
        self._heap: list[tuple[int, int]] = []
        """(time, lease_id). One that names another time than :attr:`_at_ns` was replaced or dropped."""

    def set(self, lease_id: int, at_ns: int) -> None:
        """Has the alarm of a lease ring at ``at_ns``; one that stands and rings earlier stays."""
        standing_ns = self._at_ns.get(lease_id)
        if standing_ns is not None and standing_ns <= at_ns:
            return
        self._at_ns[lease_id] = at_ns
        heapq.heappush(self._heap, (at_ns, lease_id))
        if len(self._heap) > 2 * len(self._at_ns) + _SPARE_ENTRIES:
            self._heap = [(standing, lease) for lease, standing in self._at_ns.items()]
            heapq.heapify(self._heap)

    def drop(self, lease_id: int) -> None:
        """Takes the alarm of a lease away, if it has one."""
        self._at_ns.pop(lease_id, None)

    def clear(self) -> None:
        """Takes all alarms away."""
        self._at_ns.clear()
        self._heap.clear()

    @property
    def next_ns(self) -> int | None:
        """When the next one rings; None: there is none."""
        heap = self._heap
        while heap:
            at_ns, lease_id = heap[0]
            if self._at_ns.get(lease_id) == at_ns:
                return at_ns
            heapq.heappop(heap)
        return None

    def ring(self, now_ns: int) -> list[int]:
        """Returns the leases whose alarm is due, the earliest first; those stand no more."""
        due = []
        while (at_ns := self.next_ns) is not None and at_ns <= now_ns:
            lease_id = heapq.heappop(self._heap)[1]
            del self._at_ns[lease_id]
            due.append(lease_id)
        return due
