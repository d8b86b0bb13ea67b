"""A spec survives every form it takes."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lessor.errors import InvalidArgument
from lessor.sdk.selectors import LabelSelector, SelectorOperator
from lessor.sdk.specs import FIELD_NAMES, JobSpec
from lessor.v1 import job_pb2

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
mappings = st.dictionaries(texts, texts, max_size=4)
durations = st.none() | st.timedeltas(timedelta(0), timedelta(days=36500))
sizes = st.integers(0, 2**50)
keys = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,10}[A-Za-z0-9])?", fullmatch=True)
selectors = st.one_of(
    st.builds(LabelSelector, keys, st.sampled_from([SelectorOperator.EXISTS, SelectorOperator.NOT_EXISTS])),
    st.builds(
        LabelSelector,
        keys,
        st.sampled_from([SelectorOperator.IN, SelectorOperator.NOT_IN]),
        st.lists(texts, min_size=1, max_size=3).map(tuple),
    ),
)
specs = st.builds(
    JobSpec,
    argv=st.lists(texts.filter(bool), min_size=1, max_size=4).map(tuple),
    name=texts,
    queue=texts,
    labels=mappings,
    runtime=texts,
    env=mappings,
    working_dir=texts,
    user=texts,
    cpu_millis=st.none() | st.integers(0, 10**9),
    memory_bytes=sizes,
    gpus=st.integers(0, 1024),
    gpu_model=texts,
    gpu_memory_bytes=sizes,
    selectors=st.lists(selectors, max_size=3).map(tuple),
    priority=st.integers(-1000, 1000),
    max_failures=st.integers(0, 1000),
    max_losses=st.integers(0, 1000),
    backoff=durations,
    backoff_max=durations,
    timeout=durations,
    queue_timeout=durations,
    start_timeout=durations,
    ttl=durations,
    grace=durations,
    on_lease_lost=st.sampled_from(["", "freeze", "stop", "continue"]),
    dedupe_key=texts,
)


@settings(max_examples=100)
@given(specs)
def test_a_spec_survives_the_wire_and_json(spec: JobSpec) -> None:
    message = job_pb2.JobSpec.FromString(spec.to_proto().SerializeToString())
    from_wire = JobSpec.from_proto(message)
    assert from_wire == spec
    assert JobSpec.from_dict(json.loads(json.dumps(from_wire.to_dict()))) == spec


def test_quantities_as_people_write_them() -> None:
    spec = JobSpec.of(
        ["python", "train.py"],
        cpu="500m",
        memory="4GiB",
        gpus=2,
        gpu_memory="80GiB",
        selectors=["gpu", "zone in (a,b)"],
        timeout="1h30m",
        backoff=2,
        grace=timedelta(seconds=5),
        env={"A": "1"},
        working_dir=Path("/data"),
    )
    assert spec.cpu_millis == 500
    assert spec.memory_bytes == 4 * 2**30
    assert spec.timeout == timedelta(minutes=90)
    assert spec.backoff == timedelta(seconds=2)
    assert spec.working_dir == "/data"
    assert spec.to_dict()["selectors"] == ["gpu", "zone in (a,b)"]


def test_a_command_line_is_split_without_a_shell() -> None:
    assert JobSpec.of("python train.py --name 'a b'").argv == ("python", "train.py", "--name", "a b")
    with pytest.raises(InvalidArgument, match=r"needs a shell for '\|'.*sh.*-c"):
        JobSpec.of("cat x | wc")
    with pytest.raises(InvalidArgument, match="cannot be split"):
        JobSpec.of("echo 'x")


def test_every_wrong_field_is_named() -> None:
    with pytest.raises(InvalidArgument) as error:
        JobSpec.from_dict(
            {
                "command": [],
                "gpus": -1,
                "memory": "4gib",
                "env": {"A": 1},
                "gpu": 1,
                "workdir": "/",
                "zzz": 1,
                "priority": "1",
            }
        )
    violations = error.value.violations
    assert "names no program" in violations["command"]
    assert violations["gpus"] == "-1 is negative; give 0 or more"
    assert "4GiB" in str(violations["memory"]) or "unknown unit" in violations["memory"]
    assert "in quotes" in violations["env.A"]
    assert violations["gpu"] == "unknown field; did you mean 'gpus'?"
    assert "working_dir" in violations["workdir"]
    assert all(name in violations["zzz"] for name in FIELD_NAMES)
    assert "whole number" in violations["priority"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"argv": ["a"]}, "command"),
        ({"argv": ("a", "b\0")}, "command[1]"),
        ({"name": "\ud800"}, "name"),
        ({"name": 3}, "name"),
        ({"gpus": True}, "gpus"),
        ({"gpus": 2**31}, "gpus"),
        ({"memory_bytes": -1}, "memory"),
        ({"timeout": 3}, "timeout"),
        ({"ttl": timedelta(seconds=-1)}, "ttl"),
        ({"selectors": ("gpu",)}, "selectors[0]"),
        ({"labels": {"a": None}}, "labels.a"),
    ],
)
def test_a_spec_that_could_not_be_sent_is_refused(change: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        replace(JobSpec(("a",)), **change)  # type: ignore[arg-type]
    assert list(error.value.violations) == [field]


def test_a_missing_command_is_told() -> None:
    with pytest.raises(InvalidArgument, match="command: is missing"):
        JobSpec.from_dict({"name": "x"})


def test_the_environment_is_not_in_the_repr() -> None:
    assert "hunter2" not in repr(JobSpec.of(["a"], env={"PASSWORD": "hunter2"}))
