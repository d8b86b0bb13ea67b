"""What a runtime is told of a grant: what becomes of the job when its lease is lost."""

from __future__ import annotations

from datetime import timedelta

import pytest

from lessor.v1 import job_pb2
from lessor_agent.runtimes.base import OnLost
from lessor_agent.supervisor import start_request
from tests.support.agent_core import a_grant, proto_duration

BOUND, ASKED = timedelta(seconds=10), timedelta(minutes=5)


@pytest.mark.parametrize(
    ("said", "can_freeze", "on_lost", "grace"),
    [
        (job_pb2.ON_LEASE_LOST_FREEZE, True, OnLost.FREEZE, ASKED),
        (job_pb2.ON_LEASE_LOST_FREEZE, False, OnLost.STOP, BOUND),
        (job_pb2.ON_LEASE_LOST_STOP, True, OnLost.STOP, BOUND),
        (job_pb2.ON_LEASE_LOST_CONTINUE, False, OnLost.CONTINUE, ASKED),
        # A server that does not know the policies, and one that knows more of them.
        (job_pb2.ON_LEASE_LOST_UNSPECIFIED, True, OnLost.STOP, BOUND),
        (77, True, OnLost.STOP, BOUND),
    ],
)
def test_a_policy_that_cannot_be_followed_stops_with_the_grace_that_fits(
    said: job_pb2.OnLeaseLost.ValueType, can_freeze: bool, on_lost: OnLost, grace: timedelta
) -> None:
    grant = a_grant(1, grace=BOUND)
    grant.spec.lease.on_lost = said
    grant.spec.lease.grace.CopyFrom(proto_duration(ASKED))
    request = start_request(grant, 0, can_freeze=can_freeze)
    assert (request.on_lost, request.grace) == (on_lost, grace)
