"""Renewals cost one statement per flush, however many agents there are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from lessor.ids import encode_job_id
from lessor.v1 import agent_service_pb2 as pb
from lessor_server.store.database import Database
from tests.support.servers import WAIT_S, Client, RawAgent, connected, running_server

pytestmark = pytest.mark.integration

AGENTS = 50
NEVER_GRANTED = pb.Grant(job_id=encode_job_id(1), lease_id=1)


class RenewSpy:
    """Counts the renewals that reach the database, and can hold the next one back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sessions: list[list[int]] = []
        """The sessions of each statement, in order."""
        self.gate = asyncio.Event()
        self.gate.set()
        self.reached = asyncio.Event()
        fetch = Database.fetch

        async def counted(database: Database, name: str, /, **values: Any) -> list[asyncpg.Record]:
            if name == "renew":
                self.sessions.append(list(values["session_ids"]))
                self.reached.set()
                await self.gate.wait()
            return await fetch(database, name, **values)

        monkeypatch.setattr(Database, "fetch", counted)


@asynccontextmanager
async def fleet(client: Client, size: int) -> AsyncIterator[list[RawAgent]]:
    """Agents that are connected and have said nothing but hello."""
    agents = [RawAgent(client, f"raw-agent-{number:03}") for number in range(size)]
    await asyncio.gather(*(agent.connect() for agent in agents))
    try:
        yield agents
    finally:
        for agent in agents:
            await agent.leave()


async def heartbeat_is_in(agent: RawAgent) -> int:
    """Sends a heartbeat, and returns its number once the server has read it, acked or not.

    A stream is read in order: the ack of an event shows that what came before it was taken.
    """
    seq = await agent.heartbeat()
    await agent.tell(NEVER_GRANTED, released=pb.Released(reason="never held"))
    return seq


async def acked_heartbeat(agent: RawAgent, seq: int) -> None:
    """Waits until the server has acked this heartbeat."""
    async with asyncio.timeout(WAIT_S):
        while (await agent.next("ack")).ack.heartbeat_seq != seq:
            continue


async def test_all_agents_of_a_flush_are_renewed_by_one_statement(
    database_url: str, pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = RenewSpy(monkeypatch)
    async with (
        running_server(database_url) as server,
        connected(server) as client,
        fleet(client, AGENTS + 1) as (first, *others),
    ):
        spy.gate.clear()
        first_seq = await first.heartbeat()
        await spy.reached.wait()
        # One renewal is on its way to the database: everything that comes now is of the next flush.
        seqs = await asyncio.gather(*(heartbeat_is_in(agent) for agent in others))
        await pool.execute("UPDATE leader SET clock = clock + $1", timedelta(minutes=1) // timedelta(milliseconds=1))
        spy.gate.set()
        await acked_heartbeat(first, first_seq)
        await asyncio.gather(*(acked_heartbeat(agent, seq) for agent, seq in zip(others, seqs, strict=True)))

        expected = sorted(agent.session_id for agent in others)
        assert [sorted(sessions) for sessions in spy.sessions] == [[first.session_id], expected]
        # The database agrees: all of them carry the mark of one transaction, and the time it read.
        rows = await pool.fetch("SELECT xmin::text, renewed_at FROM session WHERE id = ANY($1)", expected)
        assert len(rows) == AGENTS
        assert len({row["xmin"] for row in rows}) == 1
        assert rows[0]["renewed_at"] >= 60_000


async def test_a_superseded_session_costs_the_others_of_its_flush_nothing(
    database_url: str, pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = RenewSpy(monkeypatch)
    async with (
        running_server(database_url) as server,
        connected(server) as client,
        fleet(client, 6) as (first, superseded, *others),
    ):
        spy.gate.clear()
        await first.heartbeat()
        await spy.reached.wait()
        await pool.execute("UPDATE session SET epoch = epoch + 1 WHERE id = $1", superseded.session_id)
        await superseded.heartbeat()
        seqs = await asyncio.gather(*(heartbeat_is_in(agent) for agent in others))
        spy.gate.set()
        await asyncio.gather(*(acked_heartbeat(agent, seq) for agent, seq in zip(others, seqs, strict=True)))
        assert "epoch" in (await superseded.next("hello_requested")).hello_requested.reason
