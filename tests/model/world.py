"""What the model is about: the server's rows, an agent and its host, and what is on its way between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

CANCELLED = 9
"""In :attr:`Server.done`: the job is over without an end from an agent."""


@dataclass(frozen=True)
class Size:
    """How much of the world is looked at. Nothing else bounds the search."""

    name: str
    agents: int
    leases: int
    ttl: int
    """Steps."""
    up: int
    """Messages on their way from each agent, at most; with more, no further one is sent."""
    down: int
    """Messages on their way to each agent, at most; with more, further ones are lost."""
    endless: bool = False
    """The work ends only when it is stopped, and its user may cancel it."""
    freezes: bool = False
    """Work whose lease was not renewed stands still, and goes on when it is."""
    leaders: bool = False
    """Leaders are replaced while they stand still, and wake up. With one agent only."""


class Message(NamedTuple):
    """One message on its way."""

    kind: str
    token: int = 0
    """The lease it is about; of a hello the one that runs; of a welcome the one that is to stop. 0: none."""
    age: int = 0
    """Steps since the agent sent it, or sent what it answers."""
    ends: int = 0
    """Set of tokens: of a hello the leases that have ended; of a welcome those of them to forget."""
    ghost: bool = False
    """It was sent on a stream that the agent has left."""


class Agent(NamedTuple):
    """An agent, its host, its session, and the messages between it and the server. Sets of tokens are bits."""

    # What the agent knows.
    welcomed: bool = False
    """It may take leases: the hello of the present stream was answered."""
    since: int = 0
    """Steps since it sent the newest heartbeat or hello that was answered on the present stream."""
    # What its host and its journal know: a restart changes nothing here.
    run: int = 0
    """The lease that runs; 0: none."""
    left: int = 0
    """Steps until its keeper ends or freezes it; at 0 that is due, and a late keeper does it with the next step."""
    kept: bool = False
    """The present session keeps it: it is renewed with the session."""
    frozen: bool = False
    """What runs stands still."""
    ends: int = 0
    """Ended, journalled and not acked."""
    seen: int = 0
    """Begun or given back: never begun again."""
    # What the database knows.
    current: bool = False
    """The present stream's hello is committed, and its epoch is still the session's."""
    age: int = 0
    """Lease time since the session was renewed."""
    holds: bool = False
    """The newest lease is this agent's and stands."""
    # On the way.
    up: tuple[Message, ...] = ()
    down: tuple[Message, ...] = ()

    @property
    def lives(self) -> bool:
        """Whether work of the job goes on here."""
        return self.run > 0 and not self.frozen


class Server(NamedTuple):
    """What the database knows of the job and of lease time."""

    tokens: int = 0
    """Leases given so far: the newest one's token."""
    leased: bool = False
    """The newest lease stands; else the job waits, unless it is over."""
    done: int = 0
    """The lease whose end is the job's, or CANCELLED; 0: it is not over."""
    cancel: bool = False
    """Its user has asked for its end."""
    uncounted: bool = False
    """The last step is not counted in lease time yet."""
    old_leader: int = 0
    """1: a leader that does not know that its term is over, and has a step to count; 2: it has counted it; 0: none."""
    overdue: bool = False
    """The lease was found overdue; only where :attr:`.Rules.session_lock` is left out."""


class Step(NamedTuple):
    """Something that can happen between the server and one agent."""

    action: str
    text: str
    server: Server
    agent: Agent
    helps: bool = True
    """It happens also when nothing goes wrong any more."""


def bit(token: int) -> int:
    """Returns the set of one token."""
    return 1 << token


def tokens_in(tokens: int) -> Iterator[int]:
    """Returns the tokens of a set, ascending."""
    return (token for token in range(tokens.bit_length()) if tokens & bit(token))


def told(message: Message) -> str:
    """Returns a message in words."""
    lease = f" lease {message.token}"
    match message.kind:
        case "hello":
            runs = f", runs{lease}" if message.token else ""
            text = "hello" + runs + "".join(f", ended lease {token}" for token in tokens_in(message.ends))
        case "welcome":
            stops = f" (stop{lease})" if message.token else ""
            text = "welcome" + stops + "".join(f" (forget lease {token})" for token in tokens_in(message.ends))
        case "grant":
            text = f"grant {message.token}"
        case "question" | "stop":
            text = f"the {message.kind} about{lease}"
        case "ended" | "released" | "end ack":
            text = f"'{message.kind}{lease}'"
        case _:
            text = f"{'an' if message.kind == 'ack' else 'a'} {message.kind}"
    if message.age:
        text += f" (sent {message.age} before)"
    return f"{text} of an old stream" if message.ghost else text
