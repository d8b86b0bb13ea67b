"""What a user submits and what a workload returns come back unchanged, through SDK, wire, server and database."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import lessor
from lessor import JobSpec, timing
from lessor.sdk.selectors import LabelSelector, SelectorOperator
from lessor.sdk.wire import duration_message
from lessor.v1 import agent_service_pb2 as pb
from tests.support.servers import Client, RawAgent, connected, ended, running_server

pytestmark = pytest.mark.integration

MAX_RESULT_BYTES = 256 * 1024
QUEUE = "a" + "b.c-d_e" * 8 + "f12345"
"""As long as a queue's name may be."""

# One server and one database for all examples: what is checked does not depend on what else is stored.
many = settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

anything = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
printable = st.characters(exclude_categories=["Cs", "Cc"])
texts = st.text(anything, max_size=30)
label_keys = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?", fullmatch=True)
label_values = st.text(anything, max_size=256)
milliseconds = timedelta(milliseconds=1)


def durations(low: timedelta, high: timedelta) -> st.SearchStrategy[timedelta | None]:
    """Absent, or any length to the microsecond, both ends included."""
    return st.none() | st.timedeltas(low, high) | st.sampled_from([low, high])


selectors = st.one_of(
    st.builds(LabelSelector, label_keys, st.sampled_from([SelectorOperator.EXISTS, SelectorOperator.NOT_EXISTS])),
    st.builds(
        LabelSelector,
        label_keys,
        st.sampled_from([SelectorOperator.IN, SelectorOperator.NOT_IN]),
        st.lists(label_values, min_size=1, max_size=4).map(tuple),
    ),
)


FREEZING = ("", "process")
"""Runtimes that can freeze a job; the first is the default, which is the second."""


@st.composite
def specs(draw: st.DrawFn) -> JobSpec:
    """Every spec the server takes: all fields, their bounds and the rules between them."""
    ttl = draw(durations(timing.MIN_TTL, timedelta(hours=1)))
    runtime = draw(
        st.sampled_from(["", "process"]) | st.from_regex(r"[a-z0-9]([a-z0-9_-]{0,30}[a-z0-9])?", fullmatch=True)
    )
    on_lease_lost = draw(st.sampled_from(["", "stop", "continue", *(["freeze"] if runtime in FREEZING else [])]))
    room = timedelta(minutes=10)
    if on_lease_lost == "stop" or (not on_lease_lost and runtime not in FREEZING):
        room = min(room, timing.longest_grace(ttl or timing.DEFAULT_TTL) - milliseconds)
    gpus = draw(st.integers(0, 1024))
    return JobSpec(
        argv=(draw(texts.filter(bool)), *draw(st.lists(texts, max_size=4))),
        name=draw(st.text(printable, max_size=128)),
        queue=draw(st.sampled_from(["", "default", QUEUE])),
        labels=draw(st.dictionaries(label_keys, label_values, max_size=4)),
        runtime=runtime,
        env=draw(st.dictionaries(_env_names(), texts, max_size=4)),
        working_dir=draw(st.just("") | texts.map(lambda text: f"/{text}")),
        user=draw(st.text(anything, max_size=64)),
        cpu_millis=draw(st.none() | st.integers(0, 10**9)),
        memory_bytes=draw(st.integers(0, 2**50)),
        gpus=gpus,
        gpu_model=draw(st.text(anything, max_size=128)) if gpus else "",
        gpu_memory_bytes=draw(st.integers(0, 2**50)) if gpus else 0,
        selectors=tuple(draw(st.lists(selectors, max_size=4))),
        priority=draw(st.integers(-1000, 1000)),
        max_failures=draw(st.integers(0, 1000)),
        max_losses=draw(st.integers(0, 1000)),
        backoff=draw(durations(timedelta(0), timedelta(days=1))),
        backoff_max=draw(durations(timedelta(0), timedelta(days=7))),
        timeout=draw(durations(milliseconds, timedelta(days=365))),
        # Long enough that it does not pass here: a job that failed gives its dedupe key up.
        queue_timeout=draw(durations(timedelta(hours=1), timedelta(days=365))),
        start_timeout=draw(durations(milliseconds, timedelta(days=1))),
        ttl=ttl,
        grace=draw(durations(timedelta(0), room)),
        on_lease_lost=on_lease_lost,
        dedupe_key=draw(texts),
    )


def _env_names() -> st.SearchStrategy[str]:
    names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,30}", fullmatch=True)
    return names.filter(lambda name: not name.startswith("LESSOR_"))


FULL = JobSpec(
    argv=("/bin/größe", "", "a b\n", "🚀", "\u202e", "\x7f"),
    name="Übung №1 🚀",
    labels={"team/a.b-c": "x" * 256, "0": ""},
    env={"A": "\t\n'\"\\$(", "_": ""},
    working_dir="/data/ÿ",
    user="someone",
    cpu_millis=0,
    memory_bytes=2**50,
    gpus=1024,
    gpu_model="h" * 128,
    gpu_memory_bytes=2**50,
    selectors=(LabelSelector("zone", SelectorOperator.IN, ("a, b", "(", "")),),
    priority=-1000,
    max_failures=1000,
    max_losses=1000,
    backoff=timedelta(0),
    backoff_max=timedelta(days=7),
    timeout=timedelta(days=365),
    queue_timeout=timedelta(days=364, microseconds=1),
    start_timeout=timedelta(days=1),
    ttl=timedelta(hours=1),
    grace=timedelta(minutes=10),
    on_lease_lost="continue",
    queue=QUEUE,
    dedupe_key="k" * 300,
)


def filled(spec: JobSpec, seen: JobSpec) -> JobSpec:
    """Returns ``spec`` with the defaults of the server, as the documentation of each field names them."""
    ttl = spec.ttl or timing.DEFAULT_TTL
    return replace(
        spec,
        name=spec.name or seen.name,
        queue=spec.queue or "default",
        runtime=spec.runtime or "process",
        cpu_millis=timing.DEFAULT_CPU_MILLIS if spec.cpu_millis is None else spec.cpu_millis,
        max_failures=spec.max_failures or timing.DEFAULT_MAX_FAILURES,
        max_losses=spec.max_losses or timing.DEFAULT_MAX_LOSSES,
        backoff=timing.DEFAULT_BACKOFF_INITIAL if spec.backoff is None else spec.backoff,
        backoff_max=timing.DEFAULT_BACKOFF_MAX if spec.backoff_max is None else spec.backoff_max,
        ttl=ttl,
        grace=timing.default_grace(ttl) if spec.grace is None else spec.grace,
        on_lease_lost=spec.on_lease_lost or ("freeze" if spec.runtime in FREEZING else "stop"),
    )


@dataclass
class World:
    """A server, a client as users have it, and an agent in the test's hands."""

    sdk: lessor.AsyncClient
    stubs: Client
    agent: RawAgent


@pytest.fixture
async def world(database_url: str) -> AsyncIterator[World]:
    async with (
        running_server(database_url) as server,
        connected(server) as stubs,
        lessor.AsyncClient(f"127.0.0.1:{server.port}", timeout=30) as sdk,
    ):
        # It says little by itself: a session that has not renewed for two intervals gets no job.
        agent = RawAgent(stubs, heartbeat_interval=duration_message(timedelta(seconds=10)))
        await agent.connect()
        await sdk.create_queue(QUEUE)
        yield World(sdk, stubs, agent)
        await agent.leave()


@many
@given(specs())
@example(FULL)
@example(JobSpec(argv=("/",)))
async def test_a_spec_comes_back_as_it_was_given(world: World, spec: JobSpec) -> None:
    # No agent has the label: the job stays where it is. A key would find the job of another example.
    nowhere = (*spec.selectors, LabelSelector("nowhere", SelectorOperator.EXISTS))
    kept = replace(spec, selectors=nowhere, dedupe_key=spec.dedupe_key and f"{spec.dedupe_key}{uuid.uuid4()}")
    submitted = await world.sdk.submit(kept)
    job = await world.sdk.get(submitted)
    assert job.spec == filled(kept, job.spec)
    assert job.spec.name, "a job has a name"
    (listed,) = [job async for job in world.sdk.list(limit=1)]
    assert listed.id == submitted.id
    assert listed.spec == job.spec
    # The JSON that `lessor show --json` prints and job files hold.
    text = json.dumps(job.to_dict())
    assert JobSpec.from_dict(json.loads(text)["spec"]) == job.spec
    # What was read back can be submitted, and is the same again.
    repeated = await world.sdk.submit(job.spec)
    assert repeated.existing == (repeated.id == submitted.id) == bool(kept.dedupe_key)
    again = await world.sdk.get(repeated)
    assert again.spec == job.spec
    await world.sdk.cancel({submitted.id, again.id})


async def test_the_agent_is_granted_what_was_submitted(world: World) -> None:
    spec = replace(FULL, gpus=0, gpu_model="", gpu_memory_bytes=0, memory_bytes=1, selectors=())
    submitted = await world.sdk.submit(spec)
    grant = await world.agent.grant()
    assert JobSpec.from_proto(grant.spec) == (await world.sdk.get(submitted)).spec == filled(spec, spec)
    await world.agent.run(grant)
    await world.agent.tell(grant, ended=ended())


json_texts = st.text(st.characters(), max_size=30)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | json_texts
    | st.sampled_from(
        [2**63, -(2**63) - 1, 2**200, 5e-324, 1.7976931348623157e308, -0.0, "\0", "\ud800", "\u202e🚀", ""]
    ),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(json_texts, inner, max_size=5),
    max_leaves=20,
)


async def returned(world: World, result: bytes) -> lessor.Job:
    """Runs a job that returns these bytes; returns it as the SDK reads it."""
    await world.agent.heartbeat()
    submitted = await world.sdk.submit(["/bin/true"])
    grant = await world.agent.grant()
    while grant.job_id != submitted.id:
        grant = await world.agent.grant()
    await world.agent.run(grant)
    await world.agent.tell(grant, ended=ended(exit_code=0, result_json=result))
    (job,) = await world.sdk.wait([submitted])
    return job


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same types: 1, 1.0 and True are three values."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


@many
@given(json_values, st.booleans())
@example([[[[[[[[]]]]]]]], True)
@example({"": {"": None}}, False)
async def test_a_result_comes_back_as_it_was_written(world: World, value: Any, ascii_only: bool) -> None:
    # A lone surrogate has no UTF-8 form: JSON can carry it only escaped.
    escaped = ascii_only or any("\ud800" <= char <= "\udfff" for char in json.dumps(value, ensure_ascii=False))
    written = json.dumps(value, ensure_ascii=escaped).encode()
    job = await returned(world, written)
    assert job.result_json == written
    assert same(job.result, value)
    assert same(json.loads(json.dumps(job.to_dict()))["result"], value)
    (attempt,) = await world.sdk.attempts(job.id)
    assert attempt.result_json == written


async def test_a_result_at_the_limit_comes_back_and_one_beyond_is_refused(world: World) -> None:
    largest = json.dumps("x" * (MAX_RESULT_BYTES - 2)).encode()
    assert len(largest) == MAX_RESULT_BYTES
    assert (await returned(world, largest)).result_json == largest
    submitted = await world.sdk.submit(["/bin/true"])
    grant = await world.agent.grant()
    assert grant.job_id == submitted.id
    await world.agent.run(grant)
    beyond = pb.Ended(outcome=ended().outcome, result_json=largest + b" ")
    await world.agent.event(grant, ended=beyond)
    with pytest.raises(Exception, match=r"result_json|INVALID_ARGUMENT"):
        await world.agent.next("ack")
    assert not (await world.sdk.get(submitted)).result_json
