"""The checker on histories made by hand: a clean one, and one for each thing that can be wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lessor.ids import encode_job_id
from lessor.lifecycle import Outcome
from tests.chaos import workload
from tests.chaos.checker import AFTERMATH_NS, Kind, Violation, check
from tests.chaos.history import AttemptRow, Execution, Fault, History, StoredLog, Submitted, read_executions

pytestmark = pytest.mark.unit

S = 1_000_000_000
JOB = 1000
JOB_ID = encode_job_id(JOB)
SUCCEEDED, FAILED, CANCELLED = 4, 5, 6
LINES = 3


def submitted(**changes: Any) -> Submitted:
    return replace(Submitted("one", JOB, LINES, (0,)), **changes)


def execution(token: int, from_s: float, to_s: float, **changes: Any) -> Execution:
    """An execution that printed everything and ended with 0."""
    size = len(workload.printed(token, LINES))
    whole = Execution(
        token, JOB_ID, 1, (), int(from_s * S), int(to_s * S), 0, int(to_s * S), None, written=size, tried=size
    )
    return replace(whole, **changes)


def row(lease_id: int, outcome: Outcome, ended_s: float, **changes: Any) -> AttemptRow:
    """What the database says of an attempt."""
    ended_ns = int(ended_s * S)
    final = {Outcome.SUCCEEDED: SUCCEEDED, Outcome.CANCELLED: CANCELLED}.get(outcome)
    code = 0 if outcome is Outcome.SUCCEEDED else None
    granted_ns = ended_ns - S
    size = len(workload.printed(lease_id, LINES))
    made = AttemptRow(JOB, lease_id, "a", outcome, code, 0, "", final, granted_ns, ended_ns, size, None)
    return replace(made, **changes)


def log(token: int, cut: int | None = None) -> StoredLog:
    data = workload.printed(token, LINES)[:cut]
    return StoredLog(len(data), data, 0)


def history(**changes: Any) -> History:
    """A job that ran once and succeeded."""
    clean = History(
        submitted=[submitted()],
        stored_jobs={JOB: "one"},
        executions=[execution(7, 10, 11)],
        attempts=[row(7, Outcome.SUCCEEDED, 11)],
        logs={7: log(7)},
        unfinished={},
        slots={"a": 2},
    )
    return replace(clean, **changes)


def kinds(violations: list[Violation]) -> set[Kind]:
    return {violation.kind for violation in violations}


EXPIRED = row(7, Outcome.LOST, 30, error_type="LEASE_EXPIRED", logs_truncated_at=0, granted_ns=10 * S)
CUT_OFF = Fault("partition", "agent:0", 12 * S, 28 * S, agent_id="a")


def twice(**changes: Any) -> History:
    """A job whose first agent was cut off, and which then ran to its end on another."""
    first = execution(7, 10, 20, exit_code=None, ended_ns=None)
    again = history(
        executions=[first, execution(8, 31, 32, attempt=2)],
        attempts=[EXPIRED, row(8, Outcome.SUCCEEDED, 32, agent_id="b")],
        logs={7: log(7), 8: log(8)},
        faults=[CUT_OFF],
    )
    return replace(again, **changes)


def test_a_run_without_trouble_is_clean() -> None:
    assert check(history()) == []


def test_a_loss_with_a_cause_is_clean() -> None:
    assert check(twice()) == []


def test_executions_that_overlap_are_seen() -> None:
    late = execution(7, 10, 31.05, exit_code=None, ended_ns=None)
    (found,) = check(twice(executions=[late, execution(8, 31, 32, attempt=2)]))
    assert found.kind is Kind.OVERLAP
    assert found.text == f"{JOB_ID}: 7 and 8 lived together for 50 ms"


def test_what_continues_may_outlive_its_expired_lease_and_no_other() -> None:
    continues = submitted(continues=True)
    on = execution(7, 10, 40, exit_code=None, ended_ns=None)
    again = execution(8, 31, 32, attempt=2)
    assert check(twice(submitted=[continues], executions=[on, again])) == []
    # Its second attempt runs on the same agent, which has room for one: the first is not counted beside it.
    same = [EXPIRED, row(8, Outcome.SUCCEEDED, 32)]
    assert check(twice(submitted=[continues], executions=[on, again], attempts=same, slots={"a": 1})) == []
    too_soon = execution(8, 15, 16, attempt=2)
    assert Kind.OVERLAP in kinds(check(twice(submitted=[continues], executions=[on, too_soon])))
    for_ever = execution(7, 10, 30 + 2 * AFTERMATH_NS / S, exit_code=None, ended_ns=None)
    assert kinds(check(twice(submitted=[continues], executions=[for_ever, again]))) == {Kind.STRAY}
    given_back = [replace(EXPIRED, error_type="AGENT_STOPPED"), row(8, Outcome.SUCCEEDED, 32, agent_id="b")]
    assert Kind.OVERLAP in kinds(check(twice(submitted=[continues], executions=[on, again], attempts=given_back)))
    assert Kind.OVERLAP in kinds(check(twice(executions=[on, again])))


def test_a_lease_that_begins_twice_is_seen(tmp_path: Path) -> None:
    (tmp_path / "7.main").write_text("".join(f"start {at} {pid} - 1 {JOB_ID}\n" for at, pid in ((1, 11), (2, 12))))
    (twice_begun,) = read_executions(tmp_path)
    assert twice_begun.starts == 2
    whole = execution(7, 10, 11, starts=2)
    assert kinds(check(history(executions=[whole]))) == {Kind.OVERLAP}


def test_a_child_that_lives_on_is_an_overlap_too(tmp_path: Path) -> None:
    (tmp_path / "7.main").write_text(f"start 100 1 - 1 {JOB_ID}\ntick 200\nend 300 0\n")
    (tmp_path / "7.child0").write_text("start 110 2 - - -\ntick 900\ntick 95")
    (tmp_path / "notes.txt").write_text("not a diary")
    (found,) = read_executions(tmp_path)
    assert (found.last_ns, found.exit_code, found.ended_ns) == (900, 0, 300)


def test_an_accepted_job_that_is_not_there_is_lost() -> None:
    assert Kind.LOST_JOB in kinds(check(history(stored_jobs={})))


def test_a_job_that_never_ends_is_lost() -> None:
    assert kinds(check(history(attempts=[], unfinished={JOB: "RUNNING, lease 7"}))) == {Kind.LOST_JOB}


def test_a_job_in_no_table_is_lost() -> None:
    assert Kind.LOST_JOB in kinds(check(history(attempts=[], executions=[], logs={})))


def test_a_submit_that_made_two_jobs_is_seen() -> None:
    assert kinds(check(history(stored_jobs={JOB: "one", JOB + 1: "one"}))) == {Kind.DUPLICATE}


def test_a_job_that_ended_twice_is_seen() -> None:
    both = [row(7, Outcome.SUCCEEDED, 11), row(8, Outcome.SUCCEEDED, 13)]
    found = check(history(attempts=both, executions=[execution(7, 10, 11), execution(8, 12, 13, attempt=2)]))
    assert {Kind.DUPLICATE, Kind.RE_RUN} <= kinds(found)


@pytest.mark.parametrize(
    "changes",
    [
        {"exit_code": 3},
        {"signal": 9},
        {"outcome": Outcome.FAILED, "final_state": FAILED, "exit_code": 1},
        {"outcome": Outcome.TIMED_OUT, "final_state": FAILED},
        {"outcome": Outcome.CANCELLED, "final_state": CANCELLED},
        {"ended_ns": int(10.5 * S)},
    ],
)
def test_an_outcome_the_workload_does_not_know_is_wrong(changes: dict[str, Any]) -> None:
    assert Kind.WRONG_OUTCOME in kinds(check(history(attempts=[replace(row(7, Outcome.SUCCEEDED, 11), **changes)])))


def test_a_success_that_never_ran_is_wrong() -> None:
    assert kinds(check(history(executions=[], logs={}))) == {Kind.WRONG_OUTCOME}


def test_an_attempt_that_exits_otherwise_than_asked_is_wrong() -> None:
    assert kinds(check(history(submitted=[submitted(exits=(3, 0))]))) == {Kind.WRONG_OUTCOME}


def test_finished_work_that_its_own_agent_runs_again_is_a_re_run() -> None:
    on_the_same = row(8, Outcome.SUCCEEDED, 32)
    found = check(twice(executions=[execution(7, 10, 20), execution(8, 31, 32)], attempts=[EXPIRED, on_the_same]))
    assert kinds(found) == {Kind.RE_RUN}


def test_finished_work_that_another_agent_had_already_is_not() -> None:
    assert check(twice(executions=[execution(7, 10, 20), execution(8, 31, 32)])) == []


def test_finished_work_that_its_agent_gave_back_is_a_re_run() -> None:
    given_back = replace(EXPIRED, error_type="")
    ran = [execution(7, 10, 20), execution(8, 31, 32)]
    later = row(8, Outcome.SUCCEEDED, 32, agent_id="b")
    assert kinds(check(twice(executions=ran, attempts=[given_back, later]))) == {Kind.RE_RUN}


def test_a_loss_while_nothing_was_broken_has_no_cause() -> None:
    for fault in (
        replace(CUT_OFF, agent_id="b"),
        replace(CUT_OFF, to_ns=CUT_OFF.from_ns + S),
        replace(CUT_OFF, from_ns=0, to_ns=10 * S - AFTERMATH_NS - 1),
        replace(CUT_OFF, lease_id=99),
    ):
        assert kinds(check(twice(faults=[fault]))) == {Kind.UNEXPLAINED}


def test_a_killed_keeper_explains_the_loss_of_its_own_lease() -> None:
    at_once = Fault("keeper kill", "agent:0", 12 * S, 12 * S, agent_id="a", lease_id=7)
    assert check(twice(faults=[at_once])) == []


def test_a_cancelled_job_that_runs_on_is_seen() -> None:
    ran = execution(7, 10, 40)
    cancelled = submitted(cancelled_ns=12 * S)
    assert kinds(check(history(submitted=[cancelled], executions=[ran], attempts=[row(7, Outcome.SUCCEEDED, 40)]))) == {
        Kind.IGNORED_CANCEL
    }


@pytest.mark.parametrize(
    ("stored", "cut_at"),
    [
        (StoredLog(3, b"???", 0), None),
        (replace(log(7), gaps=1), None),
        (log(7, cut=-1), None),
        (log(7, cut=-1), 5),
        (StoredLog(0, log(7).stdout + b"more", 0), None),
    ],
)
def test_log_bytes_must_be_those_that_were_written(stored: StoredLog, cut_at: int | None) -> None:
    rows = [row(7, Outcome.SUCCEEDED, 11, logs_truncated_at=cut_at)]
    assert kinds(check(history(logs={7: stored}, attempts=rows))) == {Kind.LOG}


def test_a_token_that_is_older_than_the_one_before_is_seen() -> None:
    first, second = execution(8, 10, 20, exit_code=None, ended_ns=None), execution(7, 31, 32)
    assert Kind.TOKEN in kinds(check(twice(executions=[first, second])))


def test_an_execution_without_a_lease_is_seen() -> None:
    assert kinds(check(history(executions=[execution(7, 10, 11), execution(99, 12, 13)]))) == {Kind.TOKEN}


def test_a_gpu_that_two_jobs_use_at_once_is_seen() -> None:
    other = replace(execution(8, 10.5, 12), job_id=encode_job_id(JOB + 1), gpus=("GPU-1",))
    found = check(
        history(
            submitted=[submitted(), Submitted("two", JOB + 1, LINES, (0,))],
            stored_jobs={JOB: "one", JOB + 1: "two"},
            executions=[execution(7, 10, 11, gpus=("GPU-1", "GPU-2")), other],
            attempts=[row(7, Outcome.SUCCEEDED, 11), row(8, Outcome.SUCCEEDED, 12, job_number=JOB + 1)],
            logs={7: log(7), 8: log(8)},
        )
    )
    assert kinds(found) == {Kind.SHARED}


def test_an_agent_that_runs_more_than_it_has_room_for_is_seen() -> None:
    assert kinds(check(history(slots={"a": 0}))) == {Kind.SHARED}


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"held_gpus": 1}, Kind.LEAKED),
        ({"leaked": ["process 1 of lease 7"]}, Kind.LEAKED),
        ({"audit": ["job 1000: its end was taken back"]}, Kind.HISTORY),
    ],
)
def test_what_is_left_and_what_the_database_saw_is_told(changes: dict[str, Any], kind: Kind) -> None:
    assert kinds(check(history(**changes))) == {kind}


def test_the_workload_writes_what_the_checker_reads(tmp_path: Path) -> None:
    plan = '{"seconds": 0.12, "lines": 45, "exits": [3, 4], "children": 1, "linger": 0.1, "stubborn": false}'
    environment = {**os.environ, "LESSOR_FENCING_TOKEN": "77", "LESSOR_ATTEMPT": "2", "LESSOR_JOB_ID": JOB_ID}
    command = [sys.executable, "-I", "-S", workload.__file__, str(tmp_path), plan]
    # Its child holds the pipe, so that it has ended, too, when this returns.
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=30, check=False)
    assert done.returncode == 4
    assert done.stdout == workload.printed(77, 45)
    (found,) = read_executions(tmp_path)
    assert (found.token, found.job_id, found.attempt, found.exit_code) == (77, JOB_ID, 2, 4)
    assert found.written == found.tried == len(done.stdout)
    assert found.ended_ns is not None
    assert found.started_ns < found.ended_ns < found.last_ns
