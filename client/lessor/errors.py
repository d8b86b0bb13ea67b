"""Every exception Lessor's client side raises.

LessorError
├── InvalidArgument           a value breaks a rule (also a ValueError)
│   └── InvalidJobFile        a job file cannot be read
├── NotFound
│   ├── JobNotFound
│   ├── AttemptNotFound
│   ├── QueueNotFound
│   └── AgentNotFound
├── AlreadyExists
│   └── QueueExists
├── FailedPrecondition
│   ├── JobNotTerminal
│   ├── RequestIdReused
│   ├── ProtocolUnsupported   agents only
│   ├── AgentIdentityInUse    agents only
│   └── ProtocolViolation     agents only
├── CursorExpired             a watch cannot resume where it was: list again
├── TooLarge                  the message is larger than the server takes
├── Unavailable               retried until the deadline, then raised
│   ├── ServerUnreachable     nothing answers at the address (also a ConnectionError)
│   ├── DatabaseUnavailable
│   ├── Contended
│   └── ServerStopping
├── RequestTimeout            the server took too long (also a TimeoutError)
├── WaitTimeout               jobs were still going when wait gave up (also a TimeoutError)
├── ClientClosed              the client was closed, or made before a fork
└── ServerError               the server failed in a way it has no reason for

The server names the reason of an error (``ErrorReason`` of the contract);
:data:`BY_REASON` turns it into a class. This module imports neither grpc nor
protobuf.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lessor.sdk.jobs import Job


class LessorError(Exception):
    """Base of all of them.

    ``str()`` is one line: what was wrong and, in parentheses, what to do.
    """

    def __init__(self, message: str, *, remedy: str = "", metadata: Mapping[str, str] | None = None) -> None:
        """Keeps what was wrong (``message``), what to do (``remedy``) and the server's ``metadata`` about it."""
        self.message = message
        self.remedy = remedy
        self.metadata: Mapping[str, str] = dict(metadata or {})
        super().__init__(message)

    def __str__(self) -> str:
        text = f"{self.message} ({self.remedy})" if self.remedy else self.message
        return " ".join(text.split())


class InvalidArgument(LessorError, ValueError):
    """A value breaks a rule; ``violations`` says which: field → what is wrong with it."""

    def __init__(
        self,
        message: str = "",
        *,
        violations: Mapping[str, str] | None = None,
        remedy: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Makes the message from ``violations`` where none is given."""
        self.violations: Mapping[str, str] = dict(violations or {})
        if not message:
            message = "; ".join(f"{field}: {text}" if field else text for field, text in self.violations.items())
        super().__init__(message or "a value breaks a rule", remedy=remedy, metadata=metadata)


class InvalidJobFile(InvalidArgument):
    """A job file cannot be read; the message begins with the file and, where known, the line."""


class NotFound(LessorError):
    """The server knows no such thing."""


class JobNotFound(NotFound):
    """No such job."""


class AttemptNotFound(NotFound):
    """The job has no such attempt."""


class QueueNotFound(NotFound):
    """No such queue."""


class AgentNotFound(NotFound):
    """No such agent."""


class AlreadyExists(LessorError):
    """It is there already."""


class QueueExists(AlreadyExists):
    """A queue of that name exists."""


class FailedPrecondition(LessorError):
    """It cannot be done as things stand."""


class JobNotTerminal(FailedPrecondition):
    """The job has not ended yet."""


class RequestIdReused(FailedPrecondition):
    """The request_id was used for something else."""


class ProtocolUnsupported(FailedPrecondition):
    """The server does not speak the agent's protocol version."""


class AgentIdentityInUse(FailedPrecondition):
    """The agent id is in use from other hardware."""


class ProtocolViolation(FailedPrecondition):
    """The stream broke the agent protocol."""


class CursorExpired(LessorError):
    """The watch cursor is too old or of another database: list again, then watch from now."""


class TooLarge(LessorError):
    """The message is larger than the server takes."""


class Unavailable(LessorError):
    """The server cannot answer now. The call was retried until its deadline."""


class ServerUnreachable(Unavailable, ConnectionError):
    """Nothing answers at the address."""


class DatabaseUnavailable(Unavailable):
    """The server's database does not answer."""


class Contended(Unavailable):
    """The job changes hands too fast."""


class ServerStopping(Unavailable):
    """This replica of the server is stopping."""


class RequestTimeout(LessorError, TimeoutError):
    """The server took longer than the client's timeout. What was asked may or may not have been done."""


class WaitTimeout(LessorError, TimeoutError):
    """Some jobs had not ended in time."""

    def __init__(self, message: str, *, pending: Sequence[str], ended: Sequence[Job]) -> None:
        """Keeps the ids of jobs still going (``pending``) and the jobs that had ``ended``."""
        super().__init__(message)
        self.pending = tuple(pending)
        self.ended = tuple(ended)


class ClientClosed(LessorError):
    """The client was closed, or was made before the process forked."""


class ServerError(LessorError):
    """The server failed in a way it has no reason for."""


BY_REASON: dict[str, type[LessorError]] = {
    "INVALID_FIELD": InvalidArgument,
    "JOB_NOT_FOUND": JobNotFound,
    "QUEUE_NOT_FOUND": QueueNotFound,
    "QUEUE_EXISTS": QueueExists,
    "AGENT_NOT_FOUND": AgentNotFound,
    "ATTEMPT_NOT_FOUND": AttemptNotFound,
    "JOB_NOT_TERMINAL": JobNotTerminal,
    "REQUEST_ID_REUSED": RequestIdReused,
    "CURSOR_EXPIRED": CursorExpired,
    "PROTOCOL_UNSUPPORTED": ProtocolUnsupported,
    "AGENT_IDENTITY_IN_USE": AgentIdentityInUse,
    "PROTOCOL_VIOLATION": ProtocolViolation,
    "DATABASE_UNAVAILABLE": DatabaseUnavailable,
    "CONTENDED": Contended,
    "STOPPING": ServerStopping,
    "TOO_LARGE": TooLarge,
}
"""Reason (a name of ErrorReason without its prefix) → exception. A test holds it complete."""

REMEDIES: dict[type[LessorError], str] = {
    JobNotFound: "`lessor ps` lists jobs",
    QueueNotFound: "`lessor queues` lists queues, `lessor queues create NAME` makes one",
    AgentNotFound: "`lessor agents` lists agents",
    AttemptNotFound: "`lessor show JOB` lists the attempts of a job",
    JobNotTerminal: "wait for its end, or cancel it first",
    QueueExists: "`lessor queues update NAME` changes it",
    RequestIdReused: "give each request its own request_id",
    CursorExpired: "list again, then watch from now",
    DatabaseUnavailable: "look at the server's log",
    TooLarge: "pass large inputs as files that the job reads",
}
"""What to do about an error of the server, where its message does not say."""

__all__ = [
    "BY_REASON",
    "REMEDIES",
    "AgentIdentityInUse",
    "AgentNotFound",
    "AlreadyExists",
    "AttemptNotFound",
    "ClientClosed",
    "Contended",
    "CursorExpired",
    "DatabaseUnavailable",
    "FailedPrecondition",
    "InvalidArgument",
    "InvalidJobFile",
    "JobNotFound",
    "JobNotTerminal",
    "LessorError",
    "NotFound",
    "ProtocolUnsupported",
    "ProtocolViolation",
    "QueueExists",
    "QueueNotFound",
    "RequestIdReused",
    "RequestTimeout",
    "ServerError",
    "ServerStopping",
    "ServerUnreachable",
    "TooLarge",
    "Unavailable",
    "WaitTimeout",
]
