"""The core's outgoing desk: actions in order, and what waits for the journal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from lessor.v1 import agent_service_pb2 as pb
from lessor_agent.protocol.actions import Action, DropEvents, Entry, Journal, PutEvent
from lessor_agent.protocol.events import EventLog, PendingEvent
from lessor_agent.protocol.lease import Lease

AfterCommit = Callable[[Lease, str | None], None]
"""Called with a lease and None once the entries are durable, or with why they cannot be."""


@dataclass(slots=True)
class _Transaction:
    """Entries that the journal commits together, and what follows once it has answered."""

    entries: list[Entry] = field(default_factory=list)
    events: list[PendingEvent] = field(default_factory=list)
    calls: list[tuple[AfterCommit, Lease]] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)


class Desk:
    """Collects actions and keeps the rule "journalled before sent".

    An event is sent once its transaction is committed. When the journal cannot
    take it, it is sent from memory: the agent is alive to repeat it, and after
    a crash the same event is derived from the execution again. Only a new start
    depends on the journal; whoever asks for one looks at the error.

    Whatever is to be journalled between two calls of :meth:`take` is one
    transaction: a message with a hundred grants costs one, not a hundred.
    """

    def __init__(self, events: EventLog) -> None:
        """Begins with the events that a restarted agent still owes."""
        self.events = events
        self.urgent: list[Action] = []
        """Messages that wait for nothing, not even for the end of a burst."""
        self._actions: list[Action] = []
        self._ticket = 0
        self._next = _Transaction()
        """What the next :meth:`take` has journalled."""
        self._sweeps = False
        self._waiting: dict[int, _Transaction] = {}
        self._dropped: list[int] = []

    def put(self, action: Action) -> None:
        """Adds an action."""
        self._actions.append(action)

    def take_urgent(self) -> list[Action]:
        """Returns the urgent messages since the last call."""
        urgent, self.urgent = self.urgent, []
        return urgent

    def take(self) -> list[Action]:
        """Returns the actions since the last call: urgent messages, then the others in order."""
        actions = self._actions
        transaction = self._next
        if transaction.entries or (self._sweeps and self._dropped):
            if self._dropped:
                # Nothing but disk space depends on their removal: it rides along.
                transaction.entries.append(DropEvents(tuple(self._dropped)))
                self._dropped.clear()
            self._ticket += 1
            self._waiting[self._ticket] = transaction
            # After what is sent now: whatever may be said once it is committed comes later.
            actions.append(Journal(self._ticket, tuple(transaction.entries)))
            self._next = _Transaction()
        self._sweeps = False
        if self.urgent:
            actions = self.take_urgent() + actions
        if actions:
            self._actions = []
        return actions

    def record(self, *entries: Entry) -> None:
        """Journals entries."""
        self._next.entries += entries

    def tell(self, event: pb.LeaseEvent, kind: str) -> PendingEvent:
        """Journals a new durable event and has it sent once it is committed; returns it, numbered."""
        pending = self.events.add(event, kind)
        transaction = self._next
        transaction.events.append(pending)
        transaction.entries.append(PutEvent(pending.seq, pending.lease_id, pending.data))
        return pending

    def after_commit(self, then: AfterCommit, lease: Lease) -> None:
        """Has ``then`` called with the journal's word about what was journalled just before."""
        self._next.calls.append((then, lease))

    def put_after_commit(self, action: Action) -> None:
        """Adds an action once the journal has answered about what was journalled just before, whatever it says."""
        self._next.actions.append(action)

    def drop(self, seqs: Iterable[int]) -> None:
        """Has events removed from the journal, with the next transaction or :meth:`sweep`."""
        self._dropped.extend(seqs)

    def sweep(self) -> None:
        """Journals the removals that wait."""
        self._sweeps = True

    def settle(self, ticket: int, error: str | None) -> None:
        """Takes the journal's word about ``ticket``: committed, or why not."""
        transaction = self._waiting.pop(ticket, None)
        if transaction is None:
            return
        if transaction.events:
            # What the journal does not have supersedes nothing that it has.
            self._dropped += self.events.commit(transaction.events, supersede=error is None)
        for then, lease in transaction.calls:
            then(lease, error)
        self._actions += transaction.actions
