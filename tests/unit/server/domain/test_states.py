"""Job states: every (state, event) pair, and the proto enum."""

from __future__ import annotations

from itertools import product

import pytest

from lessor.v1 import job_pb2
from lessor_server.domain.states import (
    TERMINAL,
    TRANSITIONS,
    InvalidTransition,
    JobEvent,
    JobState,
    advance,
    ending_event,
    mermaid,
)

ENDINGS = {
    JobEvent.SUCCEED: JobState.SUCCEEDED,
    JobEvent.FAIL: JobState.FAILED,
    JobEvent.CANCEL: JobState.CANCELLED,
    JobEvent.REQUEUE: JobState.QUEUED,
}
EXPECTED: dict[JobState, dict[JobEvent, JobState]] = {
    JobState.QUEUED: {
        JobEvent.GRANT: JobState.LEASED,
        JobEvent.FAIL: JobState.FAILED,
        JobEvent.CANCEL: JobState.CANCELLED,
        JobEvent.LATE_SUCCEED: JobState.SUCCEEDED,
        JobEvent.LATE_FAIL: JobState.FAILED,
        JobEvent.LATE_CANCEL: JobState.CANCELLED,
        JobEvent.LATE_REQUEUE: JobState.QUEUED,
    },
    JobState.LEASED: {JobEvent.RUN: JobState.RUNNING, **ENDINGS},
    JobState.RUNNING: ENDINGS,
    JobState.SUCCEEDED: {},
    JobState.FAILED: {},
    JobState.CANCELLED: {},
}


@pytest.mark.parametrize(("state", "event"), list(product(JobState, JobEvent)))
def test_every_pair(state: JobState, event: JobEvent) -> None:
    expected = EXPECTED[state].get(event)
    if expected is None:
        with pytest.raises(InvalidTransition, match=f"{state.name} cannot {event}"):
            advance(state, event)
    else:
        assert advance(state, event) is expected


def test_terminal_states_are_those_that_nothing_leaves() -> None:
    assert frozenset(JobState) - {source for source, _ in TRANSITIONS} == TERMINAL


def test_the_numbers_are_those_of_the_proto() -> None:
    proto = dict(job_pb2.JobState.items())
    assert proto.pop("JOB_STATE_UNSPECIFIED") == 0
    assert {f"JOB_STATE_{state.name}": state.value for state in JobState} == proto


@pytest.mark.parametrize("final", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, None])
def test_the_end_of_an_attempt_leads_where_it_says(final: JobState | None) -> None:
    target = JobState.QUEUED if final is None else final
    for leased in (JobState.LEASED, JobState.RUNNING):
        assert advance(leased, ending_event(final)) is target
    assert advance(JobState.QUEUED, ending_event(final, late=True)) is target


@pytest.mark.parametrize("state", sorted(frozenset(JobState) - TERMINAL))
def test_an_attempt_cannot_end_a_job_into_a_live_state(state: JobState) -> None:
    with pytest.raises(InvalidTransition, match=state.name):
        ending_event(state)


def test_the_diagram_has_every_transition_once() -> None:
    lines = mermaid().splitlines()
    assert lines[0] == "stateDiagram-v2"
    drawn = set()
    for line in lines[1:]:
        edge, _, events = line.strip().partition(": ")
        source, _, target = edge.partition(" --> ")
        if source == "[*]":
            assert (target, events) == ("QUEUED", "submit")
        elif target == "[*]":
            assert JobState[source] in TERMINAL
        else:
            for event in events.split(", "):
                assert (source, event, target) not in drawn
                drawn.add((source, event, target))
    assert drawn == {(source.name, event.value, target.name) for (source, event), target in TRANSITIONS.items()}
    assert len(lines) == len(set(lines))
