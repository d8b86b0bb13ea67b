"""Planted bugs: the simulation must find each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from unittest.mock import patch

from google.protobuf.duration_pb2 import Duration

from lessor_agent.protocol.events import EventLog
from lessor_agent.protocol.leases import LeaseTable
from lessor_agent.protocol.session import Session
from lessor_server.store import reports


@dataclass(frozen=True)
class Mutant:
    """A bug: statements with other texts, and functions with other bodies."""

    name: str
    what: str
    statements: Mapping[str, Callable[[str], str]] = field(default_factory=dict)
    patches: Callable[[], list[Any]] = list

    def plant(self, stack: ExitStack) -> None:
        """Plants it until ``stack`` ends."""
        for planted in self.patches():
            stack.enter_context(planted)


def _without(*parts: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        for part in parts:
            assert part in text, f"{part!r} is not in the statement any more"
            text = text.replace(part, "")
        return text

    return change


def _replaced(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text, f"{old!r} is not in the statement any more"
        return text.replace(old, new)

    return change


def _no_margin() -> list[Any]:
    def durations(ttl_ms: int) -> tuple[Duration, Duration]:
        ttl = Duration()
        ttl.FromMilliseconds(ttl_ms)
        return ttl, Duration()

    return [
        patch("lessor.timing.margin", lambda ttl: timedelta()),
        patch("lessor_server.sessions.convert._durations", durations),
    ]


def _receive_time() -> list[Any]:
    acked, welcome = Session.heartbeat_acked, Session.welcome

    def heartbeat_acked(self: Session, seq: int, now_ns: int) -> bool:
        moved = acked(self, seq, now_ns)
        if moved:
            self.renewed_ns = now_ns
        return moved

    def welcomed(self: Session, session_id: int, epoch: int, now_ns: int) -> None:
        welcome(self, session_id, epoch, now_ns)
        self.renewed_ns = now_ns

    return [patch.object(Session, "heartbeat_acked", heartbeat_acked), patch.object(Session, "welcome", welcomed)]


async def _nothing_revived(database: Any, late: Any, now: Any) -> set[Any]:
    return set()


def _drop_outbox() -> list[Any]:
    def unsend(self: EventLog, lease_id: int | None = None) -> None:
        if lease_id is None:
            for pending in list(self._pending.values()):
                self.remove(pending.seq)

    return [patch.object(EventLog, "unsend", unsend)]


MUTANTS = (
    Mutant(
        "margin-skipped",
        "neither side keeps the margin",
        {"expire": _without(" + 1000 + l.ttl_ms / 50")},
        _no_margin,
    ),
    Mutant(
        "end-unfenced",
        "end.sql does not look at the lease_id",
        {
            "end": _replaced(
                "l.job_id = i.job_id AND l.lease_id = i.lease_id AND l.agent_id = i.agent_id", "l.job_id = i.job_id"
            )
        },
    ),
    Mutant(
        "leader-epoch-unguarded",
        "a leader of an old term goes on counting lease time and ending leases",
        {
            "tick": _replaced("WHERE epoch = ", "WHERE 0 <> "),
            "expire": _replaced("FROM leader WHERE epoch = ", "FROM leader WHERE 0 <> "),
            "claim": _replaced("FROM leader WHERE epoch = ", "FROM leader WHERE 0 <> "),
        },
    ),
    Mutant(
        "session-unlocked",
        "expire.sql does not lock the session",
        {"expire": _replaced("FOR UPDATE OF s, l SKIP LOCKED", "FOR UPDATE OF l SKIP LOCKED")},
    ),
    Mutant("receive-time", "a renewal counts from when its ack came, not from when it was sent", {}, _receive_time),
    Mutant(
        "late-end-refused",
        "an end whose lease has expired does not finish its waiting job",
        {},
        lambda: [patch.object(reports, "_revive", _nothing_revived)],
    ),
    Mutant(
        "revoke-ignored",
        "the agent does nothing when a lease is asked back",
        {},
        lambda: [patch.object(LeaseTable, "revoked", lambda self, revoke, now_ns: None)],
    ),
    Mutant("outbox-dropped", "events that were not acked are forgotten at a reconnect", {}, _drop_outbox),
)
