"""Lessor: leases GPUs to jobs.

``lessor.Client`` and ``lessor.AsyncClient`` submit, follow and stop jobs. A job's
own code uses :mod:`lessor.job`, which needs nothing of the client: the names
below are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lessor.errors import (
        AgentIdentityInUse,
        AgentNotFound,
        AlreadyExists,
        AttemptNotFound,
        ClientClosed,
        Contended,
        CursorExpired,
        DatabaseUnavailable,
        FailedPrecondition,
        InvalidArgument,
        InvalidJobFile,
        JobNotFound,
        JobNotTerminal,
        LessorError,
        NotFound,
        ProtocolUnsupported,
        ProtocolViolation,
        QueueExists,
        QueueNotFound,
        RequestIdReused,
        RequestTimeout,
        ServerError,
        ServerStopping,
        ServerUnreachable,
        TooLarge,
        Unavailable,
        WaitTimeout,
    )
    from lessor.lifecycle import LeasePhase, Outcome
    from lessor.sdk.aio import NO_LIMIT, AsyncClient
    from lessor.sdk.blocking import Client
    from lessor.sdk.enums import AgentState, CancelResult, ErrorClass, JobState, LogStream, PendingReason
    from lessor.sdk.fleet import Agent, Gpu, Lease, Queue
    from lessor.sdk.jobs import (
        Attempt,
        Explained,
        Explanation,
        Job,
        JobChange,
        JobError,
        LogChunk,
        Progress,
        Submission,
    )
    from lessor.sdk.selectors import LabelSelector, SelectorOperator
    from lessor.sdk.specs import JobFields, JobSpec

__version__ = "0.1.0"

_HOME = {
    **dict.fromkeys(
        (
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
        ),
        "lessor.errors",
    ),
    **dict.fromkeys(("LeasePhase", "Outcome"), "lessor.lifecycle"),
    **dict.fromkeys(("AsyncClient", "NO_LIMIT"), "lessor.sdk.aio"),
    "Client": "lessor.sdk.blocking",
    **dict.fromkeys(
        ("AgentState", "CancelResult", "ErrorClass", "JobState", "LogStream", "PendingReason"), "lessor.sdk.enums"
    ),
    **dict.fromkeys(("Agent", "Gpu", "Lease", "Queue"), "lessor.sdk.fleet"),
    **dict.fromkeys(
        (
            "Attempt",
            "Explained",
            "Explanation",
            "Job",
            "JobChange",
            "JobError",
            "LogChunk",
            "Progress",
            "Submission",
        ),
        "lessor.sdk.jobs",
    ),
    **dict.fromkeys(("LabelSelector", "SelectorOperator"), "lessor.sdk.selectors"),
    **dict.fromkeys(("JobFields", "JobSpec"), "lessor.sdk.specs"),
}
"""Public name → the module that defines it."""

__all__ = [
    "NO_LIMIT",
    "Agent",
    "AgentIdentityInUse",
    "AgentNotFound",
    "AgentState",
    "AlreadyExists",
    "AsyncClient",
    "Attempt",
    "AttemptNotFound",
    "CancelResult",
    "Client",
    "ClientClosed",
    "Contended",
    "CursorExpired",
    "DatabaseUnavailable",
    "ErrorClass",
    "Explained",
    "Explanation",
    "FailedPrecondition",
    "Gpu",
    "InvalidArgument",
    "InvalidJobFile",
    "Job",
    "JobChange",
    "JobError",
    "JobFields",
    "JobNotFound",
    "JobNotTerminal",
    "JobSpec",
    "JobState",
    "LabelSelector",
    "Lease",
    "LeasePhase",
    "LessorError",
    "LogChunk",
    "LogStream",
    "NotFound",
    "Outcome",
    "PendingReason",
    "Progress",
    "ProtocolUnsupported",
    "ProtocolViolation",
    "Queue",
    "QueueExists",
    "QueueNotFound",
    "RequestIdReused",
    "RequestTimeout",
    "SelectorOperator",
    "ServerError",
    "ServerStopping",
    "ServerUnreachable",
    "Submission",
    "TooLarge",
    "Unavailable",
    "WaitTimeout",
    "__version__",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
