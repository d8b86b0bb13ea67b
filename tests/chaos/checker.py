"""Judges a chaos run: a pure function of what it left behind.

It trusts nothing that the system under test says of itself: what ran when is
what the workloads wrote, and what the database says must agree with it.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from lessor.ids import encode_job_id
from lessor.lifecycle import Outcome
from tests.chaos.history import LEASE_EXPIRED, AttemptRow, Execution, Fault, History, Submitted
from tests.chaos.workload import printed

SECOND_NS = 1_000_000_000
AFTERMATH_NS = 20 * SECOND_NS
"""A fault may still cost something so long after it was healed: a backoff, a Hello, a lease time that lagged."""
COSTS_A_LEASE_NS = 2 * SECOND_NS
"""Faults that lasted less, all together, take no lease away: a quick restart, a reset, a backend's crash."""
CANCEL_SLACK_NS = 10 * SECOND_NS
"""A cancel is answered within its grace and so much more, when nothing is broken."""
CLOCK_SLACK_NS = 200_000_000
"""Instants of the database are wall-clock time, brought to CLOCK_BOOTTIME with an error far below this."""

_BY_ITSELF = frozenset({Outcome.SUCCEEDED, Outcome.FAILED})


class Kind(StrEnum):
    """What can be wrong."""

    OVERLAP = "overlap"
    """Two executions of one job lived at the same time."""
    STRAY = "stray"
    """A job that may run on without its lease did so long after its agent could hear that it is over."""
    LOST_JOB = "lost job"
    """An accepted job is not there, or has not ended."""
    DUPLICATE = "duplicate"
    """One submit made two jobs, or a job ended twice."""
    RE_RUN = "re-run"
    """Finished work was run again though its end was known, or could have been."""
    WRONG_OUTCOME = "wrong outcome"
    """The database says something else than the workload itself."""
    UNEXPLAINED = "unexplained loss"
    """An attempt was lost though nothing was broken."""
    IGNORED_CANCEL = "ignored cancel"
    """A cancelled job ran on."""
    LOG = "log"
    """Log bytes are wrong, missing or out of order, and the attempt does not say so."""
    TOKEN = "token"
    """Tokens of a job do not grow, or something ran without a lease."""
    SHARED = "shared"
    """A GPU was used by two jobs at once, or an agent ran more than it has room for."""
    LEAKED = "leaked"
    """Something is still held, or still runs, after all jobs have ended."""
    HISTORY = "history"
    """The database's history has a step that must not be."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that is wrong, and the particulars that help to find out why."""

    kind: Kind
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


def check(history: History) -> list[Violation]:
    """Returns everything that is wrong with a run; empty: it kept its promises."""
    rules = (
        _accepted_jobs_are_there_once,
        _no_two_executions_of_a_job_overlap,
        _what_runs_on_is_stopped_in_the_end,
        _each_lease_begins_once,
        _tokens_grow_and_name_attempts,
        _each_job_ended_once,
        _outcomes_are_what_the_workloads_say,
        _finished_work_is_not_run_again,
        _losses_have_a_cause,
        _cancels_are_heeded,
        _logs_are_exact,
        _nothing_is_shared,
        _nothing_is_left,
    )
    return [violation for rule in rules for violation in rule(_Index(history))]


class _Index:
    """A history, and the ways to look something up in it."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.submitted = {job.job_number: job for job in history.submitted}
        self.executions: dict[str, list[Execution]] = defaultdict(list)
        for execution in sorted(history.executions, key=lambda one: one.token):
            self.executions[execution.job_id].append(execution)
        self.by_token = {execution.token: execution for execution in history.executions}
        self.attempts: dict[int, list[AttemptRow]] = defaultdict(list)
        for row in sorted(history.attempts, key=lambda one: one.lease_id):
            self.attempts[row.job_number].append(row)
        self.rows = {row.lease_id: row for row in history.attempts}

    def ran_on(self, execution: Execution, at_ns: int) -> bool:
        """Returns whether an execution was allowed to run at an instant because its lease had expired by then."""
        row = self.rows.get(execution.token)
        if row is None or row.error_type != LEASE_EXPIRED or at_ns < row.ended_ns - CLOCK_SLACK_NS:
            return False
        job = self.submitted.get(row.job_number)
        return job is not None and job.continues

    def faults_near(self, row: AttemptRow) -> Iterator[Fault]:
        """Yields the faults that may have cost this attempt something."""
        from_ns = (row.granted_ns or row.ended_ns) - AFTERMATH_NS
        for fault in self.history.faults:
            if fault.from_ns <= row.ended_ns + CLOCK_SLACK_NS and fault.to_ns + AFTERMATH_NS >= from_ns:
                hits = fault.lease_id == row.lease_id if fault.lease_id else fault.agent_id in ("", row.agent_id)
                if hits:
                    yield fault


def _accepted_jobs_are_there_once(index: _Index) -> Iterator[Violation]:
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, name in index.history.stored_jobs.items():
        numbers[name].append(number)
    for job in index.history.submitted:
        found = numbers[job.name]
        if job.job_number not in found:
            yield Violation(Kind.LOST_JOB, f"{job.name}: {_id(job.job_number)} was accepted and is not stored")
        if len(found) > 1:
            yield Violation(Kind.DUPLICATE, f"{job.name} was submitted once and stored as {sorted(map(_id, found))}")


def _no_two_executions_of_a_job_overlap(index: _Index) -> Iterator[Violation]:
    for job_id, executions in index.executions.items():
        by_start = sorted(executions, key=lambda one: one.started_ns)
        for earlier, later in itertools.pairwise(by_start):
            if later.started_ns <= earlier.last_ns and not index.ran_on(earlier, later.started_ns):
                together_ms = (min(earlier.last_ns, later.last_ns) - later.started_ns) // 1_000_000
                yield Violation(
                    Kind.OVERLAP, f"{job_id}: {earlier.token} and {later.token} lived together for {together_ms} ms"
                )


def _what_runs_on_is_stopped_in_the_end(index: _Index) -> Iterator[Violation]:
    for execution in index.history.executions:
        row = index.rows.get(execution.token)
        if row is None or not index.ran_on(execution, execution.last_ns):
            continue
        heals = [fault.to_ns for fault in index.faults_near(row) if fault.from_ns <= execution.last_ns]
        late_ns = execution.last_ns - max([row.ended_ns, *heals]) - AFTERMATH_NS
        if late_ns > 0:
            late_s = late_ns / SECOND_NS
            yield Violation(Kind.STRAY, f"{execution.job_id}: {execution.token} ran on for {late_s:.1f} s too long")


def _each_lease_begins_once(index: _Index) -> Iterator[Violation]:
    for execution in index.history.executions:
        if execution.starts > 1:
            yield Violation(Kind.OVERLAP, f"{execution.job_id}: {execution.token} began {execution.starts} times")


def _tokens_grow_and_name_attempts(index: _Index) -> Iterator[Violation]:
    for job_id, executions in index.executions.items():
        by_start = sorted(executions, key=lambda one: one.started_ns)
        if [one.token for one in by_start] != [one.token for one in executions]:
            yield Violation(Kind.TOKEN, f"{job_id}: tokens in order of start: {[one.token for one in by_start]}")
        for execution in executions:
            row = index.rows.get(execution.token)
            named = row is not None and _id(row.job_number) == job_id
            if not named and all(_id(number) != job_id for number in index.history.unfinished):
                yield Violation(Kind.TOKEN, f"{job_id} ran with {execution.token}, of which no attempt is known")


def _each_job_ended_once(index: _Index) -> Iterator[Violation]:
    for job in index.history.submitted:
        if (where := index.history.unfinished.get(job.job_number)) is not None:
            yield Violation(Kind.LOST_JOB, f"{_id(job.job_number)} has not ended: {where}")
            continue
        final = [row for row in index.attempts[job.job_number] if row.final_state is not None]
        if not final:
            yield Violation(Kind.LOST_JOB, f"{_id(job.job_number)} is neither over nor waiting nor leased")
        elif len(final) > 1:
            yield Violation(Kind.DUPLICATE, f"{_id(job.job_number)} ended {len(final)} times: {_leases(final)}")
        elif any(row.lease_id > final[0].lease_id > 0 for row in index.attempts[job.job_number]):
            yield Violation(Kind.RE_RUN, f"{_id(job.job_number)} has attempts after its last one, {_leases(final)}")
    for report in index.history.audit:
        yield Violation(Kind.HISTORY, report)


def _outcomes_are_what_the_workloads_say(index: _Index) -> Iterator[Violation]:
    for row in index.history.attempts:
        job, ran = index.submitted.get(row.job_number), index.by_token.get(row.lease_id)
        where = f"{_id(row.job_number)}, lease {row.lease_id}, {row.outcome.name}"
        if row.outcome in _BY_ITSELF:
            if ran is None:
                yield Violation(Kind.WRONG_OUTCOME, f"{where}: it never ran")
            elif ran.exit_code is None or row.signal or row.exit_code != ran.exit_code:
                said = f"exit code {row.exit_code}, signal {row.signal}"
                yield Violation(Kind.WRONG_OUTCOME, f"{where}, {said}: the workload says {ran.exit_code}")
            elif row.ended_ns + CLOCK_SLACK_NS < ran.last_ns:
                late_ms = (ran.last_ns - row.ended_ns) // 1_000_000
                yield Violation(Kind.WRONG_OUTCOME, f"{where}: it lived {late_ms} ms longer than is recorded")
            if row.outcome is Outcome.SUCCEEDED and row.exit_code != 0:
                yield Violation(Kind.WRONG_OUTCOME, f"{where} with exit code {row.exit_code}")
            if job is not None and ran is not None and ran.exit_code not in (None, job.exit_of(ran.attempt)):
                yield Violation(Kind.WRONG_OUTCOME, f"{where}: attempt {ran.attempt} was to exit otherwise")
        elif row.outcome is Outcome.CANCELLED and (job is None or job.cancelled_ns is None):
            yield Violation(Kind.WRONG_OUTCOME, f"{where}: nobody cancelled it")
        elif row.outcome in (Outcome.TIMED_OUT, Outcome.PREEMPTED):
            yield Violation(Kind.WRONG_OUTCOME, f"{where}: nothing asked for that")


def _finished_work_is_not_run_again(index: _Index) -> Iterator[Violation]:
    for rows in index.attempts.values():
        for row, later in itertools.zip_longest(rows, rows[1:]):
            ran = index.by_token.get(row.lease_id)
            if ran is None or ran.exit_code is None or later is None or row.outcome is Outcome.FAILED:
                continue
            if ran.last_ns > row.ended_ns and index.ran_on(ran, ran.last_ns):
                # It ended while the attempt after it waited or ran: whose end is heard first is the job's.
                continue
            where = f"{_id(row.job_number)}: {row.lease_id} ended with {ran.exit_code}"
            if row.outcome is Outcome.SUCCEEDED:
                yield Violation(Kind.RE_RUN, f"{where} and was acknowledged; {later.lease_id} came after it")
            elif row.outcome is Outcome.LOST and not row.error_type:
                # Given back by its agent, which knew, or should have known, how it ended.
                if not any(fault.what.startswith("disk") for fault in index.faults_near(row)):
                    yield Violation(Kind.RE_RUN, f"{where}, its agent gave it back, and {later.lease_id} came after it")
            elif row.error_type == LEASE_EXPIRED and later.agent_id == row.agent_id:
                yield Violation(
                    Kind.RE_RUN, f"{where}, expired unheard, and the agent that knew of it ran {later.lease_id}"
                )


def _losses_have_a_cause(index: _Index) -> Iterator[Violation]:
    for row in index.history.attempts:
        if row.outcome in (Outcome.LOST, Outcome.REJECTED) and not _explained(row, list(index.faults_near(row))):
            yield Violation(
                Kind.UNEXPLAINED, f"{_id(row.job_number)}, lease {row.lease_id}: {row.outcome.name} {row.error_type}"
            )


def _explained(row: AttemptRow, faults: Sequence[Fault]) -> bool:
    """Returns whether faults may have cost this attempt: what is over at once costs nothing but its own lease."""
    if row.outcome is Outcome.REJECTED or any(fault.lease_id or fault.what.startswith("disk") for fault in faults):
        return bool(faults)
    return sum(fault.to_ns - fault.from_ns for fault in faults) >= COSTS_A_LEASE_NS


def _cancels_are_heeded(index: _Index) -> Iterator[Violation]:
    for job in index.history.submitted:
        if job.cancelled_ns is None:
            continue
        allowed_ns = int(job.grace_s * SECOND_NS) + CANCEL_SLACK_NS
        for execution in index.executions[_id(job.job_number)]:
            row = index.rows.get(execution.token)
            ran_on_ns = execution.last_ns - job.cancelled_ns
            if ran_on_ns > allowed_ns and not (row is not None and _broken_meanwhile(index, row, job)):
                yield Violation(
                    Kind.IGNORED_CANCEL,
                    f"{_id(job.job_number)}, lease {execution.token}: ran on for {ran_on_ns // SECOND_NS} s",
                )


def _broken_meanwhile(index: _Index, row: AttemptRow, job: Submitted) -> bool:
    assert job.cancelled_ns is not None
    return any(fault.to_ns + AFTERMATH_NS >= job.cancelled_ns for fault in index.faults_near(row))


def _logs_are_exact(index: _Index) -> Iterator[Violation]:
    for row in index.history.attempts:
        job, ran = index.submitted.get(row.job_number), index.by_token.get(row.lease_id)
        log = index.history.logs.get(row.lease_id)
        stdout = b"" if log is None else log.stdout
        where = f"{_id(row.job_number)}, lease {row.lease_id}, {row.outcome.name}"
        if job is None or (ran is None and not stdout):
            continue
        if log is not None and log.gaps:
            yield Violation(Kind.LOG, f"{where}: {log.gaps} gaps")
        whole = printed(row.lease_id, job.lines)
        if not whole.startswith(stdout):
            yield Violation(Kind.LOG, f"{where}: other bytes than were written")
        elif ran is None or len(stdout) > ran.tried:
            tried = 0 if ran is None else ran.tried
            yield Violation(Kind.LOG, f"{where}: {len(stdout)} bytes stored, at most {tried} written")
        elif len(stdout) < ran.written and row.logs_truncated_at is None:
            said = f"{len(stdout)} bytes stored, {ran.written} written"
            if row.outcome not in (Outcome.WITHDRAWN, Outcome.REJECTED):
                yield Violation(Kind.LOG, f"{where}: {said}, and nothing says that it was cut")
        elif len(stdout) < ran.written and row.outcome in _BY_ITSELF and not any(index.faults_near(row)):
            yield Violation(Kind.LOG, f"{where}: cut at {row.logs_truncated_at} though nothing was broken")


def _nothing_is_shared(index: _Index) -> Iterator[Violation]:
    of_gpu: dict[str, list[Execution]] = defaultdict(list)
    for execution in index.history.executions:
        for gpu in execution.gpus:
            of_gpu[gpu].append(execution)
    for gpu, executions in of_gpu.items():
        by_start = sorted(executions, key=lambda one: one.started_ns)
        for earlier, later in itertools.pairwise(by_start):
            if later.started_ns <= earlier.last_ns:
                yield Violation(Kind.SHARED, f"{gpu} was used by {earlier.token} and {later.token} at once")
    for agent_id, slots in index.history.slots.items():
        peak = _peak(_on_agent(index, agent_id))
        if peak > slots:
            yield Violation(Kind.SHARED, f"agent {agent_id} with {slots} CPUs ran jobs for {peak} at once")


def _on_agent(index: _Index, agent_id: str) -> Iterator[tuple[int, int, int]]:
    """Yields (first, last sign of life, CPUs) of what an agent ran."""
    for execution in index.history.executions:
        row = index.rows.get(execution.token)
        if row is not None and row.agent_id == agent_id and row.job_number in index.submitted:
            ran_on = index.ran_on(execution, execution.last_ns)
            last_ns = min(execution.last_ns, row.ended_ns) if ran_on else execution.last_ns
            yield execution.started_ns, last_ns, index.submitted[row.job_number].cpu


def _peak(lives: Iterable[tuple[int, int, int]]) -> int:
    changes = [change for first, last, cpu in lives for change in ((first, cpu), (last, -cpu))]
    return max(itertools.accumulate(cpu for _, cpu in sorted(changes)), default=0)


def _nothing_is_left(index: _Index) -> Iterator[Violation]:
    if index.history.held_gpus:
        yield Violation(Kind.LEAKED, f"{index.history.held_gpus} GPUs are still held")
    for process in index.history.leaked:
        yield Violation(Kind.LEAKED, f"still runs: {process}")


def _id(job_number: int) -> str:
    return encode_job_id(job_number)


def _leases(rows: Sequence[AttemptRow]) -> list[int]:
    return [row.lease_id for row in rows]
