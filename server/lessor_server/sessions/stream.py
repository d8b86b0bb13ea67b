"""One agent's stream on this replica: what it holds, and what is to be sent to it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable

from lessor.v1 import agent_service_pb2 as pb

MAX_WAITING = 1000
"""Grants, revokes and other messages waiting to be sent; a stream that is not read is given up."""


class AgentStream:
    """What is waiting to be sent on one stream, and what its agent last said.

    Acks are merged: however many heartbeats, events and log chunks were
    committed since the last write, one message says so.
    """

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.agent_id = ""
        self.agent_name = ""
        self.session_id = 0
        self.epoch = 0
        self.held: frozenset[int] = frozenset()
        """Lease ids of the last heartbeat or Hello."""
        self.heartbeats_since: dict[int, int] = {}
        """lease_id → heartbeats since the database and the agent first differed on it."""
        self.told: dict[tuple[int, int], float] = {}
        """(lease_id, revoke reason; 0: a grant) → when it was last sent, loop time."""
        self.given_up: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done once the stream is to end, with the reason."""
        self.unanswered_log_bytes = 0
        """Log bytes taken from the stream and not answered yet."""
        self._waiting: deque[pb.ConnectResponse] = deque()
        self._heartbeat_seq = 0
        self._event_seqs: list[int] = []
        self._logs: dict[int, pb.LogPosition] = {}
        self._something = asyncio.Event()

    def send(self, message: pb.ConnectResponse) -> None:
        """Queues a message. When too many wait the agent does not read: the stream is given up."""
        if len(self._waiting) >= MAX_WAITING:
            self.give_up("it does not read its stream")
        else:
            self._waiting.append(message)
            self._something.set()

    def give_up(self, reason: str) -> None:
        """Ends the stream, even while a write of it hangs; leases stand and the agent connects again."""
        if not self.given_up.done():
            self.given_up.set_result(reason)

    def ack_heartbeat(self, seq: int) -> None:
        """Says that the renewal of this heartbeat is committed."""
        self._heartbeat_seq = max(self._heartbeat_seq, seq)
        self._something.set()

    def ack_events(self, seqs: Iterable[int]) -> None:
        """Says that these durable events are committed."""
        self._event_seqs += seqs
        self._something.set()

    def ack_log(self, position: pb.LogPosition) -> None:
        """Says how much of a log is committed."""
        self._logs[position.lease_id] = position
        self._something.set()

    def begin_session(self, session_id: int, epoch: int) -> None:
        """Takes a new session or epoch; acks of what came before are dropped: the agent asks again."""
        self.session_id, self.epoch = session_id, epoch
        self._heartbeat_seq = 0
        self._event_seqs = []
        self._logs = {}
        self.told = {}
        self.heartbeats_since = {}

    async def next_messages(self) -> list[pb.ConnectResponse]:
        """Waits until there is something to send and returns it, in order, acks first."""
        await self._something.wait()
        self._something.clear()
        messages: list[pb.ConnectResponse] = []
        if self._heartbeat_seq or self._event_seqs or self._logs:
            ack = pb.Ack(heartbeat_seq=self._heartbeat_seq, event_seqs=self._event_seqs, logs=self._logs.values())
            messages.append(pb.ConnectResponse(ack=ack))
            self._heartbeat_seq, self._event_seqs, self._logs = 0, [], {}
        messages += self._waiting
        self._waiting.clear()
        return messages


class Streams:
    """The streams of this replica, by session."""

    def __init__(self) -> None:
        self._by_session: dict[int, AgentStream] = {}

    def put(self, stream: AgentStream) -> AgentStream | None:
        """Makes ``stream`` the one of its session; returns the one it replaces."""
        old = self._by_session.get(stream.session_id)
        self._by_session[stream.session_id] = stream
        return old if old is not stream else None

    def remove(self, stream: AgentStream) -> None:
        """Forgets a stream, unless another has taken its session over."""
        if self._by_session.get(stream.session_id) is stream:
            del self._by_session[stream.session_id]

    def get(self, session_id: int) -> AgentStream | None:
        """Returns the stream of a session, if it is here."""
        return self._by_session.get(session_id)

    def all(self) -> list[AgentStream]:
        """Returns all streams that have a session."""
        return list(self._by_session.values())
