"""The errors the server answers with.

    LessorServerError
    ├── InvalidField             a field breaks a rule
    ├── NotFound
    │   ├── JobNotFound
    │   ├── QueueNotFound
    │   ├── AgentNotFound
    │   └── AttemptNotFound
    ├── QueueExists
    ├── JobNotTerminal           a retry of a job that has not ended
    ├── RequestIdReused          one request_id, two different requests
    ├── CursorExpired            the watch cursor is too old or of another database
    ├── ProtocolUnsupported      the agent is too old or too new
    ├── AgentIdentityInUse       two hosts, one agent id
    ├── ProtocolViolation        the agent broke the protocol
    ├── Unavailable
    │   ├── DatabaseUnavailable
    │   ├── Contended            the job changes hands too fast
    │   └── Stopping             this replica is going away
    ├── TooLarge
    └── SchemaMismatch           the database holds another schema (at start; no RPC answers with it)

Each leaf that an RPC answers with names its reason in the proto enum
``ErrorReason``; the rpc layer has one table from these to gRPC status codes. Messages say what was wrong, with the
value, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from enum import StrEnum
from typing import ClassVar, NamedTuple

from lessor_server.domain.states import JobState

_SHOWN_CHARS = 128
"""A value from outside is quoted up to this length: it may be anything, of any size."""


def _shown(value: str) -> str:
    """Returns ``value`` quoted, without control characters, and not too long to read."""
    return repr(value if len(value) <= _SHOWN_CHARS else value[: _SHOWN_CHARS - 1] + "…")


def _detail(value: object) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 1] + "…"


class LessorServerError(Exception):
    """Base of the errors that a caller is told.

    Attributes:
        reason: Name in the proto enum ``ErrorReason``, without the prefix. Set by every leaf.
        message: What was wrong, with the value, and what to do.
        details: The values in the message, by name, for ``ErrorInfo.metadata``.
        retry_delay: When trying the same again makes sense; None: it does not.
    """

    reason: ClassVar[str]
    retry_delay: ClassVar[timedelta | None] = None

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, str] = {name: _detail(value) for name, value in details.items()}


class FieldViolation(NamedTuple):
    """One field that breaks a rule."""

    field: str
    """Path in the request, like ``spec.resources.gpu_count``."""
    description: str
    """The rule and the value that breaks it."""


class InvalidField(LessorServerError):
    """One or more fields break a rule; nothing was done."""

    reason = "INVALID_FIELD"

    def __init__(self, violations: Iterable[tuple[str, str]]) -> None:
        self.violations = [FieldViolation(field, description) for field, description in violations]
        if not self.violations:
            raise ValueError("InvalidField needs at least one violation")
        super().__init__(
            "; ".join(f"{field}: {description}" if field else description for field, description in self.violations)
        )


class NotFound(LessorServerError):
    """What was named does not exist."""


class JobNotFound(NotFound):
    """No job has this id, or retention removed it."""

    reason = "JOB_NOT_FOUND"

    def __init__(self, job_id: str) -> None:
        super().__init__(
            f"no job {_shown(job_id)}: check the id, or list jobs; old jobs are removed by retention", job_id=job_id
        )


class QueueNotFound(NotFound):
    """No queue has this name."""

    reason = "QUEUE_NOT_FOUND"

    def __init__(self, queue: str) -> None:
        super().__init__(f"no queue {_shown(queue)}: create it first, or name another", queue=queue)


class AgentNotFound(NotFound):
    """No agent has this id or name."""

    reason = "AGENT_NOT_FOUND"

    def __init__(self, agent: str) -> None:
        super().__init__(f"no agent {_shown(agent)}: name one that has connected before, by id or by name", agent=agent)


class AttemptNotFound(NotFound):
    """The job has no attempt of this number."""

    reason = "ATTEMPT_NOT_FOUND"

    def __init__(self, job_id: str, attempt: int, last_attempt: int) -> None:
        known = f"its attempts are 1 to {last_attempt}" if last_attempt > 0 else "it has had none yet"
        super().__init__(
            f"job {job_id} has no attempt {attempt}: {known}", job_id=job_id, attempt=attempt, last_attempt=last_attempt
        )


class QueueExists(LessorServerError):
    """A queue of this name exists."""

    reason = "QUEUE_EXISTS"

    def __init__(self, queue: str) -> None:
        super().__init__(f"queue {_shown(queue)} exists already: update it, or choose another name", queue=queue)


class JobNotTerminal(LessorServerError):
    """The job has not ended, so it cannot be retried."""

    reason = "JOB_NOT_TERMINAL"

    def __init__(self, job_id: str, state: JobState) -> None:
        super().__init__(
            f"job {job_id} is {state.name}, not ended: wait for its end or cancel it first",
            job_id=job_id,
            state=state.name,
        )


class RequestIdReused(LessorServerError):
    """The request_id was used for a different request."""

    reason = "REQUEST_ID_REUSED"

    def __init__(self, request_id: str, used_for: str) -> None:
        """
        Args:
            request_id: The id.
            used_for: What it was first used for, like ``a batch of 3 jobs``.
        """
        super().__init__(
            f"request_id {_shown(request_id)} was used before, for {used_for}: use a new one for a new request",
            request_id=request_id,
            used_for=used_for,
        )


class CursorFault(StrEnum):
    """Why a watch cursor cannot be resumed."""

    TOO_OLD = "its changes have been removed by retention"
    FOREIGN = "it is of another database"


class CursorExpired(LessorServerError):
    """The watch cursor cannot be resumed without skipping changes."""

    reason = "CURSOR_EXPIRED"

    def __init__(self, cursor: str, fault: CursorFault) -> None:
        super().__init__(
            f"cursor {_shown(cursor)} cannot be resumed: {fault}; list the jobs again and watch from now",
            cursor=cursor,
            fault=fault.name,
        )


class ProtocolUnsupported(LessorServerError):
    """The agent speaks a protocol version that this server does not."""

    reason = "PROTOCOL_UNSUPPORTED"

    def __init__(self, version: int, oldest: int, newest: int) -> None:
        """
        Args:
            version: What the agent speaks.
            oldest: The oldest version spoken here.
            newest: The newest version spoken here.
        """
        upgrade = "the agent" if version < oldest else "the server"
        super().__init__(
            f"the agent speaks protocol version {version}, this server {oldest} to {newest}: upgrade {upgrade}",
            version=version,
            oldest=oldest,
            newest=newest,
        )


class AgentIdentityInUse(LessorServerError):
    """Another host holds leases under this agent id."""

    reason = "AGENT_IDENTITY_IN_USE"

    def __init__(self, agent_id: str, incumbent_host: str, leases: int) -> None:
        """
        Args:
            agent_id: The id both claim.
            incumbent_host: Host name of the agent that has it.
            leases: Live leases of the incumbent.
        """
        super().__init__(
            f"agent id {_shown(agent_id)} is in use by host {_shown(incumbent_host)} with {leases} live leases: "
            "if the state directory was copied, remove the copy, and the agent makes itself a new id; "
            "if the host was replaced, wait until the leases have expired",
            agent_id=agent_id,
            incumbent_host=incumbent_host,
            leases=leases,
        )


class ProtocolViolation(LessorServerError):
    """The stream broke the agent protocol and is closed."""

    reason = "PROTOCOL_VIOLATION"

    def __init__(self, agent: str, violation: str) -> None:
        """
        Args:
            agent: Name or id of the agent; empty before its Hello.
            violation: What it did, like ``sent Heartbeat before Hello``.
        """
        who = f"agent {_shown(agent)}" if agent else "an agent"
        super().__init__(
            f"{who} broke the protocol: it {violation}; the stream is closed, report this as a bug of the agent",
            agent=agent,
            violation=violation,
        )


class Unavailable(LessorServerError):
    """Not now; the same request may work soon."""


class DatabaseUnavailable(Unavailable):
    """The database does not answer. Whether the request was committed is not known."""

    reason = "DATABASE_UNAVAILABLE"
    retry_delay = timedelta(seconds=1)

    def __init__(self, cause: str) -> None:
        """
        Args:
            cause: The driver's error, without the connection string.
        """
        super().__init__(f"the database does not answer ({cause}): try again, with the same request_id", cause=cause)


class Contended(Unavailable):
    """The job changed hands each time it was reached for; nothing was changed."""

    reason = "CONTENDED"
    retry_delay = timedelta(milliseconds=100)

    def __init__(self, job_id: str, tries: int) -> None:
        super().__init__(f"job {job_id} changed hands {tries} times in a row: try again", job_id=job_id, tries=tries)


class Stopping(Unavailable):
    """This replica is stopping."""

    reason = "STOPPING"
    retry_delay = timedelta(milliseconds=500)

    def __init__(self) -> None:
        super().__init__("this server is stopping: try again, another replica or its successor answers")


class TooLarge(LessorServerError):
    """A message is larger than the server takes."""

    reason = "TOO_LARGE"

    def __init__(self, what: str, size_bytes: int, limit_bytes: int) -> None:
        """
        Args:
            what: What is too large, like ``specs[3]``.
            size_bytes: Its size.
            limit_bytes: The most the server takes.
        """
        super().__init__(
            f"{what} has {size_bytes} bytes, the limit is {limit_bytes}: make it smaller, or pass large data by file",
            what=what,
            size_bytes=size_bytes,
            limit_bytes=limit_bytes,
        )


class SchemaMismatch(LessorServerError):
    """The database holds another schema than this code speaks. A server does not start on it."""

    reason = "SCHEMA_MISMATCH"
