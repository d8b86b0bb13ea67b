"""Quantities as people write them."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lessor.errors import InvalidArgument
from lessor.sdk.selectors import LabelSelector, SelectorOperator
from lessor.units import (
    format_bytes,
    format_cpu,
    format_duration,
    format_selector,
    parse_bytes,
    parse_cpu,
    parse_duration,
    parse_selector,
)


@pytest.mark.parametrize(
    ("text", "millis"),
    [("0.25", 250), ("500m", 500), (2, 2000), ("2", 2000), (0.25, 250), (0, 0), ("1.5", 1500), (" 3 ", 3000)],
)
def test_cpus(text: str | int | float, millis: int) -> None:
    assert parse_cpu(text) == millis


@pytest.mark.parametrize("text", ["", "x", "-1", "0.0001", "0.5m", "1e3", True, None, float("nan"), float("inf"), []])
def test_what_is_no_number_of_cpus(text: object) -> None:
    with pytest.raises(InvalidArgument) as error:
        parse_cpu(text, field="--cpu")  # type: ignore[arg-type]
    assert list(error.value.violations) == ["--cpu"]
    assert repr(text) in str(error.value)
    assert "500m" in str(error.value)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4GiB", 4 * 2**30),
        ("4Gi", 4 * 2**30),
        ("512M", 512_000_000),
        ("512MB", 512_000_000),
        (123, 123),
        ("123", 123),
        ("1.5KiB", 1536),
        ("1k", 1000),
        ("1K", 1000),
        ("2 TiB", 2 * 2**40),
        ("10B", 10),
        ("0", 0),
    ],
)
def test_bytes(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


def test_the_case_of_a_byte_unit_matters_and_the_error_says_so() -> None:
    with pytest.raises(InvalidArgument, match=r"memory: '4gib' has the unknown unit 'gib' \(did you mean \"4GiB\"\?\)"):
        parse_bytes("4gib", field="memory")


@pytest.mark.parametrize("text", ["", "GiB", "-4GiB", "1.0001", "4 G B", "4XB", True, None, "99999P"])
def test_what_is_no_number_of_bytes(text: object) -> None:
    with pytest.raises(InvalidArgument):
        parse_bytes(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30m", 1800),
        ("1h30m", 5400),
        ("90s", 90),
        ("250ms", 0.25),
        (90, 90),
        ("90", 90),
        (1.5, 1.5),
        ("1.5h", 5400),
        ("2d", 172800),
        ("10us", 0.00001),
        (timedelta(seconds=3), 3),
        ("0", 0),
    ],
)
def test_durations(text: str | int | float | timedelta, seconds: float) -> None:
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text", ["", "m", "30m1h", "1h1h", "-1s", "1x", "1 h", "0.1us", timedelta(seconds=-1), None, "9999999999d"]
)
def test_what_is_no_duration(text: object) -> None:
    with pytest.raises(InvalidArgument, match="timeout: "):
        parse_duration(text, field="timeout")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "selector"),
    [
        ("gpu", LabelSelector("gpu")),
        ("!gpu", LabelSelector("gpu", SelectorOperator.NOT_EXISTS)),
        ("zone=a", LabelSelector("zone", SelectorOperator.IN, ("a",))),
        ("zone!=a", LabelSelector("zone", SelectorOperator.NOT_IN, ("a",))),
        ("zone in (a,b)", LabelSelector("zone", SelectorOperator.IN, ("a", "b"))),
        ("zone notin (a, b)", LabelSelector("zone", SelectorOperator.NOT_IN, ("a", "b"))),
        ("zone = a b", LabelSelector("zone", SelectorOperator.IN, ("a b",))),
        ("zone=", LabelSelector("zone", SelectorOperator.IN, ("",))),
        ("a/b.c-d_e=1", LabelSelector("a/b.c-d_e", SelectorOperator.IN, ("1",))),
    ],
)
def test_selectors(text: str, selector: LabelSelector) -> None:
    assert parse_selector(text) == selector


@pytest.mark.parametrize(
    "text", ["", "!", "=a", "zone==a", "zone in ()", "zone in (a,,b)", "zone in a", "a b", "-a", 3]
)
def test_what_is_no_selector(text: object) -> None:
    with pytest.raises(InvalidArgument, match=r"selector: .* is not a label selector|empty value"):
        parse_selector(text)  # type: ignore[arg-type]


@given(st.integers(0, 10**12))
def test_formats_of_numbers_are_exact(number: int) -> None:
    assert parse_cpu(format_cpu(number)) == number
    assert parse_bytes(format_bytes(number)) == number
    span = timedelta(microseconds=number)
    assert parse_duration(format_duration(span)) == span


def test_formats_are_short() -> None:
    assert (format_cpu(2000), format_cpu(250)) == ("2", "250m")
    assert (format_bytes(4 * 2**30), format_bytes(1000), format_bytes(0)) == ("4GiB", "1000", "0")
    assert (format_duration(timedelta(hours=1, minutes=30)), format_duration(timedelta(0))) == ("1h30m", "0s")


def test_a_selector_whose_values_have_no_written_form_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"cannot be written|is not a label selector"):
        format_selector(LabelSelector("zone", SelectorOperator.IN, ("a,b", "c")))
