"""The agent's journal without SQLite: what is committed survives the agent, and reads as the real one would.

``test_the_journal_reads_like_the_real_one`` holds the two together.
"""

from __future__ import annotations

from collections.abc import Iterable

from lessor.lifecycle import LeasePhase
from lessor.v1 import agent_service_pb2 as pb
from lessor_agent.journal import Contents, JournalledLease
from lessor_agent.protocol.actions import DropEvents, DropLease, Entry, PutEvent, PutHandle, PutLease, PutPhase


class MemoryJournal:
    """What is on the disk."""

    def __init__(self) -> None:
        self._boot_id = ""
        self._leases: dict[int, JournalledLease] = {}
        self._events: dict[int, pb.LeaseEvent] = {}
        self._tombstones: dict[int, None] = {}
        self._last_seq = 0

    def open(self, boot_id: str) -> Contents:
        """Returns what it holds, and notes the boot."""
        before, self._boot_id = self._boot_id, boot_id
        return Contents(
            before,
            tuple(lease for _, lease in sorted(self._leases.items())),
            tuple(event for _, event in sorted(self._events.items())),
            tuple(sorted(self._tombstones)),
            max([self._last_seq, *self._events]),
        )

    def commit(self, entries: Iterable[Entry]) -> None:
        """Makes entries durable."""
        for entry in entries:
            match entry:
                case PutLease():
                    grant = pb.Grant.FromString(entry.grant)
                    self._leases[entry.lease_id] = JournalledLease(grant, LeasePhase.OFFERED, None)
                case PutHandle():
                    if (lease := self._leases.get(entry.lease_id)) is not None:
                        self._leases[entry.lease_id] = JournalledLease(lease.grant, lease.phase, entry.handle)
                case PutPhase():
                    if (lease := self._leases.get(entry.lease_id)) is not None:
                        self._leases[entry.lease_id] = JournalledLease(lease.grant, entry.phase, lease.handle)
                case PutEvent():
                    self._events[entry.seq] = pb.LeaseEvent.FromString(entry.event)
                    self._last_seq = entry.seq
                case DropEvents():
                    for seq in entry.seqs:
                        self._events.pop(seq, None)
                case DropLease():
                    self._leases.pop(entry.lease_id, None)
                    self._tombstones[entry.lease_id] = None
