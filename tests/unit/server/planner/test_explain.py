"""Explanations: each reason, its words, numbers and remedy."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lessor.v1 import job_service_pb2
from lessor_server.domain.shape import Selector, SelectorOperator, Shape
from lessor_server.domain.states import JobState
from lessor_server.planner.describe import bytes_text, cpus_text, duration_text, names_text
from lessor_server.planner.explain import Subject, explain
from lessor_server.planner.model import Agent, Group, Policy, Queue
from lessor_server.planner.reasons import PendingReason, Reason
from tests.unit.server.planner.worlds import (
    A100,
    GIB,
    agents,
    busy_fleets,
    can_ever,
    make_agent,
    make_gpus,
    make_group,
    make_shape,
    shapes,
)

ZONE_A = Selector("zone", SelectorOperator.IN, ("a",))


def subject(shape: Shape, **changes: object) -> Subject:
    return replace(Subject(100, JobState.QUEUED, 1, 1, shape, 0, 100), **changes)  # type: ignore[arg-type]


def explained(
    job: Subject, fleet: list[Agent], *groups: Group, queue: Queue | None = None, max_offers: int = 64
) -> list[Reason]:
    queues = {1: queue or Queue(1, "train"), 2: Queue(2, "other")}
    return explain(job, fleet, groups, queues, Policy(max_offers))


def test_the_numbers_are_those_of_the_proto() -> None:
    proto = dict(job_service_pb2.PendingReason.items())
    assert proto.pop("PENDING_REASON_UNSPECIFIED") == 0
    assert {f"PENDING_REASON_{reason.name}": reason.value for reason in PendingReason} == proto


@pytest.mark.parametrize("state", [JobState.RUNNING, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED])
def test_what_runs_or_is_over_is_not_pending(state: JobState) -> None:
    [reason] = explained(subject(make_shape(), state=state), [])
    assert reason.reason is PendingReason.NOT_PENDING
    assert state.name in reason.message


def test_a_leased_job_prepares_its_start() -> None:
    [reason] = explained(subject(make_shape(), state=JobState.LEASED, agent="gpu1"), [])
    assert (reason.reason, reason.message) == (
        PendingReason.LEASED,
        "agent gpu1 has a lease for it and prepares the start",
    )


def test_a_job_with_room_is_starting() -> None:
    [reason] = explained(subject(make_shape(2)), [make_agent("a1", 2)])
    assert reason == Reason(
        PendingReason.STARTING,
        "agent a1 has room for it with 2 GPUs; it starts in the next planning cycle",
        numbers={"gpus": 2},
    )


def test_room_that_goes_to_jobs_ahead_is_no_room() -> None:
    ahead = make_group(make_shape(1), 1, 2)
    assert explained(subject(make_shape(1)), [make_agent("a1", 3)], ahead)[0].reason is PendingReason.STARTING
    assert explained(subject(make_shape(1)), [make_agent("a1", 2)], ahead)[0].reason is PendingReason.FITS_BUT_BUSY
    urgent = subject(make_shape(1), priority=1)
    assert explained(urgent, [make_agent("a1", 2)], ahead)[0].reason is PendingReason.STARTING


def test_backoff_decides_and_what_else_is_wrong_is_told() -> None:
    job = subject(
        make_shape(),
        backoff_left=timedelta(seconds=2.5),
        failures=1,
        max_failures=3,
        last_error="exit code 1",
    )
    [reason] = explained(job, [make_agent("a1")])
    assert reason.reason is PendingReason.BACKOFF
    assert reason.message == "it is tried again in 2.5 s after failure 1 of at most 3; the last attempt: exit code 1"
    assert reason.numbers == {"backoff_left_ms": 2500, "failures": 1, "max_failures": 3}
    told = explained(job, [], queue=Queue(1, "train", paused=True))
    assert [reason.reason for reason in told] == [
        PendingReason.BACKOFF,
        PendingReason.QUEUE_PAUSED,
        PendingReason.NO_AGENT_CONNECTED,
    ]


@pytest.mark.parametrize("left", [timedelta(0), timedelta(seconds=-1), None])
def test_a_backoff_that_is_over_is_no_reason(left: timedelta | None) -> None:
    assert explained(subject(make_shape(), backoff_left=left), [make_agent("a1")])[0].reason is PendingReason.STARTING


def test_a_paused_queue() -> None:
    [reason] = explained(subject(make_shape()), [make_agent("a1")], queue=Queue(1, "train", paused=True))
    assert reason == Reason(PendingReason.QUEUE_PAUSED, "queue 'train' is paused", "resume queue 'train'")


@pytest.mark.parametrize(
    ("queue", "message", "remedy", "numbers"),
    [
        (
            Queue(1, "train", max_running=5, running=5),
            "queue 'train' runs 5 of at most 5 jobs (max_running)",
            "wait for one of its jobs to end, or raise max_running of queue 'train'",
            {"running": 5, "max_running": 5},
        ),
        (
            Queue(1, "train", max_running=0),
            "queue 'train' runs 0 of at most 0 jobs (max_running)",
            "raise max_running of queue 'train'",
            {"running": 0, "max_running": 0},
        ),
        (
            Queue(1, "train", max_gpus=8, gpus=6),
            "queue 'train' holds 6 of at most 8 GPUs (max_gpus), the job needs 4",
            "wait for one of its jobs to end, or raise max_gpus of queue 'train' to at least 10",
            {"gpus": 6, "max_gpus": 8, "gpus_needed": 4},
        ),
        (
            Queue(1, "train", max_gpus=2),
            "the job needs 4 GPUs, queue 'train' may hold at most 2 (max_gpus)",
            "ask for at most 2 GPUs, or raise max_gpus of queue 'train' to at least 4",
            {"gpus": 0, "max_gpus": 2, "gpus_needed": 4},
        ),
    ],
)
def test_queue_limits(queue: Queue, message: str, remedy: str, numbers: dict[str, int]) -> None:
    [reason] = explained(subject(make_shape(4)), [make_agent("a1", 8)], queue=queue)
    assert reason == Reason(PendingReason.QUEUE_LIMIT, message, remedy, numbers)


def test_a_queue_limit_counts_the_jobs_that_go_first() -> None:
    ahead = make_group(make_shape(), 1, 2, shape_id=2)
    [reason] = explained(subject(make_shape()), [make_agent("a1")], ahead, queue=Queue(1, "train", max_running=2))
    assert reason.message == "queue 'train' runs 2 of at most 2 jobs (max_running)"


def test_no_agent() -> None:
    [never] = explained(subject(make_shape()), [])
    assert (never.reason, never.message, never.remedy) == (
        PendingReason.NO_AGENT_CONNECTED,
        "no agent has ever connected",
        "start an agent",
    )
    [gone] = explained(subject(make_shape()), [make_agent("a1", fresh=False), make_agent("a2", fresh=False)])
    assert gone.message == "none of 2 known agents is connected (a1, a2)"
    assert gone.numbers == {"agents_known": 2}


def test_no_agent_with_the_runtime() -> None:
    fleet = [make_agent("a1"), make_agent("a2", runtimes=frozenset({"docker", "process"}), fresh=False)]
    [reason] = explained(subject(make_shape(runtime="docker")), fleet)
    assert reason.reason is PendingReason.NO_AGENT_WITH_RUNTIME
    assert reason.message == (
        "the only connected agent (a1) does not have runtime 'docker'; a2 would fit but is not connected"
    )
    assert reason.remedy == "start an agent with runtime 'docker', or use one there is (process)"
    assert reason.numbers == {"agents": 1, "agents_disconnected_fitting": 1}


def test_no_agent_fits_ever_counts_what_each_lacks() -> None:
    fleet = [make_agent(f"a{number}", 4) for number in (1, 2, 3)]
    fleet.append(make_agent("b1", 8, labels={"zone": "b"}))
    [reason] = explained(subject(make_shape(8, selectors=(ZONE_A,))), fleet)
    assert reason.reason is PendingReason.NO_AGENT_FITS_EVER
    assert reason.message == "0 of 4 agents fit: 3 have fewer than 8 GPUs, 1 does not match selector zone=a"
    assert reason.remedy == "ask for at most 4 GPUs"
    assert reason.numbers == {
        "agents": 4,
        "agents_fitting": 0,
        "agents_disconnected_fitting": 0,
        "lacking_gpus": 3,
        "lacking_selector": 1,
        "gpus_at_most": 4,
    }


def test_the_remedy_is_for_the_agent_that_lacks_the_fewest_things() -> None:
    far = make_agent("a1", 4, labels={"zone": "b"})
    near = make_agent("a2", 8, labels={"zone": "b"})
    [reason] = explained(subject(make_shape(8, selectors=(ZONE_A,))), [far, near])
    assert reason.message == "0 of 2 agents fit: 2 do not match selector zone=a"
    assert reason.remedy == "drop selector zone=a"


def test_drained_agents_that_would_fit_are_named() -> None:
    [reason] = explained(subject(make_shape(8)), [make_agent("a1", 8, drained=True), make_agent("a2", 4)])
    assert reason.message == "0 of 2 agents fit: 1 has fewer than 8 GPUs, 1 is drained (a1)"
    assert reason.remedy == "undrain agent a1"


@pytest.mark.parametrize(
    ("shape", "agent", "message", "remedy", "numbers"),
    [
        (make_shape(1), {}, "has no GPU", "add an agent with 1 GPU", {}),
        (
            make_shape(2, gpu_model="B300"),
            {"gpus": make_gpus("a1", 8)},
            "has fewer than 2 GPUs of model 'b300'",
            "ask for another GPU model (a1 has NVIDIA H200)",
            {},
        ),
        (
            make_shape(4, gpu_model="H200"),
            {"gpus": make_gpus("a1", 2) + make_gpus("x", 6, A100, 80)},
            "has fewer than 4 GPUs of model 'h200'",
            "ask for at most 2 GPUs, or for another GPU model (a1 has NVIDIA A100-SXM4-40GB, NVIDIA H200)",
            {"gpus_at_most": 2},
        ),
        (
            make_shape(2, gpu_memory_bytes=80 * GIB),
            {"gpus": make_gpus("a1", 8, A100, 40)},
            "has fewer than 2 GPUs with 80 GiB of memory",
            "ask for at most 40 GiB of memory per GPU",
            {"gpu_memory_bytes_at_most": 40 * GIB},
        ),
        (
            make_shape(4, gpu_model="B300", gpu_memory_bytes=80 * GIB),
            {"gpus": make_gpus("a1", 2, A100, 40)},
            "has fewer than 4 GPUs of model 'b300'",
            "ask for another GPU model (a1 has NVIDIA A100-SXM4-40GB) and at most 40 GiB of memory per GPU "
            "and at most 2 GPUs",
            {"gpu_memory_bytes_at_most": 40 * GIB, "gpus_at_most": 2},
        ),
        (
            make_shape(cpu_millis=20_000),
            {},
            "has fewer than 20 CPUs",
            "ask for at most 16 CPUs",
            {"cpu_millis_at_most": 16_000},
        ),
        (
            make_shape(memory_bytes=65 * GIB),
            {},
            "has less than 65 GiB of memory",
            "ask for at most 64 GiB of memory",
            {"memory_bytes_at_most": 64 * GIB},
        ),
        (
            make_shape(needs_user=True),
            {"can_set_user": frozenset()},
            "has a runtime 'process' that cannot run jobs as another user",
            "leave out the user, or run agent a1 as root",
            {},
        ),
        (
            make_shape(max_heartbeat_ms=2500),
            {},
            "has a heartbeat interval over 2.5 s",
            "use a ttl of at least 20 s",
            {"ttl_ms_at_least": 20_000},
        ),
        (
            make_shape(cpu_millis=20_000, selectors=(Selector("spot", SelectorOperator.NOT_EXISTS),)),
            {"labels": {"spot": ""}},
            "does not match selector !spot",
            "drop selector !spot and ask for at most 16 CPUs",
            {"cpu_millis_at_most": 16_000},
        ),
    ],
)
def test_what_an_agent_lacks_and_what_would_help(
    shape: Shape, agent: dict[str, object], message: str, remedy: str, numbers: dict[str, int]
) -> None:
    [reason] = explained(subject(shape), [replace(make_agent("a1"), **agent)])  # type: ignore[arg-type]
    assert reason.reason is PendingReason.NO_AGENT_FITS_EVER
    assert reason.message == f"0 of 1 agent fits: 1 {message}"
    assert reason.remedy == remedy
    assert numbers.items() <= reason.numbers.items()
    assert {name for name in reason.numbers if name.endswith(("_at_most", "_at_least"))} == set(numbers)


def test_agents_that_fit_but_are_busy() -> None:
    fleet = [
        make_agent("a1", 8, gpus_used=frozenset(f"GPU-a1-{index}" for index in range(7))),
        make_agent("a2", 2, gpus_used=frozenset({"GPU-a2-0", "GPU-a2-1"})),
        make_agent("a3", 2, drained=True),
        make_agent("a4"),
    ]
    [reason] = explained(subject(make_shape(2), ahead=5), fleet)
    assert reason.reason is PendingReason.FITS_BUT_BUSY
    assert reason.message == (
        "2 agents fit but have no room now: a1 has 1 of the 2 GPUs needed free; "
        "a2 has 0 of the 2 GPUs needed free; 5 jobs go first; a3 would fit but is drained"
    )
    assert reason.remedy == "wait for a lease to end, or ask for at most 1 GPU to start on a1 now"
    assert reason.numbers == {
        "agents_fitting": 2,
        "agents_drained_fitting": 1,
        "jobs_ahead": 5,
        "gpus_needed": 2,
        "gpus_free_at_most": 1,
        "gpus_at_most": 1,
    }


def test_cpu_and_memory_that_are_in_use() -> None:
    agent = make_agent("a1", cpu_millis_used=15_500, memory_bytes_used=63 * GIB)
    [reason] = explained(subject(make_shape(memory_bytes=2 * GIB), ahead=1), [agent])
    assert reason.message == (
        "1 agent fits but has no room now: a1 has 0.5 CPUs free of the 1 CPU needed and "
        "1 GiB of memory free of the 2 GiB needed; 1 job goes first"
    )
    assert reason.remedy == (
        "wait for a lease to end, or ask for at most 0.5 CPUs and 1 GiB of memory to start on a1 now"
    )
    assert reason.numbers["cpu_millis_at_most"] == 500


def test_an_agent_with_too_many_offers_needs_only_time() -> None:
    [reason] = explained(subject(make_shape()), [make_agent("a1", offers=2)], max_offers=2)
    assert reason.message == "1 agent fits but has no room now: a1 has as many offers to accept as it may have"
    assert reason.remedy == "wait for a lease to end, or add an agent"


def test_many_agents_are_counted_not_listed() -> None:
    fleet = [make_agent(f"a{number}", cpu_millis_used=16_000) for number in range(9)]
    [reason] = explained(subject(make_shape()), fleet)
    assert "; and 4 more" in reason.message
    assert names_text(agent.name for agent in fleet) == "a0, a1, a2, a3, a4 and 4 more"


def test_a_paused_queue_does_not_hide_that_no_agent_fits() -> None:
    told = explained(subject(make_shape(9)), [make_agent("a1", 8)], queue=Queue(1, "train", paused=True, max_gpus=4))
    assert [reason.reason for reason in told] == [
        PendingReason.QUEUE_PAUSED,
        PendingReason.QUEUE_LIMIT,
        PendingReason.NO_AGENT_FITS_EVER,
    ]


def test_a_job_behind_the_candidates_is_explained_at_its_place() -> None:
    first = replace(make_group(make_shape(), 1, 2), waiting=1000)
    [reason] = explained(subject(make_shape(), ahead=999), [make_agent("a1", cpu_millis=2000)], first)
    assert reason.reason is PendingReason.FITS_BUT_BUSY
    assert reason.numbers["jobs_ahead"] == 999


def test_the_job_of_an_unknown_queue_crashes_loudly() -> None:
    with pytest.raises(KeyError):
        explained(subject(make_shape(), queue_id=3), [])


def test_units_read_well() -> None:
    assert [cpus_text(millis) for millis in (0, 250, 1000, 1500, 16_000)] == [
        "0 CPUs",
        "0.25 CPUs",
        "1 CPU",
        "1.5 CPUs",
        "16 CPUs",
    ]
    assert [bytes_text(size) for size in (0, 512, 1536, 80 * GIB, 80 * GIB - 1, 3 << 40)] == [
        "0 B",
        "512 B",
        "1.5 KiB",
        "80 GiB",
        "79.99 GiB",
        "3 TiB",
    ]
    assert [duration_text(ms) for ms in (1, 2500, 60_000, 150_000)] == ["0.001 s", "2.5 s", "60 s", "2.5 min"]


def changed(shape: Shape, reason: Reason) -> Shape:
    """Returns the shape with the remedy of ``reason`` applied, as far as it changes the job."""
    numbers = reason.numbers
    return replace(
        shape,
        gpu_count=min(shape.gpu_count, numbers.get("gpus_at_most", shape.gpu_count)),
        gpu_model="" if "ask for another GPU model" in reason.remedy else shape.gpu_model,
        gpu_memory_bytes=min(shape.gpu_memory_bytes, numbers.get("gpu_memory_bytes_at_most", shape.gpu_memory_bytes)),
        cpu_millis=min(shape.cpu_millis, numbers.get("cpu_millis_at_most", shape.cpu_millis)),
        memory_bytes=min(shape.memory_bytes, numbers.get("memory_bytes_at_most", shape.memory_bytes)),
        max_heartbeat_ms=max(shape.max_heartbeat_ms, numbers.get("ttl_ms_at_least", 0) // 4),
        needs_user=shape.needs_user and "leave out the user" not in reason.remedy,
        selectors=tuple(selector for selector in shape.selectors if f"drop selector {selector}" not in reason.remedy),
    )


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True).flatmap(lambda ids: st.tuples(*map(agents, ids))),
    shapes,
)
@settings(max_examples=60)
def test_the_remedy_of_a_job_that_never_fits_lets_it_fit(fleet: tuple[Agent, ...], shape: Shape) -> None:
    told = explained(subject(shape), list(fleet))
    if told[0].reason is not PendingReason.NO_AGENT_FITS_EVER:
        return
    [reason] = told
    assert reason.remedy
    counts = [count for name, count in reason.numbers.items() if name.startswith("lacking_")]
    assert sum(counts) == reason.numbers["agents"]
    if "add an agent" in reason.remedy or "add runtime" in reason.remedy:
        return
    undrained = [
        replace(agent, drained=agent.drained and f"undrain agent {agent.name}" not in reason.remedy) for agent in fleet
    ]
    assert any(can_ever(agent, changed(shape, reason)) for agent in undrained), reason


large_shapes = st.builds(
    make_shape,
    st.integers(0, 4),
    cpu_millis=st.sampled_from([250, 1000, 4000]),
    memory_bytes=st.sampled_from([0, 2 * GIB, 16 * GIB]),
)


@given(busy_fleets(), large_shapes, large_shapes)
@settings(max_examples=60)
def test_the_remedy_of_a_job_that_waits_for_room_lets_it_start(
    fleet: tuple[Agent, ...], ahead: Shape, shape: Shape
) -> None:
    group = make_group(ahead, 1, 2, queue_id=2, shape_id=2)
    told = explained(subject(shape), list(fleet), group, max_offers=3)
    if told[0].reason is not PendingReason.FITS_BUT_BUSY or " now" not in told[0].remedy:
        return
    smaller = subject(changed(shape, told[0]), shape_id=3)
    [reason] = explained(smaller, list(fleet), group, max_offers=3)
    assert reason.reason is PendingReason.STARTING
