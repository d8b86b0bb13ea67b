"""Telling agents of their grants and of leases asked back.

The database holds what is to be told; this task compares it with the streams of
this replica and sends what is missing. A grant or a question that is not
answered is sent again, so nothing hangs on a message that was lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import asyncpg

from lessor.lifecycle import LeasePhase
from lessor.v1 import agent_service_pb2 as pb
from lessor_server.bells import Bells
from lessor_server.domain.errors import LessorServerError
from lessor_server.sessions import convert
from lessor_server.sessions.stream import AgentStream, Streams
from lessor_server.store.database import Database

logger = logging.getLogger(__name__)

Row: TypeAlias = Mapping[str, Any] | asyncpg.Record

MAX_GRANTS_BYTES = 4 << 20
"""Most bytes of grants in one message, but for a single larger one; an agent takes 16 MiB."""

_POLL_S = 1.0
_RESEND_S = 2.0
_COMPARE_S = 2.0
# A lease that only one side has for so many heartbeats is asked about. The
# first ones may have crossed a grant or an end under way.
_DIFFERING_HEARTBEATS = 3
_HELLO_AGAIN_S = 10.0
_ASKED_FOR_HELLO = -1


class Delivery:
    """Sends grants and revokes to the agents of this replica."""

    def __init__(self, database: Database, streams: Streams, bells: Bells) -> None:
        self._database = database
        self._streams = streams
        self._bells = bells

    def grants(self, rows: Iterable[Row], now_s: float) -> None:
        """Sends leases to those of their agents that are here, each at most once per resend interval.

        Args:
            rows: As ``claim`` and ``read_deliveries`` return them.
            now_s: Loop time.
        """
        messages: dict[int, tuple[pb.ConnectResponse, int]] = {}
        for row in rows:
            stream = self._streams.get(row["session_id"])
            if stream is None or not _due(stream, row["lease_id"], 0, now_s):
                continue
            adds = convert.grant_bytes(row)
            response, size = messages.get(stream.session_id, (None, 0))
            if response is None or size + adds > MAX_GRANTS_BYTES:
                if response is not None:
                    self._send(stream.session_id, response)
                response, size = pb.ConnectResponse(), 0
                response.grants.epoch = stream.epoch
            convert.add_grant(response.grants, row)
            messages[stream.session_id] = (response, size + adds)
        for session_id, (message, _) in messages.items():
            self._send(session_id, message)

    def revokes(
        self, session_id: int, leases: Sequence[tuple[int, int]], reason: pb.RevokeReason.ValueType, now_s: float
    ) -> None:
        """Asks one agent about (job number, lease_id) pairs, if it is here, each once per resend interval."""
        stream = self._streams.get(session_id)
        if stream is None:
            return
        due = [
            convert.revoke(job, lease_id, reason) for job, lease_id in leases if _due(stream, lease_id, reason, now_s)
        ]
        if due:
            self._send(session_id, pb.ConnectResponse(revokes=pb.Revokes(epoch=stream.epoch, revokes=due)))

    def _send(self, session_id: int, message: pb.ConnectResponse) -> None:
        stream = self._streams.get(session_id)
        if stream is not None:
            stream.send(message)

    async def run(self) -> None:
        """Delivers until cancelled."""
        loop = asyncio.get_running_loop()
        compared_at = loop.time()
        seen = self._bells.grants.count
        while True:
            seen = await self._bells.grants.wait(seen, _POLL_S)
            try:
                await self._deliver()
                if loop.time() - compared_at >= _COMPARE_S:
                    compared_at = loop.time()
                    await self._compare()
            except LessorServerError as error:
                logger.warning("delivery waits for the database", extra={"event": "delivery", "error": error.message})

    async def _deliver(self) -> None:
        sessions = [stream.session_id for stream in self._streams.all()]
        if not sessions:
            return
        rows = await self._database.fetch("read_deliveries", session_ids=sessions)
        now_s = asyncio.get_running_loop().time()
        self.grants((row for row in rows if row["phase"] == LeasePhase.OFFERED and row["revoke"] is None), now_s)
        for row in rows:
            if row["revoke"] is not None:
                self.revokes(row["session_id"], [(row["job_id"], row["lease_id"])], row["revoke"], now_s)

    async def _compare(self) -> None:
        """Asks about leases that only the agent or only the database has."""
        streams = {stream.session_id: stream for stream in self._streams.all()}
        if not streams:
            return
        rows = await self._database.fetch("read_session_leases", session_ids=list(streams))
        now_s = asyncio.get_running_loop().time()
        standing: dict[int, dict[int, int]] = {session_id: {} for session_id in streams}
        for row in rows:
            if row["phase"] != LeasePhase.OFFERED:
                standing[row["session_id"]][row["lease_id"]] = row["job_id"]
        for session_id, stream in streams.items():
            ours = standing[session_id]
            differing = (stream.held ^ ours.keys()) & (stream.held | ours.keys())
            stream.heartbeats_since = {lease_id: stream.heartbeats_since.get(lease_id, 0) for lease_id in differing}
            for lease_id, heartbeats in stream.heartbeats_since.items():
                if heartbeats < _DIFFERING_HEARTBEATS:
                    continue
                if lease_id in ours:
                    self.revokes(session_id, [(ours[lease_id], lease_id)], pb.REVOKE_REASON_NOT_LISTED, now_s)
                elif _due(stream, 0, _ASKED_FOR_HELLO, now_s, _HELLO_AGAIN_S):
                    reason = f"lease {lease_id} is listed by the agent and not known to stand"
                    self._send(session_id, pb.ConnectResponse(hello_requested=pb.HelloRequested(reason=reason)))


def _due(stream: AgentStream, lease_id: int, reason: int, now_s: float, interval_s: float = _RESEND_S) -> bool:
    """Returns whether this is to be sent now, and notes that it was."""
    last = stream.told.get((lease_id, reason))
    if last is not None and now_s - last < interval_s:
        return False
    if len(stream.told) > 20_000:
        stream.told = {key: at for key, at in stream.told.items() if now_s - at < _RESEND_S}
    stream.told[lease_id, reason] = now_s
    return True
