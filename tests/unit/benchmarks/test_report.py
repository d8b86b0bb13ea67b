"""What a scenario found: bounds, tables, ratios beside earlier ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.report import (
    Result,
    compare,
    median,
    merge_ratios,
    percentile,
    read_committed,
    write_ratios,
)

pytestmark = pytest.mark.unit


def result_of(scenario: str, **ratios: float) -> Result:
    return Result(scenario, f"what {scenario} is", ratios=ratios)


@pytest.mark.parametrize(
    ("value", "wanted", "held"),
    [
        (0.5, ">= 0.5", True),
        (0.499, ">= 0.5", False),
        (2.0, "<= 2", True),
        (2.001, "<= 2", False),
        (float("nan"), ">= 0", False),
        (float("nan"), "<= 5", False),
    ],
)
def test_a_bound_is_held_at_its_limit_and_never_by_what_was_not_measured(value: float, wanted: str, held: bool) -> None:
    result = Result("s", "t")
    result.bound("figure", value, wanted)
    result.bound("ratio", value, wanted, ratio=True)
    assert (result.held("figure"), result.held("ratio")) == (held, held)
    assert (set(result.figures), set(result.ratios)) == ({"figure"}, {"ratio"})


def test_a_bound_without_a_value_is_missed() -> None:
    result = Result("s", "t", bounds={"never_measured": ">= 1"})
    assert not result.held("never_measured")
    assert "never_measured = -, wanted >= 1: MISSED" in result.text()


def test_text_has_title_table_bounds_and_notes_in_this_order() -> None:
    result = Result("drain", "no-op jobs", rows=[{"what": "alone", "jobs/s": 12_345.6}], notes=["on a small host"])
    result.bound("to_raw", 0.75, ">= 0.5", ratio=True)
    assert result.text().splitlines() == [
        "drain: no-op jobs",
        "  what   jobs/s",
        "  -----  ------",
        "  alone  12,346",
        "  to_raw = 0.75, wanted >= 0.5: held",
        "  note: on a small host",
    ]


def test_rows_with_other_columns_have_a_table_of_their_own() -> None:
    rows: list[dict[str, str | int | float | None]] = [
        {"what": "limit", "jobs/s": 9},
        {"what": "ours", "jobs/s": 5, "agents": 8},
        {"what": "cycle", "ms": 1.5},
        {"what": "cycle", "ms": 2.5},
    ]
    text = Result("s", "t", rows=rows).text()
    heads = [line.split() for line in text.splitlines() if line.strip().startswith("what")]
    assert heads == [["what", "jobs/s", "agents"], ["what", "ms"]]
    assert "limit       9       -" in text


def test_json_is_one_line_with_all_that_was_found() -> None:
    result = result_of("drain", to_raw=0.5)
    result.figures["per_s"] = 100.0
    line = result.json_line()
    assert "\n" not in line
    assert json.loads(line)["ratios"] == {"to_raw": 0.5}
    assert json.loads(line)["figures"] == {"per_s": 100.0}


def test_percentile_and_median() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1.0)) == (51, 100, 100)
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert percentile([], 0.5) != percentile([], 0.5)
    assert median([]) != median([])


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "full.json"
    assert read_committed(path) == {}
    write_ratios(path, [result_of("drain", to_raw=0.51234)], {"cpus": 2})
    assert read_committed(path) == {"drain.to_raw": 0.512}
    assert json.loads(path.read_text())["environment"] == {"cpus": 2}


def test_merge_replaces_a_scenario_and_keeps_the_others(tmp_path: Path) -> None:
    path = tmp_path / "full.json"
    merge_ratios(path, [result_of("drain", to_raw=0.5, gone=1.0), result_of("drain_2", own=3.0)], {"cpus": 2})
    merge_ratios(path, [result_of("drain", to_raw=0.7)], {"cpus": 4})
    assert read_committed(path) == {"drain.to_raw": 0.7, "drain_2.own": 3.0}
    assert json.loads(path.read_text())["environment"] == {"cpus": 4}


def test_comparison_shows_the_change_and_does_without_an_earlier_figure() -> None:
    text = compare([result_of("drain", to_raw=0.6, new=1.0)], {"drain.to_raw": 0.5, "drain.zero": 0.0})
    rows = [line.split() for line in text.splitlines()[2:]]
    assert rows == [["drain.to_raw", "0.6", "0.5", "1.2"], ["drain.new", "1", "-", "-"]]
    assert compare([Result("s", "t")], {}) == "no ratios"
