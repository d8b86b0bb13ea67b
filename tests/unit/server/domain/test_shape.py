"""Shapes: equal needs are equal shapes; selectors; JSON and digests."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lessor.v1 import job_pb2
from lessor_server.domain.shape import Selector, SelectorOperator, Shape, max_heartbeat_ms

IN, NOT_IN = SelectorOperator.IN, SelectorOperator.NOT_IN
EXISTS, NOT_EXISTS = SelectorOperator.EXISTS, SelectorOperator.NOT_EXISTS

BASE = Shape(
    cpu_millis=1000,
    memory_bytes=0,
    gpu_count=1,
    gpu_model="H200",
    gpu_memory_bytes=1 << 30,
    selectors=(Selector("zone", IN, ("b", "a")), Selector("spot", NOT_EXISTS)),
    runtime="process",
    max_heartbeat_ms=15_000,
    needs_user=False,
)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
quantities = st.integers(min_value=0, max_value=1 << 50)
selectors = st.builds(
    Selector, texts, st.sampled_from([IN, NOT_IN]), st.lists(texts, min_size=1, max_size=3).map(tuple)
) | st.builds(Selector, texts, st.sampled_from([EXISTS, NOT_EXISTS]))
shapes = st.builds(
    Shape,
    cpu_millis=quantities,
    memory_bytes=quantities,
    gpu_count=st.integers(min_value=0, max_value=1024),
    gpu_model=texts,
    gpu_memory_bytes=quantities,
    selectors=st.lists(selectors, max_size=3).map(tuple),
    runtime=texts.filter(bool),
    max_heartbeat_ms=quantities,
    needs_user=st.booleans(),
)


@given(shapes)
def test_a_shape_survives_json(shape: Shape) -> None:
    again = Shape.from_json(json.loads(json.dumps(shape.to_json())))
    assert again == shape
    assert again.digest() == shape.digest()


@given(shapes, shapes)
def test_digests_are_equal_exactly_for_equal_shapes(left: Shape, right: Shape) -> None:
    assert (left.digest() == right.digest()) == (left == right)


@given(shapes)
def test_normalising_twice_changes_nothing(shape: Shape) -> None:
    assert replace(shape) == shape


def test_the_digest_never_changes() -> None:
    assert BASE.digest().hex() == "4b8b0bc7d7fc1300722768465874ec89828a0dd1af6d91f75fcf031ebeb435f9"


def test_equal_needs_are_equal_shapes() -> None:
    reordered = (
        Selector("spot", NOT_EXISTS),
        Selector("zone", IN, ("a", "b", "a")),
        Selector("spot", NOT_EXISTS),
    )
    assert replace(BASE, selectors=reordered, gpu_model="h200") == BASE
    no_gpu = replace(BASE, gpu_count=0)
    assert (no_gpu.gpu_model, no_gpu.gpu_memory_bytes) == ("", 0)


@pytest.mark.parametrize(
    "change",
    [
        {"cpu_millis": 999},
        {"memory_bytes": 1},
        {"gpu_count": 2},
        {"gpu_model": "h100"},
        {"gpu_memory_bytes": 5},
        {"selectors": ()},
        {"runtime": "docker"},
        {"max_heartbeat_ms": 1},
        {"needs_user": True},
    ],
)
def test_each_need_makes_another_shape(change: dict[str, object]) -> None:
    assert replace(BASE, **change).digest() != BASE.digest()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [({"gpu_count": -1}, "gpu_count must not be negative, got -1"), ({"runtime": ""}, "needs a runtime")],
)
def test_impossible_needs_are_refused(change: dict[str, object], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        replace(BASE, **change)  # type: ignore[arg-type]


def test_unknown_json_is_refused() -> None:
    with pytest.raises(KeyError):
        Shape.from_json({})
    data = BASE.to_json()
    data["selectors"][0]["operator"] = "GREATER"
    with pytest.raises(KeyError):
        Shape.from_json(data)


@pytest.mark.parametrize(
    ("selector", "text", "on_a", "on_c", "on_absent"),
    [
        (Selector("zone", IN, ("a",)), "zone=a", True, False, False),
        (Selector("zone", IN, ("b", "a")), "zone in (a,b)", True, False, False),
        (Selector("zone", NOT_IN, ("a",)), "zone!=a", False, True, True),
        (Selector("zone", NOT_IN, ("a", "b")), "zone notin (a,b)", False, True, True),
        (Selector("zone", EXISTS), "zone", True, True, False),
        (Selector("zone", NOT_EXISTS), "!zone", False, False, True),
    ],
)
def test_selectors(selector: Selector, text: str, on_a: bool, on_c: bool, on_absent: bool) -> None:
    assert str(selector) == text
    assert selector.matches({"zone": "a", "x": "y"}) is on_a
    assert selector.matches({"zone": "c"}) is on_c
    assert selector.matches({"x": "a"}) is on_absent


def test_a_selector_has_values_exactly_where_they_mean_something() -> None:
    with pytest.raises(ValueError, match="IN needs values"):
        Selector("zone", IN)
    with pytest.raises(ValueError, match="EXISTS takes no values"):
        Selector("zone", EXISTS, ("a",))


def test_operator_numbers_are_those_of_the_proto() -> None:
    proto = dict(job_pb2.SelectorOperator.items())
    assert proto.pop("SELECTOR_OPERATOR_UNSPECIFIED") == 0
    assert {f"SELECTOR_OPERATOR_{operator.name}": operator.value for operator in SelectorOperator} == proto


@pytest.mark.parametrize(
    ("model", "memory", "takes"),
    [
        ("NVIDIA H200", 1 << 30, True),
        ("nvidia h200 nvl", 2 << 30, True),
        ("NVIDIA H200", 1, False),
        ("H100", 1 << 40, False),
    ],
)
def test_gpus_match_by_part_of_the_model_and_memory(model: str, memory: int, takes: bool) -> None:
    assert BASE.takes_gpu(model, memory) is takes


def test_an_agent_must_renew_four_times_in_a_ttl() -> None:
    assert max_heartbeat_ms(timedelta(seconds=60)) == 15_000
    assert max_heartbeat_ms(timedelta(milliseconds=10_001)) == 2500
