"""The lease protocol without its code: one job, one or two agents, the server's rows, and what is on its way.

The rules are those of ``docs/lease-protocol.md``; :class:`Rules` can leave each
of them out, and the search (:mod:`.search`) must then find what it is for.

**Time** goes in steps. Everything else happens at any moment between two steps,
in any order, or never: an agent that is killed or stopped is one that does
nothing for a while, and one that begins again says hello. A step passes for
everybody, but

- a keeper may be late by a step when it is due to end or to freeze its job (its
  clock is slow, or it is not scheduled at once);
- lease time counts a step at once, or with the next one, or not at all.

**Messages.** What one side has sent arrives in any order: less is assumed than
a stream gives. What an agent had sent on a stream it has left may still arrive
(a ghost), or be lost; what was sent to it on that stream is lost.

**Numbers.** No epoch is counted. An epoch is either that of the session now or
an old one for good, so what carries an epoch is taken away when it becomes old.
Tokens are 1, 2, …; ``leases`` of them are given, and then a job that waits is
cancelled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from tests.model.world import CANCELLED, Agent, Message, Server, Size, Step, bit, tokens_in, told

MARGIN = 1
"""Steps kept on each side: a keeper may be one late, and lease time one behind."""


@dataclass(frozen=True)
class Rules:
    """What the protocol does; False leaves a rule out."""

    margin: bool = True
    """Agent and server keep a margin on their sides of a lease."""
    send_time: bool = True
    """A renewal counts from when the heartbeat was sent, not from when its ack came."""
    fencing: bool = True
    """An end counts for the lease it names, and for no other of its job."""
    outbox: bool = True
    """An end is kept, and told again, until it is acked."""
    revoke_obeyed: bool = True
    """An agent that is asked for a lease answers with what is so, and stops what is cancelled."""
    revoke_waits: bool = True
    """A lease that is asked back stands until the agent has answered."""
    renewal_epoch: bool = True
    """A heartbeat in an old epoch's name renews nothing and is not acked."""
    stream_left: bool = True
    """An agent takes nothing from a stream it has left."""
    leader_epoch: bool = True
    """A leader whose term is over advances nothing."""
    session_lock: bool = True
    """Whether a lease is overdue is looked at under the lock that a renewal of its session needs, too."""
    late_end: bool = True
    """An end whose lease has expired counts while its job still waits."""
    spared_end: bool = True
    """An answer about a lease that ran at the Hello does not touch the end that has come since."""
    final: bool = True
    """An end of a job that is over changes nothing."""
    tombstone: bool = True
    """A lease that was given back is never begun."""
    thaw_asks: bool = True
    """Work that stands still goes on only if the server says that its lease stands."""
    omission_asks: bool = True
    """A lease that a Hello does not list is asked for: that it was left out proves nothing."""


class Protocol:
    """What can happen next."""

    def __init__(self, size: Size, rules: Rules | None = None) -> None:
        if size.leaders and size.agents != 1:
            raise ValueError(f"size {size.name!r}: leaders are searched with one agent, not with {size.agents}")
        self.size = size
        self.rules = rules or Rules()
        margin = MARGIN if self.rules.margin else 0
        self.term = size.ttl - margin
        """Steps from the sending of an answered heartbeat to the keeper's end."""
        self.wait = size.ttl + margin
        """Lease time from a renewal to the expiry of the session's leases."""
        self.first = (Server(), (Agent(since=self.term, age=self.wait),) * size.agents)

    # ── time ─────────────────────────────────────────────────────────────────

    def pass_time(self, server: Server) -> Iterator[tuple[str, Server, int]]:
        """Yields what a step may do to lease time: (text, the server after it, what lease time grows by)."""
        old_leader = min(server.old_leader, 1)
        yield (
            "a step passes, counted in lease time" + (" with the one before" if server.uncounted else ""),
            server._replace(uncounted=False, old_leader=old_leader),
            1 + server.uncounted,
        )
        # A tick counts at most so much: what was uncounted before stays so for good.
        yield "a step passes, not counted yet", server._replace(uncounted=True, old_leader=old_leader), 0

    def older(self, agent: Agent, lease_time: int) -> Agent:
        """Returns an agent after a step in which lease time grew by ``lease_time``."""
        agent = agent._replace(
            since=min(agent.since + 1, self.term),
            age=min(agent.age + lease_time, self.wait),
            up=tuple(map(self._older_message, agent.up)),
            down=tuple(map(self._older_message, agent.down)),
        )
        if agent.run and agent.left:
            agent = agent._replace(left=agent.left - 1)
        elif agent.run:
            agent = self._fenced(agent)
        return agent

    def _fenced(self, agent: Agent) -> Agent:
        """Its keeper obeys the deadline."""
        return agent._replace(frozen=True) if self.size.freezes else agent._replace(run=0)

    def _older_message(self, message: Message) -> Message:
        timed = message.kind in ("hello", "answering", "heartbeat", "welcome", "ack") and not message.ghost
        return message._replace(age=min(message.age + 1, self.term)) if timed else message

    # ── everything else ──────────────────────────────────────────────────────

    def steps(self, server: Server, agent: Agent) -> Iterator[Step]:
        """Yields what can happen next between the server and one agent."""
        if self.is_quiet(server, agent):
            return
        yield from self._says_hello(server, agent)
        yield from self._sends(server, agent)
        yield from self._works(server, agent)
        for message in agent.down:
            read = agent._replace(down=_without(agent.down, message))
            # An answer is awaited or it is not for this stream; nothing else is taken before it.
            if message.kind == "welcome":
                yield from self._welcomed(server, read, message)
            elif agent.welcomed:
                yield from self._HEARD[message.kind](self, server, read, message)
        for message in agent.up:
            rest = agent._replace(up=_without(agent.up, message))
            yield from self._ARRIVED[message.kind](self, server, rest, message)
            if message.ghost:
                yield Step("lose", f"{told(message)} is lost", server, rest, helps=False)
        yield from self._counts_wrong(server, agent)
        if not server.done:
            yield from self._plans(server, agent)
            yield from self._asks(server, agent)
            yield from self._expires(server, agent)
            yield from self._gives_up(server, agent)

    def is_quiet(self, server: Server, agent: Agent) -> bool:
        """Returns whether the job is over and the agent has nothing of it, nor will have."""
        return bool(server.done) and not (agent.run or agent.ends or any(m.kind == "grant" for m in agent.down))

    def plain(self, server: Server, agent: Agent) -> Agent:
        """Returns the agent that stands for all that differ from it in nothing that can matter."""
        if self.is_quiet(server, agent):
            return Agent()
        newest = server.tokens if agent.holds else 0
        up, down = agent.up, agent.down
        if up:
            up = tuple(sorted({message for message in up if self._matters_up(server, newest, message)}))
        if down:
            down = tuple(sorted({message for message in down if self._matters_down(newest, agent, message)}))
        seen = agent.seen
        if seen:
            # Of a lease that cannot be granted any more it is of no account whether it was seen.
            can_come = bit(newest)
            for message in down:
                if message.kind == "grant":
                    can_come |= bit(message.token)
            seen &= can_come
        return Agent(
            welcomed=agent.welcomed,
            since=agent.since,
            run=agent.run,
            left=agent.left if agent.run else 0,
            kept=agent.kept and agent.run > 0,
            frozen=agent.frozen and agent.run > 0,
            ends=agent.ends,
            seen=seen,
            current=agent.current,
            # Without a lease, the session's age only says whether it may get one.
            age=agent.age if agent.holds else min(agent.age, self.term),
            holds=agent.holds,
            up=up,
            down=down,
        )

    def _matters_up(self, server: Server, newest: int, message: Message) -> bool:
        match message.kind:
            case "released":
                return message.token == newest
            case "ended":
                # Its ack would not arrive, and by itself it changes nothing.
                is_void = message.ghost and message.token != server.tokens
                return not is_void or not self.rules.fencing
        return True

    def _matters_down(self, newest: int, agent: Agent, message: Message) -> bool:
        match message.kind:
            case "question" | "stop":
                return message.token == newest
            case "ack":
                return message.age < agent.since or not self.rules.send_time
            case "end ack":
                return bool(agent.ends & bit(message.token))
        return True

    # ── the agent ────────────────────────────────────────────────────────────

    def _says_hello(self, server: Server, agent: Agent) -> Iterator[Step]:
        """It opens a stream, for whatever reason, a restart included, and lists what it holds."""
        ghosts = tuple(self._as_ghost(message) for message in agent.up if message.kind != "answering")
        awaits = any(not m.ghost and m.kind in ("hello", "answering") for m in agent.up) or any(
            m.kind == "welcome" for m in agent.down
        )
        # It is asked for a new hello when the session has moved on.
        helps = not agent.current if agent.welcomed else not awaits
        hello = Message("hello", agent.run, ends=agent.ends)
        for old in [(), ghosts] if 0 < len(ghosts) < self.size.up else [()]:
            after = agent._replace(
                welcomed=False,
                since=self.term,
                current=False,
                up=(*old, hello),
                down=() if self.rules.stream_left else agent.down,
            )
            lost = "; what was on its way is lost" if ghosts and not old else ""
            yield Step("say hello", f"says {told(hello)} on a new stream{lost}", server, after, helps)

    def _as_ghost(self, message: Message) -> Message:
        """Nobody waits for its answer: how old it is and what it asks is nobody's matter."""
        message = message._replace(ghost=True, age=0)
        if message.kind == "hello" and self.rules.omission_asks:
            message = message._replace(token=0, ends=0)
        return message

    def _sends(self, server: Server, agent: Agent) -> Iterator[Step]:
        if not agent.welcomed or len(agent.up) >= self.size.up:
            return
        if agent.current or not self.rules.renewal_epoch:
            yield Step("send heartbeat", "sends a heartbeat", server, self._says(agent, Message("heartbeat")))
        for token in tokens_in(agent.ends):
            after = self._says(agent, Message("ended", token))
            if not self.rules.outbox:
                after = after._replace(ends=agent.ends & ~bit(token))
            yield Step("tell end", f"tells the end of lease {token}", server, after)

    def _works(self, server: Server, agent: Agent) -> Iterator[Step]:
        if not agent.lives:
            return
        if not self.size.endless:
            yield Step("work ends", f"the work of lease {agent.run} ends", server, self._ended(agent))
        if not agent.left:
            text = (
                f"the keeper of lease {agent.run} {'freezes' if self.size.freezes else 'ends'} it: it was not renewed"
            )
            yield Step("keeper fences", text, server, self._fenced(agent))

    def _ended(self, agent: Agent) -> Agent:
        """The work is over. That is journalled, unless the server has said that the lease is."""
        return agent._replace(run=0, ends=agent.ends | (bit(agent.run) if agent.kept else 0))

    def _says(self, agent: Agent, message: Message) -> Agent:
        """It sends, unless too much is under way: then it says so when it is asked again."""
        return agent._replace(up=(*agent.up, message)) if len(agent.up) < self.size.up else agent

    def _welcomed(self, server: Server, agent: Agent, message: Message) -> Iterator[Step]:
        stale = message.token
        agent = agent._replace(welcomed=True, ends=agent.ends & ~message.ends)
        if not self.rules.spared_end:
            agent = agent._replace(ends=agent.ends & ~bit(stale))
        goes_on = agent.run != stale or (agent.frozen and not self.rules.thaw_asks)
        agent = agent._replace(kept=goes_on)
        if agent.frozen and not goes_on:
            agent = agent._replace(run=0)
        yield Step("take welcome", f"takes {told(message)}", server, self._renewed(agent, message))

    def _acked(self, server: Server, agent: Agent, message: Message) -> Iterator[Step]:
        yield Step("take ack", f"takes {told(message)}", server, self._renewed(agent, message))

    def _renewed(self, agent: Agent, message: Message) -> Agent:
        """What it holds is renewed from when the heartbeat or hello was sent."""
        age = message.age if self.rules.send_time else 0
        agent = agent._replace(since=min(agent.since, age))
        if agent.run and agent.kept:
            left = max(agent.left, self.term - age)
            agent = agent._replace(left=left, frozen=agent.frozen and not left)
        return agent

    def _granted(self, server: Server, agent: Agent, message: Message) -> Iterator[Step]:
        token = message.token
        if agent.seen & bit(token):
            yield Step("take grant again", f"takes {told(message)}, known", server, self._answers(agent, token))
            return
        if agent.since < self.term:
            begun = agent._replace(
                run=token, left=self.term - agent.since, kept=True, frozen=False, seen=agent.seen | bit(token)
            )
            yield Step("begin", f"takes {told(message)} and begins", server, begun)
        # It cannot take it, or it was restarted before the start was journalled.
        yield Step("give back", f"takes {told(message)} and gives it back", server, self._answers(agent, token))

    def _asked(self, server: Server, agent: Agent, message: Message) -> Iterator[Step]:
        after = self._answers(agent, message.token) if self.rules.revoke_obeyed else agent
        yield Step("take question", f"takes {told(message)}", server, after)

    def _stopped(self, server: Server, agent: Agent, message: Message) -> Iterator[Step]:
        after = agent
        if self.rules.revoke_obeyed:
            after = self._ended(agent) if agent.run == message.token else self._answers(agent, message.token)
        yield Step("take stop", f"takes {told(message)}", server, after)

    def _answers(self, agent: Agent, token: int) -> Agent:
        """It says what is so of a lease: released, unless it runs or its end is to be told."""
        if agent.run == token or agent.ends & bit(token):
            return agent
        if self.rules.tombstone:
            agent = agent._replace(seen=agent.seen | bit(token))
        return self._says(agent, Message("released", token))

    def _end_acked(self, server: Server, agent: Agent, message: Message) -> Iterator[Step]:
        after = agent._replace(ends=agent.ends & ~bit(message.token))
        yield Step("take end ack", f"takes {told(message)}", server, after)

    # ── the server: what arrives ─────────────────────────────────────────────

    def _hello_arrives(self, server: Server, agent: Agent, message: Message) -> Iterator[Step]:
        """The new epoch is committed, which counts as a renewal; which leases stand is read after that."""
        agent = self._new_epoch(agent)._replace(age=0, current=not message.ghost)
        if not self.rules.omission_asks:
            server, agent = self._omitted(server, agent, message)
        if not message.ghost:
            agent = agent._replace(up=(*agent.up, message._replace(kind="answering")))
        yield Step("commit hello", f"{told(message)} is committed", server, agent)

    def _hello_is_answered(self, server: Server, agent: Agent, message: Message) -> Iterator[Step]:
        """What stands is kept; so is the end of a lost lease while its job waits."""
        newest = bit(server.tokens)
        waits = not server.done and not server.leased
        welcome = Message(
            "welcome",
            token=0 if agent.holds and message.token == server.tokens else message.token,
            age=message.age,
            ends=message.ends & ~newest if agent.holds or waits else message.ends,
        )
        yield Step("answer hello", "the hello is answered", server, self._tells(agent, welcome))

    def _omitted(self, server: Server, agent: Agent, hello: Message) -> tuple[Server, Agent]:
        if agent.holds and server.tokens != hello.token and not hello.ends & bit(server.tokens):
            return self._over(server, agent)
        return server, agent

    def _heartbeat_arrives(self, server: Server, agent: Agent, message: Message) -> Iterator[Step]:
        agent = agent._replace(age=0)
        if not message.ghost:
            agent = self._tells(agent, Message("ack", age=message.age))
        yield Step("renew", f"{told(message)} renews the session", server, agent)

    def _end_arrives(self, server: Server, agent: Agent, message: Message) -> Iterator[Step]:
        token = message.token
        if server.done:
            counts = not self.rules.final and server.done == CANCELLED
        elif server.leased:
            counts = (agent.holds and token == server.tokens) or not self.rules.fencing
        else:
            counts = token == server.tokens and self.rules.late_end
        was_leased = server.leased
        if counts:
            server, agent = server._replace(done=token, leased=False, overdue=False), agent._replace(holds=False)
        if not message.ghost:
            agent = self._tells(agent, Message("end ack", token))
        action = ("record end" if was_leased else "record late end") if counts else "refuse end"
        yield Step(action, f"{told(message)} " + ("is recorded" if counts else "changes nothing"), server, agent)

    def _release_arrives(self, server: Server, agent: Agent, message: Message) -> Iterator[Step]:
        counts = agent.holds and message.token == server.tokens
        if counts:
            server, agent = self._over(server, agent)
        yield Step("release", f"{told(message)} " + ("ends it" if counts else "changes nothing"), server, agent)

    # ── the server: what it does ─────────────────────────────────────────────

    def _plans(self, server: Server, agent: Agent) -> Iterator[Step]:
        """A lease is given to an agent whose session was renewed lately."""
        if not server.leased and not server.cancel and server.tokens < self.size.leases and agent.age < self.term:
            token = server.tokens + 1
            leased = server._replace(tokens=token, leased=True)
            yield Step("grant", f"is given lease {token}", leased, agent._replace(holds=True))

    def _asks(self, server: Server, agent: Agent) -> Iterator[Step]:
        """What stands is told again and again; why a lease is asked back is a matter of its own."""
        if not agent.holds or not _has_stream(agent):
            return
        grant = self._tells(agent, Message("grant", server.tokens))
        yield Step("send grant", f"grant {server.tokens} is sent", server, grant)
        question = Message("stop" if server.cancel else "question", server.tokens)
        asked = server, self._tells(agent, question)
        if not self.rules.revoke_waits:
            asked = self._over(*asked)
        yield Step("ask", f"{told(question)} is sent", *asked)

    def _expires(self, server: Server, agent: Agent) -> Iterator[Step]:
        """In one statement: the session is overdue, its lease is over, its epoch moves."""
        if not agent.holds:
            return
        late = agent.age >= self.wait
        if late and not self.rules.session_lock and not server.overdue:
            yield Step("find overdue", f"lease {server.tokens} is found overdue", server._replace(overdue=True), agent)
        elif late or server.overdue:
            after = self._over(server, self._new_epoch(agent)._replace(current=False))
            yield Step("expire", f"lease {server.tokens} expires", *after, helps=False)

    def _gives_up(self, server: Server, agent: Agent) -> Iterator[Step]:
        if not server.leased and server.tokens == self.size.leases:
            yield Step("give up", "the job, that waits, is cancelled", server._replace(done=CANCELLED), agent)
        if self.size.endless and not server.cancel:
            done = 0 if server.leased else CANCELLED
            text = "its user cancels the job"
            yield Step("cancel", text, server._replace(cancel=True, done=done), agent)

    def _counts_wrong(self, server: Server, agent: Agent) -> Iterator[Step]:
        """A leader that stood still is replaced, and wakes up with a step to count. To one agent's session only."""
        if not self.size.leaders or server.done:
            return
        if not server.old_leader:
            after = server._replace(old_leader=1, uncounted=False)
            yield Step("replace leader", "another replica leads", after, agent, helps=False)
        elif self.rules.leader_epoch:
            after = server._replace(old_leader=0)
            yield Step("wake old leader", "the old leader finds that its term is over", after, agent, helps=False)
        elif server.old_leader == 1:
            agent = agent._replace(age=min(agent.age + 1, self.wait))
            after = server._replace(old_leader=2)
            yield Step("wake old leader", "the old leader counts the step once more", after, agent, helps=False)

    def _over(self, server: Server, agent: Agent) -> tuple[Server, Agent]:
        """The lease is over and its job waits again, unless it was cancelled."""
        done = CANCELLED if server.cancel else 0
        return server._replace(leased=False, overdue=False, done=done), agent._replace(holds=False)

    def _new_epoch(self, agent: Agent) -> Agent:
        """The session's epoch moves: heartbeats in the old one's name renew nothing any more."""
        if not self.rules.renewal_epoch:
            return agent
        return agent._replace(up=tuple(message for message in agent.up if message.kind != "heartbeat"))

    def _tells(self, agent: Agent, message: Message) -> Agent:
        return agent._replace(down=(*agent.down, message)) if len(agent.down) < self.size.down else agent

    _HEARD: ClassVar = {
        "ack": _acked,
        "grant": _granted,
        "question": _asked,
        "stop": _stopped,
        "end ack": _end_acked,
    }
    _ARRIVED: ClassVar = {
        "hello": _hello_arrives,
        "answering": _hello_is_answered,
        "heartbeat": _heartbeat_arrives,
        "ended": _end_arrives,
        "released": _release_arrives,
    }


def _without(messages: tuple[Message, ...], message: Message) -> tuple[Message, ...]:
    return tuple(other for other in messages if other != message)


def _has_stream(agent: Agent) -> bool:
    """Returns whether the server knows a stream of the agent's on which it can tell it things."""
    return agent.welcomed or any(message.kind == "welcome" for message in agent.down)
