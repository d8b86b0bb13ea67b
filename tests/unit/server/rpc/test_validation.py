"""Checking batches: in slices, with the places of the whole batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from lessor.v1 import job_pb2
from lessor.v1 import job_service_pb2 as pb
from lessor_server.domain.errors import InvalidField
from lessor_server.rpc.validation import MAX_SPECS, check_specs


def a_spec() -> job_pb2.JobSpec:
    return job_pb2.JobSpec(command=job_pb2.Command(argv=["/bin/true"]))


def slow_to_check() -> job_pb2.JobSpec:
    """A valid spec of which the compiled rules are not sure."""
    return job_pb2.JobSpec(command=job_pb2.Command(argv=["/bin/true"], env={"MY_LESSOR_X": ""}))


async def refused(request: pb.SubmitJobsRequest) -> list[str]:
    with pytest.raises(InvalidField) as error:
        await check_specs(request)
    return [field for field, _ in error.value.violations]


@pytest.mark.parametrize("make", [a_spec, slow_to_check])
async def test_a_batch_of_ten_thousand_lets_others_have_their_turn(make: Callable[[], job_pb2.JobSpec]) -> None:
    request = pb.SubmitJobsRequest(specs=[make()] * MAX_SPECS)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(other())
    try:
        await check_specs(request)
    finally:
        beside.cancel()
    assert turns >= MAX_SPECS / 250 - 1


async def test_places_are_those_of_the_whole_batch() -> None:
    request = pb.SubmitJobsRequest(specs=[a_spec()] * 1000)
    request.specs[600].name = "a\nb"
    request.specs[601].command.argv.append("\0")
    assert await refused(request) == ["specs[600].name", "specs[601].command.argv[1]"]


async def test_what_is_wrong_with_the_request_itself_is_told_with_the_first_specs() -> None:
    request = pb.SubmitJobsRequest(request_id="x" * 129, specs=[a_spec()] * 300)
    assert await refused(request) == ["request_id"]
    request.specs[7].name = "a\nb"
    assert sorted(await refused(request)) == ["request_id", "specs[7].name"]
    request.request_id = "\0"
    assert sorted(await refused(request)) == ["request_id", "specs[7].name"]


async def test_no_spec_at_all() -> None:
    assert await refused(pb.SubmitJobsRequest()) == ["specs"]


async def test_valid_batches() -> None:
    await check_specs(pb.SubmitJobsRequest(specs=[a_spec()]))
    await check_specs(pb.SubmitJobsRequest(request_id="r", specs=[slow_to_check(), a_spec()] * 300))
