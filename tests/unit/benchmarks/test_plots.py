"""Plots: one PNG per scenario, the same for the same results, and none where they cannot be drawn."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.plots import draw
from benchmarks.report import Result

pytestmark = pytest.mark.unit

RESULTS = [
    Result(
        "drain",
        "",
        rows=[
            {"what": "bare store", "jobs": 10, "jobs/s": 9000.0},
            {"what": "drain alone", "agents": 64, "jobs": 10, "jobs/s": 5000.0},
        ],
    ),
    Result("peers", "", rows=[{"peer": "queue", "drained jobs/s": 4000.0, "start p50 ms": 3.0, "start p99 ms": 9.0}]),
    Result(
        "growth",
        "",
        rows=[
            {"what": "1,000 waiting", "jobs/s": 5000.0},
            {"what": "steady load", "seconds": "0 to 5", "claim p50 ms": 1.0, "claim p99 ms": 2.0},
            {"what": "idle transaction", "seconds": "0 to 5", "claim p50 ms": float("nan"), "claim p99 ms": 3.0},
            {"what": "planning cycle", "shapes": 1, "ms": 2.0},
        ],
    ),
    Result(
        "idle_fleet",
        "",
        rows=[
            {"agents": 1000, "server cores": 0.1, "postgres cores": 0.02, "server KB/agent": 60.0},
            {"agents": 5000, "server cores": 0.3, "postgres cores": None, "server KB/agent": 55.0},
        ],
    ),
    Result(
        "latency",
        "",
        rows=[
            {"what": "submit → running", "p50 ms": 2.5, "p99 ms": 7.0},
            {"what": "of it: submit → its answer", "p50 ms": 1.0, "p99 ms": 2.0},
        ],
    ),
    Result("recovery", "", rows=[{"what": "no plot of it"}]),
]


def test_each_scenario_with_a_plot_gets_its_file(tmp_path: Path) -> None:
    written = draw(RESULTS, tmp_path / "images")
    assert sorted(path.name for path in written) == ["drain.png", "growth.png", "idle_fleet.png", "latency.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    once = [path.read_bytes() for path in draw(RESULTS, tmp_path / "once")]
    again = [path.read_bytes() for path in draw(RESULTS, tmp_path / "again")]
    assert once == again
    assert b"matplotlib" not in b"".join(once).lower()


def test_a_scenario_without_rows_is_left_out(tmp_path: Path) -> None:
    empty = [Result(name, "") for name in ("drain", "growth", "idle_fleet", "latency")]
    assert draw(empty, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_nothing_is_drawn_and_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw(RESULTS, tmp_path) == []
    assert "matplotlib is not installed" in capsys.readouterr().err
