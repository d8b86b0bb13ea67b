"""What the protocol promises, as properties of a state, of a step, and of all ways on from a state."""

from __future__ import annotations

from enum import StrEnum

from tests.model.world import Agent, Server, bit


class Promise(StrEnum):
    """A promise; the value says how it was broken."""

    ONE_EXECUTION = "two executions at once"
    DEADLINE_FIRST = "an execution without its lease"
    END_KEPT = "an end lost while its job is not over"
    FINAL = "an end that changes"
    NO_RERUN = "an execution of a job that is over"
    TOKENS_GROW = "a lease begun after a newer one was given"
    SETTLES = "no way on to the end"


def broken_by_state(server: Server, agents: tuple[Agent, ...]) -> Promise | None:
    """Returns the promise that does not hold in a state."""
    running = sum(agent.lives for agent in agents)
    if running > 1:
        return Promise.ONE_EXECUTION
    return Promise.NO_RERUN if running and server.done else None


def broken_by_step(server: Server, agent: Agent, then: Server, after: Agent) -> Promise | None:
    """Returns the promise that a step between the server and one agent breaks."""
    if after.run and after.run != agent.run:
        if agent.run:
            return Promise.ONE_EXECUTION
        if server.done:
            return Promise.NO_RERUN
        if after.run != server.tokens:
            return Promise.TOKENS_GROW
    if after.lives and not after.holds:
        return Promise.DEADLINE_FIRST
    if server.done and then.done != server.done:
        return Promise.FINAL
    # The end of the newest lease counts, whether it stands or its job waits.
    newest = bit(then.tokens)
    if not then.done and then.tokens == server.tokens and _has_told(agent) & newest and not _has_told(after) & newest:
        return Promise.END_KEPT
    return None


def _has_told(agent: Agent) -> int:
    """Returns the tokens whose end the agent has, or has said and the message is under way."""
    under_way = 0
    for message in agent.up:
        if message.kind == "ended":
            under_way |= bit(message.token)
    return agent.ends | under_way
