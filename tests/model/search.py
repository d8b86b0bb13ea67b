"""Looks at every state that the protocol can reach, the nearest first."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable
from typing import NamedTuple

from tests.model.promises import Promise, broken_by_state, broken_by_step
from tests.model.protocol import Protocol
from tests.model.world import Agent, Server

State = tuple[Server, tuple[Agent, ...]]
_Packed = int
"""A state: the numbers of its server and of its agents, in ascending order, 20 bits each."""

_OF_NO_AGENT = frozenset({"give up", "cancel", "replace leader", "wake old leader"})
"""Actions that are the same whichever agent they are found with."""
_BITS = 20
_MASK = (1 << _BITS) - 1


class Found(NamedTuple):
    """What a search saw."""

    states: int
    transitions: int
    depth: int
    """Steps to the farthest state."""
    actions: frozenset[str]
    """What happened at least once."""
    broken: Promise | None
    """The promise that was broken first; None: none is, in any state."""
    trace: tuple[str, ...]
    """The shortest way to where it was broken."""


class _Move(NamedTuple):
    """A step, with the server and the agent after it as numbers."""

    server: int
    agent: int
    helps: bool
    broken: Promise | None


class Search:
    """One search. Servers and agents are numbered as they turn up; what can happen to a pair is found out once."""

    def __init__(self, protocol: Protocol, promises: Collection[Promise] = tuple(Promise)) -> None:
        """``promises`` are those to look at; others may be broken on the way."""
        self._protocol = protocol
        self._promises = frozenset(promises)
        self._servers: dict[Server, int] = {}
        self._server_list: list[Server] = []
        self._agents: dict[Agent, int] = {}
        self._agent_list: list[Agent] = []
        self._runs: list[bool] = []
        self._moves: dict[int, list[_Move]] = {}
        self._ticks: dict[int, list[tuple[int, int]]] = {}
        self._aged: dict[tuple[int, int, int], int] = {}
        self._plains: dict[int, int] = {}
        self._actions: set[str] = set()

    def run(self, most: int = 3_000_000) -> Found:
        """Searches up to the first broken promise, or to the end.

        Raises:
            RuntimeError: There are more than ``most`` states.
        """
        first = self._pack(self._protocol.first)
        number: dict[_Packed, int] = {first: 0}
        states = [first]
        came_from = array("q", [-1])
        settling_from, settling_to = array("q"), array("q")
        """From, to: steps that happen also when nothing goes wrong any more."""
        transitions = depth = 0
        level_ends = 1
        at = 0
        while at < len(states):
            if at == level_ends:
                depth += 1
                level_ends = len(states)
            state = states[at]
            for then, helps, broken in self._following(state):
                transitions += 1
                known = number.get(then)
                if known is None:
                    known = number[then] = len(states)
                    states.append(then)
                    came_from.append(at)
                    if known > most:
                        raise RuntimeError(f"more than {most:,} states: take a smaller size")
                    broken = broken or self._broken(then)
                if broken is not None:
                    way = [*self._way(states, came_from, at), then]
                    return self._found(states, transitions, depth, broken, way)
                if helps:
                    settling_from.append(at)
                    settling_to.append(known)
            at += 1
        stuck = self._stuck(states, settling_from, settling_to) if Promise.SETTLES in self._promises else None
        if stuck is not None:
            way = self._way(states, came_from, stuck)
            return self._found(states, transitions, depth, Promise.SETTLES, way)
        return self._found(states, transitions, depth, None, [])

    def _found(
        self, states: list[_Packed], transitions: int, depth: int, broken: Promise | None, way: list[_Packed]
    ) -> Found:
        return Found(len(states), transitions, depth, frozenset(self._actions), broken, self._told(way))

    # ── states as numbers ────────────────────────────────────────────────────

    def _pack(self, state: State) -> _Packed:
        server, agents = state
        plain = [self._agent_number(self._protocol.plain(server, agent)) for agent in agents]
        return _joined(self._server_number(server), plain)

    def _unpack(self, packed: _Packed) -> tuple[int, list[int]]:
        agents = []
        for _ in range(self._protocol.size.agents):
            agents.append(packed & _MASK)
            packed >>= _BITS
        return packed, agents[::-1]

    def _server_number(self, server: Server) -> int:
        number = self._servers.setdefault(server, len(self._server_list))
        if number == len(self._server_list):
            self._server_list.append(server)
        return number

    def _agent_number(self, agent: Agent) -> int:
        number = self._agents.setdefault(agent, len(self._agent_list))
        if number == len(self._agent_list):
            self._agent_list.append(agent)
            self._runs.append(agent.lives)
        assert number <= _MASK
        return number

    # ── what can follow ──────────────────────────────────────────────────────

    def _following(self, state: _Packed) -> list[tuple[_Packed, bool, Promise | None]]:
        """Returns the states that can follow: (state, it helps, the promise that the step breaks)."""
        server, agents = self._unpack(state)
        following: list[tuple[_Packed, bool, Promise | None]] = []
        was_done = self._server_list[server].done
        for index, agent in enumerate(agents):
            others = agents[:index] + agents[index + 1 :]
            for move in self._moves_of(server, agent):
                then = move.server
                # What the job has come to may decide what of the others still matters.
                others_then = others if then == server else [self._plain(then, other) for other in others]
                following.append((_joined(then, (move.agent, *others_then)), move.helps, move.broken))
        if was_done and not any(self._runs[agent] or self._moves_of(server, agent) for agent in agents):
            return following
        for then, lease_time in self._ticks_of(server):
            older = [self._older(then, agent, lease_time) for agent in agents]
            following.append((_joined(then, older), False, None))
        return following

    def _moves_of(self, server: int, agent: int) -> list[_Move]:
        key = server << _BITS | agent
        moves = self._moves.get(key)
        if moves is None:
            moves = self._moves[key] = []
            before, was = self._server_list[server], self._agent_list[agent]
            for step in self._protocol.steps(before, was):
                self._actions.add(step.action)
                broken = broken_by_step(before, was, step.server, step.agent)
                moves.append(
                    _Move(
                        self._server_number(step.server),
                        self._agent_number(self._protocol.plain(step.server, step.agent)),
                        step.helps,
                        broken if broken in self._promises else None,
                    )
                )
        return moves

    def _plain(self, server: int, agent: int) -> int:
        key = server << _BITS | agent
        number = self._plains.get(key)
        if number is None:
            plain = self._protocol.plain(self._server_list[server], self._agent_list[agent])
            number = self._plains[key] = self._agent_number(plain)
        return number

    def _ticks_of(self, server: int) -> list[tuple[int, int]]:
        ticks = self._ticks.get(server)
        if ticks is None:
            ticks = self._ticks[server] = [
                (self._server_number(then), lease_time)
                for _, then, lease_time in self._protocol.pass_time(self._server_list[server])
            ]
        return ticks

    def _older(self, server: int, agent: int, lease_time: int) -> int:
        key = server, agent, lease_time
        number = self._aged.get(key)
        if number is None:
            older = self._protocol.older(self._agent_list[agent], lease_time)
            number = self._aged[key] = self._agent_number(self._protocol.plain(self._server_list[server], older))
        return number

    # ── promises ─────────────────────────────────────────────────────────────

    def _broken(self, state: _Packed) -> Promise | None:
        server, agents = self._unpack(state)
        if not any(self._runs[agent] for agent in agents):
            return None
        broken = broken_by_state(self._server_list[server], tuple(self._agent_list[agent] for agent in agents))
        return broken if broken in self._promises else None

    def _stuck(self, states: list[_Packed], sources: array[int], targets: array[int]) -> int | None:
        """Returns the nearest state from which, though nothing goes wrong any more, not everything can be settled."""
        before: list[list[int]] = [[] for _ in states]
        for source, target in zip(sources, targets, strict=True):
            before[target].append(source)
        todo = [number for number, state in enumerate(states) if self._is_settled(state)]
        settles = bytearray(len(states))
        for number in todo:
            settles[number] = 1
        while todo:
            for source in before[todo.pop()]:
                if not settles[source]:
                    settles[source] = 1
                    todo.append(source)
        stuck = settles.find(0)
        return None if stuck < 0 else stuck

    def _is_settled(self, state: _Packed) -> bool:
        """Returns whether the job is over, nothing of it runs and no agent has anything left to say of it."""
        server, agents = self._unpack(state)
        known = self._server_list[server]
        return bool(known.done) and all(self._protocol.is_quiet(known, self._agent_list[agent]) for agent in agents)

    # ── the way there ────────────────────────────────────────────────────────

    def _way(self, states: list[_Packed], came_from: array[int], last: int) -> list[_Packed]:
        way = []
        while last >= 0:
            way.append(states[last])
            last = came_from[last]
        return way[::-1]

    def _told(self, way: list[_Packed]) -> tuple[str, ...]:
        """Returns a way in words. Agents have names here: which one is which was of no account in the search."""
        lines: list[str] = []
        state = self._protocol.first
        for then in way[1:]:
            text, state = next((text, after) for text, after in self._named(state) if self._pack(after) == then)
            lines.append(text)
        return tuple(lines)

    def _named(self, state: State) -> list[tuple[str, State]]:
        server, agents = state
        protocol = self._protocol
        named: list[tuple[str, State]] = []
        for index, agent in enumerate(agents):
            for step in protocol.steps(server, agent):
                after = (*agents[:index], step.agent, *agents[index + 1 :])
                text = f"   {step.text}" if step.action in _OF_NO_AGENT else f"{'AB'[index]}: {step.text}"
                named.append((text, self._plain_state(step.server, after)))
        for text, then, lease_time in protocol.pass_time(server):
            older = tuple(protocol.older(agent, lease_time) for agent in agents)
            named.append((f"   {text}", self._plain_state(then, older)))
        return named

    def _plain_state(self, server: Server, agents: tuple[Agent, ...]) -> State:
        return server, tuple(self._protocol.plain(server, agent) for agent in agents)


def _joined(server: int, agents: Iterable[int]) -> _Packed:
    """Returns a state as a number: of two agents it is of no account which one is which."""
    for number in sorted(agents):
        server = server << _BITS | number
    return server
