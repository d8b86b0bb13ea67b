"""The Grant that an agent gets: a grace that agents older than the policies can keep."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from lessor import timing
from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import job_pb2
from lessor_server.sessions.convert import add_grant

TTL = timedelta(seconds=60)
OF_A_LATER_SERVER: Any = 9
"""A policy; agents stop what they do not know."""


def granted(on_lost: job_pb2.OnLeaseLost.ValueType, grace: timedelta) -> pb.Grant:
    spec = job_pb2.JobSpec(lease=job_pb2.LeasePolicy(on_lost=on_lost))
    spec.lease.grace.FromTimedelta(grace)
    row = {
        "job_id": 1, "lease_id": 2, "attempt": 1, "gpu_uuids": [], "cursor": None,
        "ttl_ms": TTL // timedelta(milliseconds=1), "spec": spec.SerializeToString(),
    }  # fmt: skip
    grants = pb.Grants()
    add_grant(grants, row)
    (grant,) = grants.grants
    assert grant.spec.lease.grace.ToTimedelta() == grace
    return grant


@pytest.mark.parametrize("on_lost", [*job_pb2.OnLeaseLost.values(), OF_A_LATER_SERVER])
def test_a_grace_that_the_ttl_has_no_room_for_is_shortened_for_who_stops_every_job(
    on_lost: job_pb2.OnLeaseLost.ValueType,
) -> None:
    longest = timing.longest_grace(TTL)
    for asked, given in (
        (timedelta(seconds=3), timedelta(seconds=3)),
        (longest - timedelta(milliseconds=1), longest - timedelta(milliseconds=1)),
        (longest, timing.default_grace(TTL)),
        (timedelta(minutes=10), timing.default_grace(TTL)),
    ):
        assert granted(on_lost, asked).grace.ToTimedelta() == given


@pytest.mark.parametrize("on_lost", [job_pb2.ON_LEASE_LOST_STOP, job_pb2.ON_LEASE_LOST_UNSPECIFIED])
def test_the_grace_of_a_job_that_is_stopped_is_as_submitted(on_lost: job_pb2.OnLeaseLost.ValueType) -> None:
    grace = timedelta(seconds=20, milliseconds=500)
    assert granted(on_lost, grace).grace.ToTimedelta() == grace
