"""The progress that waits to be sent: the latest of each lease, not too often."""

from __future__ import annotations

from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import job_pb2
from lessor_agent.protocol.alarms import Alarms
from lessor_agent.protocol.lease import Lease

PROGRESS_INTERVAL_NS = 100_000_000
"""Progress of one lease is sent at most this often."""


class LatestProgress:
    """What the leases last said of their progress and the server was not told.

    A lease that says nothing costs nothing here, however many are held.
    """

    def __init__(self) -> None:
        """Begins with none."""
        self._due: dict[int, Lease] = {}
        """Goes with the next message."""
        self._later: dict[int, Lease] = {}
        self._alarms = Alarms()

    def put(self, lease: Lease, progress: job_pb2.Progress, now_ns: int) -> None:
        """Takes the latest progress of a lease, whole; it replaces what waits."""
        lease.progress = progress
        if now_ns >= lease.progress_due_ns:
            self._due[lease.lease_id] = lease
        else:
            self._later[lease.lease_id] = lease
            self._alarms.set(lease.lease_id, lease.progress_due_ns)

    def hurry(self, lease: Lease) -> None:
        """Has what waits of a lease go with the next message: its end follows."""
        if lease.progress is not None:
            self._due[lease.lease_id] = lease
            if self._later.pop(lease.lease_id, None) is not None:
                self._alarms.drop(lease.lease_id)

    def drop(self, lease: Lease) -> None:
        """Forgets what waits of a lease."""
        if lease.progress is not None:
            lease.progress = None
            self._due.pop(lease.lease_id, None)
            self._later.pop(lease.lease_id, None)
            self._alarms.drop(lease.lease_id)

    @property
    def next_ns(self) -> int | None:
        """When something that waits may be sent, or earlier; None: nothing waits for its time."""
        return self._alarms.next_ns

    def take(self, now_ns: int) -> list[pb.ProgressUpdate]:
        """Returns all that is due, and counts it as sent."""
        for lease_id in self._alarms.ring(now_ns):
            if (lease := self._later.pop(lease_id, None)) is not None:
                self._due[lease_id] = lease
        if not self._due:
            return []
        updates = []
        for lease in self._due.values():
            if lease.progress is not None:
                updates.append(pb.ProgressUpdate(job_id=lease.job_id, lease_id=lease.lease_id, progress=lease.progress))
                lease.progress = None
                lease.progress_due_ns = now_ns + PROGRESS_INTERVAL_NS
        self._due.clear()
        return updates
