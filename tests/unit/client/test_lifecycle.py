"""Lease phases: every (phase, event) pair, and the proto enums."""

from __future__ import annotations

from itertools import product

import pytest

from lessor.lifecycle import (
    LEASE_TRANSITIONS,
    InvalidTransition,
    LeaseEvent,
    LeasePhase,
    Outcome,
    advance,
    outcome_without_word,
)
from lessor.v1 import job_pb2

EXPECTED = {
    LeasePhase.OFFERED: {
        LeaseEvent.ACCEPT: LeasePhase.ACCEPTED,
        LeaseEvent.RUN: LeasePhase.RUNNING,
        LeaseEvent.END: LeasePhase.DRAINING,
        LeaseEvent.REJECT: LeasePhase.ENDED,
        LeaseEvent.RELEASE: LeasePhase.ENDED,
        LeaseEvent.EXPIRE: LeasePhase.ENDED,
    },
    LeasePhase.ACCEPTED: {
        LeaseEvent.RUN: LeasePhase.RUNNING,
        LeaseEvent.END: LeasePhase.DRAINING,
        LeaseEvent.RELEASE: LeasePhase.ENDED,
        LeaseEvent.EXPIRE: LeasePhase.ENDED,
    },
    LeasePhase.RUNNING: {
        LeaseEvent.END: LeasePhase.DRAINING,
        LeaseEvent.RELEASE: LeasePhase.ENDED,
        LeaseEvent.EXPIRE: LeasePhase.ENDED,
    },
    LeasePhase.DRAINING: {
        LeaseEvent.LOGS_COMPLETE: LeasePhase.ENDED,
        LeaseEvent.RELEASE: LeasePhase.ENDED,
        LeaseEvent.EXPIRE: LeasePhase.ENDED,
    },
    LeasePhase.ENDED: {},
}


@pytest.mark.parametrize(("phase", "event"), list(product(LeasePhase, LeaseEvent)))
def test_every_pair(phase: LeasePhase, event: LeaseEvent) -> None:
    expected = EXPECTED[phase].get(event)
    if expected is None:
        with pytest.raises(InvalidTransition, match=f"{phase.name} cannot {event}"):
            advance(phase, event)
    else:
        assert advance(phase, event) is expected


def test_a_lease_never_goes_back() -> None:
    assert all(target > source for (source, _), target in LEASE_TRANSITIONS.items())


def test_every_live_phase_can_expire_and_the_end_is_the_end() -> None:
    for phase in LeasePhase:
        assert ((phase, LeaseEvent.EXPIRE) in LEASE_TRANSITIONS) == (phase is not LeasePhase.ENDED)
    assert not [source for source, _ in LEASE_TRANSITIONS if source is LeasePhase.ENDED]


@pytest.mark.parametrize(
    ("ours", "theirs", "prefix"),
    [(LeasePhase, job_pb2.LeasePhase, "LEASE_PHASE_"), (Outcome, job_pb2.Outcome, "OUTCOME_")],
)
def test_the_numbers_are_those_of_the_proto(
    ours: type[LeasePhase] | type[Outcome], theirs: type[LeasePhase], prefix: str
) -> None:
    proto = dict(theirs.items())  # type: ignore[attr-defined]
    assert proto.pop(f"{prefix}UNSPECIFIED") == 0
    assert {f"{prefix}{member.name}": member.value for member in ours} == proto


@pytest.mark.parametrize("phase", [LeasePhase.OFFERED, LeasePhase.ACCEPTED, LeasePhase.RUNNING])
def test_only_an_offer_ends_at_no_cost(phase: LeasePhase) -> None:
    expected = Outcome.WITHDRAWN if phase is LeasePhase.OFFERED else Outcome.LOST
    assert outcome_without_word(phase) is expected
