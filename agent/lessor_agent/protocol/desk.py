"""The core's outgoing desk: actions in order, and what waits for the journal."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lessor.v1 import agent_service_pb2 as pb
from lessor_agent.protocol.actions import Action, DropEvents, Entry, Journal, PutEvent
from lessor_agent.protocol.events import EventLog

AfterCommit = Callable[[str | None], None]
"""Called with None once the entries are durable, or with why they cannot be."""


class Desk:
    """Collects actions and keeps the rule "journalled before sent".

    An event is sent once its transaction is committed. When the journal cannot
    take it, it is sent from memory: the agent is alive to repeat it, and after
    a crash the same event is derived from the execution again. Only a new start
    depends on the journal; whoever asks for one looks at the error.
    """

    def __init__(self, events: EventLog) -> None:
        """Begins with the events that a restarted agent still owes."""
        self.events = events
        self._actions: list[Action] = []
        self._ticket = 0
        self._waiting: dict[int, tuple[tuple[int, ...], AfterCommit | None]] = {}
        self._dropped: list[int] = []

    def put(self, action: Action) -> None:
        """Adds an action."""
        self._actions.append(action)

    def take(self) -> list[Action]:
        """Returns the actions since the last call, in order."""
        actions, self._actions = self._actions, []
        return actions

    def journal(self, entries: Iterable[Entry | pb.LeaseEvent], then: AfterCommit | None = None) -> None:
        """Journals entries and new events in one transaction, then calls ``then``.

        Numbers of acked events ride along: nothing but disk space depends on
        their removal.
        """
        seqs: list[int] = []
        written: list[Entry] = []
        for entry in entries:
            if isinstance(entry, pb.LeaseEvent):
                self.events.add(entry)
                seqs.append(entry.seq)
                written.append(PutEvent(entry.seq, entry.lease_id, entry.SerializeToString()))
            else:
                written.append(entry)
        if self._dropped:
            written.append(DropEvents(tuple(self._dropped)))
            self._dropped.clear()
        self._ticket += 1
        self._waiting[self._ticket] = (tuple(seqs), then)
        self.put(Journal(self._ticket, tuple(written)))

    def drop(self, seqs: Iterable[int]) -> None:
        """Has events removed from the journal, with the next transaction or :meth:`sweep`."""
        self._dropped.extend(seqs)

    def sweep(self) -> None:
        """Journals the removals that wait."""
        if self._dropped:
            self.journal(())

    def settle(self, ticket: int, error: str | None) -> None:
        """Takes the journal's word about ``ticket``: committed, or why not."""
        waiting = self._waiting.pop(ticket, None)
        if waiting is None:
            return
        seqs, then = waiting
        self.events.commit(seqs)
        if then is not None:
            then(error)
