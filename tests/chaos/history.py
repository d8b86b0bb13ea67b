"""All that a chaos run leaves behind, as values: what the checker judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lessor.lifecycle import Outcome

LEASE_EXPIRED = "LEASE_EXPIRED"
"""Type of the error of an attempt whose lease ran out."""


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job whose submit was answered with OK."""

    name: str
    """Of this job alone."""
    job_number: int
    lines: int
    """What it prints, if it gets to the end."""
    exits: tuple[int, ...]
    """Its exit code at the first attempt, the second, …; the last one from then on."""
    cpu: int = 1
    cancelled_ns: int | None = None
    """When a cancel of it was answered with OK; CLOCK_BOOTTIME."""
    grace_s: float = 2.0
    """From SIGTERM to SIGKILL."""
    continues: bool = False
    """It may run on without its lease, beside the attempt that comes after."""

    def exit_of(self, attempt: int) -> int:
        """Returns the exit code of an attempt that ends by itself."""
        return self.exits[min(attempt, len(self.exits)) - 1]


@dataclass(frozen=True, slots=True)
class Execution:
    """What one attempt wrote down itself. Instants on CLOCK_BOOTTIME, nanoseconds."""

    token: int
    """The fencing token: its lease_id."""
    job_id: str
    attempt: int
    gpus: tuple[str, ...]
    started_ns: int
    last_ns: int
    """Its last sign of life, children included."""
    exit_code: int | None
    """None: it did not end by itself."""
    ended_ns: int | None
    asked_ns: int | None
    """When it first noticed SIGTERM."""
    written: int
    """Bytes of standard output that were written for sure."""
    tried: int
    """Bytes of standard output that may have been written."""
    starts: int = 1
    """How often it began: processes that said so under this token."""


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """One row of ``attempt``."""

    job_number: int
    lease_id: int
    agent_id: str
    outcome: Outcome
    exit_code: int | None
    signal: int
    error_type: str
    final_state: int | None
    granted_ns: int | None
    """On CLOCK_BOOTTIME, by way of the wall clock."""
    ended_ns: int
    log_bytes: int
    logs_truncated_at: int | None


@dataclass(frozen=True, slots=True)
class StoredLog:
    """What the database has of an attempt's output."""

    end_offset: int
    stdout: bytes
    gaps: int
    """Chunks that do not begin where the one before ended."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that was injected."""

    what: str
    """Its kind."""
    whom: str
    """What it hit: ``agent:2``, ``server:0``, ``postgres``."""
    from_ns: int
    to_ns: int
    """When it was healed; CLOCK_BOOTTIME."""
    agent_id: str = ""
    """Of an agent; empty: it hit all of them."""
    lease_id: int = 0
    """Of the one lease whose keeper it hit; 0: it hit no single lease."""


@dataclass(frozen=True, slots=True)
class History:
    """A run, from its first submit to its last look at everything."""

    submitted: Sequence[Submitted]
    stored_jobs: Mapping[int, str]
    """Number → name, of all jobs in the database."""
    executions: Sequence[Execution]
    attempts: Sequence[AttemptRow]
    logs: Mapping[int, StoredLog]
    """lease_id → its log."""
    unfinished: Mapping[int, str]
    """Job number → where it still stands: ready, delayed, or its lease."""
    held_gpus: int = 0
    """Rows of ``lease_gpu`` at the end."""
    slots: Mapping[str, int] = field(default_factory=dict)
    """agent_id → CPUs that it leases."""
    leaked: Sequence[str] = ()
    """Processes of jobs that still live at the end, each in words."""
    audit: Sequence[str] = ()
    """What the database's own watch over its history reported."""
    faults: Sequence[Fault] = ()


def read_executions(directory: Path) -> list[Execution]:
    """Returns what the workloads of a run wrote, in order of their tokens."""
    tokens: dict[int, list[Path]] = {}
    for path in directory.iterdir():
        token, dot, _ = path.name.partition(".")
        if dot and token.isdecimal():
            tokens.setdefault(int(token), []).append(path)
    found = []
    for number, files in sorted(tokens.items()):
        facts = {path.name.partition(".")[2]: _facts(path) for path in files}
        if facts.get("main"):
            found.append(_execution(number, facts))
    return found


def _execution(token: int, facts: Mapping[str, list[list[str]]]) -> Execution:
    main = facts["main"]
    start = main[0]
    ends = [fact for fact in main if fact[0] == "end"]
    asked = [fact for fact in main if fact[0] == "term"]
    return Execution(
        token=token,
        job_id=start[5],
        attempt=int(start[4]),
        gpus=() if start[3] == "-" else tuple(start[3].split(",")),
        started_ns=int(start[1]),
        last_ns=max(int(fact[1]) for role in facts.values() for fact in role),
        exit_code=int(ends[0][2]) if ends else None,
        ended_ns=int(ends[0][1]) if ends else None,
        asked_ns=int(asked[0][1]) if asked else None,
        written=max((int(fact[2]) for fact in main if fact[0] == "out"), default=0),
        tried=max((int(fact[2]) for fact in main if fact[0] == "try"), default=0),
        starts=sum(fact[0] == "start" for fact in main),
    )


_WORDS = {"start": 6, "tick": 2, "try": 3, "out": 3, "term": 2, "end": 3}
"""Kind → words of a whole fact: a kill may leave half a line."""


def _facts(path: Path) -> list[list[str]]:
    facts = [line.split() for line in path.read_text().splitlines()]
    return [fact for fact in facts if fact and len(fact) == _WORDS.get(fact[0])]
