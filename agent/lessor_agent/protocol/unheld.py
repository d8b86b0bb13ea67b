"""Leases that the agent does not hold: what is answered about them."""

from __future__ import annotations

from collections.abc import Iterable

from lessor_agent.protocol import told
from lessor_agent.protocol.actions import DropEvents, DropLease
from lessor_agent.protocol.desk import Desk
from lessor_agent.protocol.tombstones import Tombstones


class Unheld:
    """Those that are over, and never started again; and those of which something may still run."""

    def __init__(self, desk: Desk, tombstones: Iterable[int], undecided: Iterable[int]) -> None:
        """Begins with what a restarted agent found.

        Args:
            desk: Where answers go.
            tombstones: lease_ids that are never started, oldest first.
            undecided: lease_ids of which something may still run: nothing is said of them until :meth:`decide`.
        """
        self._desk = desk
        self._tombstones = Tombstones(tombstones)
        self._undecided: dict[int, str] = dict.fromkeys(undecided, "")
        """lease_id → job_id whose lease is to be released when it is decided; empty: nobody has asked."""

    def __contains__(self, lease_id: int) -> bool:
        """Whether it must not be started (again)."""
        return lease_id in self._undecided or lease_id in self._tombstones

    def is_undecided(self, lease_id: int) -> bool:
        """Whether something of it may still run."""
        return lease_id in self._undecided

    def bury(self, lease_id: int) -> None:
        """It is never started again."""
        self._tombstones.bury(lease_id)

    def release(self, job_id: str, lease_id: int, reason: str) -> None:
        """Answers for a lease, with what is still owed about it or with Released.

        Of an undecided one nothing can be said before something is known.
        """
        if lease_id in self._undecided:
            self._undecided[lease_id] = job_id
            return
        if self._desk.events.of_lease(lease_id):
            self._desk.events.unsend(lease_id)
            return
        self._tombstones.bury(lease_id)
        self._desk.record(DropLease(lease_id))
        self._desk.tell(told.released(job_id, lease_id, reason), "released")

    def drop(self, lease_id: int) -> None:
        """Nobody wants to hear of it any more."""
        if lease_id in self._undecided:
            self._undecided[lease_id] = ""
        dropped = self._desk.events.remove_lease(lease_id)
        self._tombstones.bury(lease_id)
        self._desk.record(DropLease(lease_id))
        if dropped:
            self._desk.record(DropEvents(dropped))

    def decide(self, lease_id: int) -> None:
        """Nothing runs of it any more: what was asked about it is answered."""
        job_id = self._undecided.pop(lease_id, "")
        if job_id:
            self.release(job_id, lease_id, "the agent does not hold it")
