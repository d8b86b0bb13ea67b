"""Recorded agent conversations: their text form, and what of them must stay as it is.

A recording is JSON lines. The first tells the protocol version and what the
conversation is about; each other line is one of

* ``{"agent": …}``: a ConnectRequest, as protobuf JSON;
* ``{"server": …}``: a ConnectResponse;
* ``{"happens": …}``: what neither says: a stream opens or is cut, a user
  submits or cancels, the workload writes or ends, lease time passes.

Ids are normalised: jobs, leases and sessions are numbered in the order they
appear, times are one instant, versions one word.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from lessor.ids import encode_job_id
from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import job_pb2

RECORDED_VERSION = "recorded"
RECORDED_TIME_S = 1_767_225_600
"""2026-01-01T00:00:00Z."""

AGENT_SESSION_FIELDS = frozenset({"session_id"})
LEASE_FIELDS = frozenset({"lease_id", "lease_ids"})
JOB_FIELDS = frozenset({"job_id"})


@dataclass(frozen=True, slots=True)
class Line:
    """One line after the first."""

    agent: pb.ConnectRequest | None = None
    server: pb.ConnectResponse | None = None
    happens: Mapping[str, Any] | None = None

    def text(self) -> str:
        """Returns it as it stands in the file."""
        for name, message in (("agent", self.agent), ("server", self.server)):
            if message is not None:
                return json.dumps({name: json_format.MessageToDict(message)}, ensure_ascii=False)
        return json.dumps({"happens": self.happens}, ensure_ascii=False)


@dataclass(slots=True)
class Conversation:
    """A recording."""

    name: str
    about: str
    protocol_version: int
    lines: list[Line] = field(default_factory=list)

    def write(self, directory: Path) -> None:
        """Writes it to ``directory/<name>.jsonl``."""
        head = {"conversation": self.name, "protocol_version": self.protocol_version, "about": self.about}
        text = "\n".join([json.dumps(head), *(line.text() for line in self.lines)]) + "\n"
        (directory / f"{self.name}.jsonl").write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Conversation:
        """Reads a recording. Fields that today's contract does not know are an error: v1 may only grow."""
        head, *rest = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        made = cls(head["conversation"], head["about"], head["protocol_version"])
        for entry in rest:
            ((who, what),) = entry.items()
            if who == "agent":
                made.lines.append(Line(agent=json_format.ParseDict(what, pb.ConnectRequest())))
            elif who == "server":
                made.lines.append(Line(server=json_format.ParseDict(what, pb.ConnectResponse())))
            else:
                made.lines.append(Line(happens=what))
        return made


class Names:
    """Live id ↔ number in the recording, for each kind of id."""

    def __init__(self) -> None:
        self._recorded: dict[tuple[str, int | str], int | str] = {}
        self._live: dict[tuple[str, int | str], int | str] = {}
        self._count: dict[str, int] = {}

    def bind(self, kind: str, recorded: int | str, live: int | str) -> None:
        """Says that ``recorded`` is ``live``."""
        self._recorded[kind, live] = recorded
        self._live[kind, recorded] = live

    def recorded(self, kind: str, live: Any) -> Any:
        """Returns the recording's name of a live id; a new one gets the next number."""
        if (kind, live) not in self._recorded:
            number = self._count[kind] = self._count.get(kind, 0) + 1
            self.bind(kind, encode_job_id(number) if kind == "job" else number, live)
        return self._recorded[kind, live]

    def live(self, kind: str, recorded: Any) -> Any:
        """Returns the live id of a recorded one.

        Raises:
            KeyError: It has not appeared.
        """
        return self._live[kind, recorded]

    def knows(self, kind: str, recorded: int | str) -> bool:
        """Returns whether a recorded id has a live one."""
        return (kind, recorded) in self._live


def translated(message: Any, translate: Callable[[str, Any], Any]) -> Any:
    """Returns a copy of a message with every id of a job, lease or session translated; 0 and "" stay."""
    copy = type(message)()
    copy.CopyFrom(message)
    for part in parts(copy):
        for descriptor, value in part.ListFields():
            kind = _kind(descriptor.name)
            if kind and descriptor.is_repeated:
                values = [translate(kind, item) for item in value]
                del value[:]
                value.extend(values)
            elif kind:
                setattr(part, descriptor.name, translate(kind, value))
    return copy


def normalised(message: Any, names: Names) -> Any:
    """Returns a message as it is recorded."""
    copy = translated(message, names.recorded)
    for part in parts(copy):
        if isinstance(part, Timestamp):
            part.seconds, part.nanos = RECORDED_TIME_S, 0
        elif isinstance(part, pb.Hello | pb.Welcome):
            part.version = RECORDED_VERSION
    return copy


def parts(message: Message) -> Iterator[Message]:
    """Yields a message and every message in it."""
    yield message
    for descriptor, value in message.ListFields():
        kind = descriptor.message_type
        if kind is None or kind.GetOptions().map_entry:
            continue
        for item in value if descriptor.is_repeated else [value]:
            yield from parts(item)


def server_words(message: pb.ConnectResponse) -> list[tuple[Any, ...]]:
    """Returns what a server's message says, in parts that may come in other messages and another order.

    How acks are put together is not part of the contract, what they ack is. An
    unknown field of a known message is ignored, as an agent ignores it.
    """
    kind = message.WhichOneof("message")
    match kind:
        case "welcome":
            welcome = message.welcome
            answers = tuple(sorted((a.lease_id, pb.LeaseDecision.Name(a.decision), _log(a)) for a in welcome.leases))
            return [("welcome", welcome.session_id, welcome.epoch, welcome.protocol_version, answers)]
        case "grants":
            return [("grant", message.grants.epoch, json_format.MessageToDict(g)) for g in message.grants.grants]
        case "revokes":
            return [
                ("revoke", message.revokes.epoch, revoke.job_id, revoke.lease_id, pb.RevokeReason.Name(revoke.reason))
                for revoke in message.revokes.revokes
            ]
        case "ack":
            return [
                *([("heartbeat", message.ack.heartbeat_seq)] if message.ack.heartbeat_seq else []),
                *(("event", seq) for seq in message.ack.event_seqs),
                *(("log", p.lease_id, p.end_offset, p.stdout_bytes, p.stderr_bytes) for p in message.ack.logs),
            ]
        case _:
            return [(kind,)]


def agent_words(message: pb.ConnectRequest) -> list[tuple[Any, ...]]:
    """Returns what an agent's message says: kinds, and the values that do not depend on the host's clock."""
    kind = message.WhichOneof("message")
    match kind:
        case "hello":
            held = tuple(sorted((h.lease_id, job_pb2.LeasePhase.Name(h.phase)) for h in message.hello.leases))
            return [("hello", message.hello.protocol_version, message.hello.session_id, held)]
        case "lease_events":
            return [_event(event) for event in message.lease_events.events]
        case "progress":
            return [
                ("progress", u.job_id, u.lease_id, u.progress.fraction, u.progress.message)
                for u in message.progress.updates
            ]
        case "log_chunks":
            return [
                ("log", c.job_id, c.lease_id, c.offset, job_pb2.LogStream.Name(c.stream), len(c.data))
                for c in message.log_chunks.chunks
            ]
        case "heartbeat":
            return [("heartbeat", tuple(sorted(message.heartbeat.lease_ids)))]
        case _:
            return [(kind,)]


def _event(event: pb.LeaseEvent) -> tuple[Any, ...]:
    kind = event.WhichOneof("event")
    said: tuple[Any, ...] = ()
    if kind == "ended":
        end = event.ended
        said = (job_pb2.Outcome.Name(end.outcome), end.exit_code, end.signal, end.error.type, end.result_json,
                end.final_log_offset)  # fmt: skip
    elif kind == "checkpoint_saved":
        said = (event.checkpoint_saved.cursor,)
    return ("event", event.seq, kind, event.job_id, event.lease_id, *said)


def _log(answer: pb.LeaseAnswer) -> tuple[int, int, int]:
    return answer.log.end_offset, answer.log.stdout_bytes, answer.log.stderr_bytes


def _kind(name: str) -> str:
    for kind, fields in (("lease", LEASE_FIELDS), ("session", AGENT_SESSION_FIELDS), ("job", JOB_FIELDS)):
        if name in fields:
            return kind
    return ""


def as_recorded(said: Any, recorded: Any) -> bool:
    """Returns whether what is said now is what was recorded; new fields beside the recorded ones are allowed.

    Acks of heartbeats and logs are cumulative: a later one says all that the recorded one said.
    """
    match said, recorded:
        case ("heartbeat", int() as seq), ("heartbeat", int() as old):
            return seq >= old
        case ("log", lease, int() as end, int(), int()), ("log", old_lease, int() as old, int(), int()):
            return bool(lease == old_lease and end >= old)
        case dict(), dict():
            return all(key in said and as_recorded(said[key], value) for key, value in recorded.items())
        case (list(), list()) | (tuple(), tuple()):
            return len(said) == len(recorded) and all(map(as_recorded, said, recorded))
        case _:
            return bool(said == recorded)


def said_by_agents(conversations: Iterable[Conversation]) -> set[str]:
    """Returns every kind of word that agents say in recordings, events by their own kind."""
    words = [
        word
        for talk in conversations
        for line in talk.lines
        if line.agent is not None
        for word in agent_words(line.agent)
    ]
    return {str(word[2]) if word[0] == "event" else str(word[0]) for word in words}
