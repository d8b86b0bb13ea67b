"""The simulated network: streams between agents and replicas, and what can happen to them.

A stream is two lines of messages, each in order; between lines, and between the
old stream of an agent and its new one, any order is possible. A stream breaks at
each end at a time of its own, so that one side may go on for long with a stream
the other has left: what was under way still arrives there, late and perhaps for
the second time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from lessor.v1 import agent_service_pb2 as pb
from lessor_agent.protocol.core import Loss
from tests.simulation.scheduler import Process, Scheduler


class Way(Enum):
    """A direction."""

    TO_SERVER = "→"
    TO_AGENT = "←"


@dataclass(slots=True)
class Weather:
    """How the network is just now."""

    usual_s: float = 0.01
    """How long a message is on its way, mostly."""
    rare_s: float = 0.3
    rarely: float = 0.03


class AgentEnd(Protocol):
    """The agent's end of a stream; all is called on the agent's behalf."""

    def stream_opened(self, stream: Stream) -> None:
        """It takes messages."""

    def stream_message(self, stream: Stream, message: pb.ConnectResponse) -> None:
        """The server said something."""

    def stream_lost(self, stream: Stream, loss: Loss) -> None:
        """It is over."""


class ServerEnd(Protocol):
    """The server's end of a stream."""

    def message(self, message: pb.ConnectRequest) -> None:
        """The agent said something."""

    def half_closed(self) -> None:
        """The agent will say no more."""

    def cut(self) -> None:
        """The stream is broken."""


class Door(Protocol):
    """A replica, as the network sees it."""

    process: Process

    def accept(self, stream: Stream) -> ServerEnd:
        """Takes a new stream."""


class Network:
    """All streams of one run."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.weather = Weather()
        self._cut_until_ns: dict[tuple[str, str, Way], int] = {}
        self.streams: list[Stream] = []
        self.on_said: Callable[[Stream, pb.ConnectResponse], None] = lambda stream, message: None
        """Told what servers say, when they say it."""
        self.on_told: Callable[[Stream, pb.ConnectRequest], None] = lambda stream, message: None
        """Told what reaches servers."""
        self._count = 0

    def cut(self, agent: str, replica: str, way: Way, until_ns: int) -> None:
        """Lets nothing through in one direction until a time; what is sent meanwhile arrives after it."""
        key = (agent, replica, way)
        self._cut_until_ns[key] = max(until_ns, self._cut_until_ns.get(key, 0))

    def heal(self) -> None:
        """Ends all cuts."""
        self._cut_until_ns.clear()

    def arrival_ns(self, agent: str, replica: str, way: Way) -> int:
        """Returns when something that is sent now arrives."""
        weather, now_ns = self.weather, self._scheduler.now_ns
        delay_ns = 100_000 + self._scheduler.spread_ns(weather.usual_s, weather.rare_s, weather.rarely)
        return max(now_ns, self._cut_until_ns.get((agent, replica, way), 0)) + delay_ns

    def connect(self, agent: Process, end: AgentEnd, stream_id: int, door: Door) -> Stream:
        """Opens a stream to a replica."""
        self._count += 1
        stream = Stream(self, self._scheduler, self._count, stream_id, agent, end, door)
        self.streams = [known for known in self.streams if not known.is_over]
        self.streams.append(stream)
        return stream


class Stream:
    """One stream between one life of an agent and one life of a replica."""

    def __init__(self, network: Network, scheduler: Scheduler, number: int, stream_id: int,
                 agent: Process, end: AgentEnd, door: Door) -> None:  # fmt: skip
        self._network = network
        self._scheduler = scheduler
        self.number = number
        self.stream_id = stream_id
        """The agent's own number for it."""
        self.agent = agent
        self.replica = door.process
        self._agent_life = agent.life
        self._end = end
        self._door = door
        self._server: ServerEnd | None = None
        self._last_ns = {Way.TO_SERVER: 0, Way.TO_AGENT: 0}
        self._left = False
        """The agent has left it and hears nothing of it any more."""
        self._ended = False
        """The server has ended it."""
        self._broken = {Way.TO_SERVER: False, Way.TO_AGENT: False}
        self._plan(Way.TO_SERVER, "", self._arrive)

    @property
    def is_over(self) -> bool:
        """Neither end has it any more."""
        return self._left and self._ended

    @property
    def is_open(self) -> bool:
        """Both ends have it."""
        return not self._left and not self._ended and self._server is not None

    @property
    def label(self) -> str:
        """Names it in the trace."""
        return f"{self.agent.name}#{self.number}{self.replica.name}"

    def _plan(self, way: Way, what: str, act: Callable[[], None]) -> None:
        """Has something arrive, after all that was sent that way before."""
        arrival_ns = self._network.arrival_ns(self.agent.name, self.replica.name, way)
        at_ns = self._last_ns[way] = max(self._last_ns[way] + 1, arrival_ns)
        process = self.replica if way is Way.TO_SERVER else self.agent
        if not process.alive:
            # To a process that is gone: a refusal comes back, unless the way is cut.
            if way is Way.TO_SERVER:
                self._scheduler.at(at_ns, "", self._refused)
            return
        self._scheduler.at(at_ns, what, act, process)

    def _refused(self) -> None:
        self.lose_at_agent("connection refused", 0)

    # ── opening ──────────────────────────────────────────────────────────────

    def _arrive(self) -> None:
        self._server = self._door.accept(self)
        self._plan(Way.TO_AGENT, "", self._opened)

    def _opened(self) -> None:
        if self._agent_hears():
            self._end.stream_opened(self)

    def _agent_hears(self) -> bool:
        return not self._left and self.agent.life == self._agent_life

    # ── what the agent does ──────────────────────────────────────────────────

    def send(self, message: pb.ConnectRequest) -> None:
        """Sends a message to the server; lost if the stream is broken."""
        if self._left or self._broken[Way.TO_SERVER]:
            return
        data = message.SerializeToString()
        kind = message.WhichOneof("message")

        def arrive() -> None:
            if self._server is not None and not self._ended and not self._broken[Way.TO_SERVER]:
                told = pb.ConnectRequest.FromString(data)
                self._scheduler.note(f"{self.label} → {kind}")
                self._network.on_told(self, told)
                self._server.message(told)

        self._plan(Way.TO_SERVER, "", arrive)

    def leave(self) -> None:
        """The agent closes it: what it sent before still arrives, then the server sees the end."""
        if not self._left:
            self._left = True
            self._plan(Way.TO_SERVER, "", self._half_closed)

    def _half_closed(self) -> None:
        if self._server is not None and not self._ended:
            self._server.half_closed()

    # ── what the server does ─────────────────────────────────────────────────

    def say(self, message: pb.ConnectResponse) -> None:
        """Sends a message to the agent; lost if the stream is broken."""
        self._network.on_said(self, message)
        if self._ended or self._broken[Way.TO_AGENT]:
            return
        data = message.SerializeToString()
        kind = message.WhichOneof("message")

        def arrive() -> None:
            if self._agent_hears() and not self._broken[Way.TO_AGENT]:
                self._scheduler.note(f"{self.label} ← {kind}")
                self._end.stream_message(self, pb.ConnectResponse.FromString(data))

        self._plan(Way.TO_AGENT, "", arrive)

    def end(self, loss: Loss) -> None:
        """The server ends it."""
        if not self._ended:
            self._ended = True
            self._plan(Way.TO_AGENT, "", lambda: self._lost(loss))

    def _lost(self, loss: Loss) -> None:
        if self._agent_hears():
            self._left = True
            self._end.stream_lost(self, loss)

    # ── what the world does ──────────────────────────────────────────────────

    def lose_at_agent(self, why: str, delay_ns: int) -> None:
        """The agent notices after a delay that the stream is gone; from now on it hears nothing of it."""
        self._broken[Way.TO_AGENT] = True
        self._scheduler.after(delay_ns, "", lambda: self._lost(Loss(why)), self.agent)

    def lose_at_server(self, delay_ns: int) -> None:
        """The server notices after a delay; until then what was under way still arrives there."""

        def cut() -> None:
            self._broken[Way.TO_SERVER] = True
            if self._server is not None and not self._ended:
                self._scheduler.note(f"{self.label} is cut")
                self._server.cut()

        if self.replica.alive:
            self._scheduler.after(delay_ns, "", cut, self.replica)

    def agent_is_gone(self) -> None:
        """The agent's process has crashed: its host closes the stream, or the server learns of it late."""
        self._left = True
        self.lose_at_server(self._scheduler.spread_ns(0.1, 15.0, 0.2))

    def replica_is_gone(self) -> None:
        """The replica's process has crashed."""
        self._ended = True
        self.lose_at_agent("connection reset", self._scheduler.spread_ns(0.1, 15.0, 0.2))
