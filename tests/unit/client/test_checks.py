"""What protobuf would refuse is refused before, by name of the field."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

import lessor
from lessor.sdk.checks import int32, int64, text, texts
from lessor.sdk.wire import time_message


def test_values_that_fit_pass_unchanged() -> None:
    assert (int32("tail", 0), int32("tail", 2**31 - 1), int64("offset", 2**63 - 1)) == (0, 2**31 - 1, 2**63 - 1)
    assert text("name", "é — 名") == "é — 名"
    assert texts("labels", {"a": "b"}) == {"a": "b"}
    assert texts("labels", None) == {}


@pytest.mark.parametrize("value", [-1, 2**31, 10**30, True, 1.5, "1", None])
def test_what_is_no_int32(value: object) -> None:
    with pytest.raises(lessor.InvalidArgument) as error:
        int32("tail", value)  # type: ignore[arg-type]
    assert list(error.value.violations) == ["tail"]
    assert repr(value) in str(error.value)


def test_what_is_no_int64() -> None:
    with pytest.raises(lessor.InvalidArgument, match=f"offset: {2**63} is more than {2**63 - 1}"):
        int64("offset", 2**63)


@pytest.mark.parametrize("value", ["\udcff", "a\udcffb", "a\0b", b"bytes", 1])
def test_what_is_no_text(value: object) -> None:
    with pytest.raises(lessor.InvalidArgument) as error:
        text("name", value)  # type: ignore[arg-type]
    assert list(error.value.violations) == ["name"]
    assert str(error.value).encode()


def test_a_long_value_is_shown_in_part() -> None:
    with pytest.raises(lessor.InvalidArgument) as error:
        text("name", "x" * 10_000 + "\udcff")
    assert len(str(error.value)) < 200


def test_what_are_no_labels() -> None:
    for labels, named in (({"\udcff": "x"}, "labels"), ({"x": "\udcff"}, "labels.x"), ({"x": 1}, "labels.x")):
        with pytest.raises(lessor.InvalidArgument) as error:
            texts("labels", labels)  # type: ignore[arg-type]
        assert list(error.value.violations) == [named]


def test_times_at_the_ends_of_the_calendar() -> None:
    east = timezone(timedelta(hours=10))
    for time in (datetime(1, 1, 1, tzinfo=east), datetime(9999, 12, 31, 23, tzinfo=timezone(timedelta(hours=-10)))):
        with pytest.raises(lessor.InvalidArgument, match=r"submitted_after: .* years 1 to 9999"):
            time_message(time, field="submitted_after")
    stamp = time_message(datetime(1, 1, 1, tzinfo=UTC), field="submitted_after")
    assert stamp is not None
    assert stamp.ToDatetime(tzinfo=UTC) == datetime(1, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(("command", "named"), [(["\udcff"], "command[0]"), (["a", "b\udcff"], "command[1]")])
def test_a_wrong_argument_is_named_and_not_called_missing(command: list[str], named: str) -> None:
    with pytest.raises(lessor.InvalidArgument) as error:
        lessor.JobSpec.of(command)
    assert list(error.value.violations) == [named]
    assert "missing" not in str(error.value)
