"""lessor.job: what a workload tells and asks."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lessor import job

VARIABLES = ("JOB_ID", "ATTEMPT", "FENCING_TOKEN", "EVENTS", "CANCEL", "CHECKPOINT")


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(f"LESSOR_{name}", raising=False)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "events"
    path.touch()
    monkeypatch.setenv("LESSOR_EVENTS", str(path))
    return path


def written(events: Path) -> list[dict[str, Any]]:
    """The events, without their times."""
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    for line in lines:
        assert isinstance(line.pop("time"), float)
    return lines


@pytest.mark.usefixtures("outside")
def test_outside_a_job_everything_is_harmless() -> None:
    job.progress(0.5, "half")
    job.message("hello")
    job.metrics({"loss": 1})
    job.checkpoint("x")
    job.result({"a": 1})
    job.error(ValueError("x"))
    assert not job.cancelled()
    assert (job.id(), job.attempt(), job.fencing_token(), job.last_checkpoint()) == (None, None, None, None)
    # What would be wrong inside is wrong outside as well: it is found before it is submitted.
    with pytest.raises(ValueError, match="fraction"):
        job.progress(2)


def test_what_the_job_was_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in zip(VARIABLES, ("j1", "2", "77", "/e", str(tmp_path / "cancel"), "step 5"), strict=True):
        monkeypatch.setenv(f"LESSOR_{name}", value)
    assert (job.id(), job.attempt(), job.fencing_token(), job.last_checkpoint()) == ("j1", 2, 77, "step 5")
    assert not job.cancelled()
    (tmp_path / "cancel").touch()
    assert job.cancelled()


def test_progress(events: Path) -> None:
    job.progress(0)
    job.progress(1.0, "done")
    job.progress(message="only words")
    job.progress(step=1, total=4)
    job.message("é\0" + "x" * 5000)
    *exact, long = written(events)
    assert exact == [
        {"type": "progress", "fraction": 0.0},
        {"type": "progress", "fraction": 1.0, "message": "done"},
        {"type": "progress", "message": "only words"},
        {"type": "progress", "fraction": 0.25},
    ]
    assert long["message"].startswith("é\ufffdxxx")
    assert len(long["message"].encode()) <= 4096
    assert long["message"].endswith("…")


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"fraction": math.nan},
        {"fraction": math.inf},
        {"fraction": -0.001},
        {"fraction": 1.001},
        {"fraction": "0.5"},
        {"fraction": True},
        {"fraction": 10**400},
        {"step": 1},
        {"total": 1},
        {"step": 2, "total": 1},
        {"step": -1, "total": 1},
        {"step": 0, "total": 0},
        {"fraction": 0.5, "step": 1, "total": 2},
    ],
)
def test_bad_progress(events: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="progress"):
        job.progress(**arguments)
    assert written(events) == []


def test_metrics(events: Path) -> None:
    class Scalar:
        def __float__(self) -> float:
            return 0.25

    job.metrics({"loss": Scalar(), "epoch": 3, "diverged": math.nan})  # type: ignore[dict-item]
    job.metrics({"diverged": math.inf})
    job.metrics({})
    assert written(events) == [{"type": "metrics", "values": {"loss": 0.25, "epoch": 3.0}}]


@pytest.mark.parametrize(
    "values",
    [{f"m{n}": 1 for n in range(129)}, {"": 1}, {"x" * 257: 1}, {1: 1}, {"a": "1"}, {"a": None}, {"a": True}],
)
def test_bad_metrics(events: Path, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="metrics"):
        job.metrics(values)
    assert written(events) == []


def test_checkpoint(events: Path) -> None:
    job.checkpoint("epoch-3.pt")
    job.checkpoint({"epoch": 3})
    job.checkpoint("é" * 32768)
    assert [event["cursor"] for event in written(events)] == ["epoch-3.pt", '{"epoch":3}', "é" * 32768]


@pytest.mark.parametrize("cursor", ["x" * 65537, "a\0b", "\ud800", object(), math.nan, {"a": {1, 2}}])
def test_bad_checkpoint(events: Path, cursor: Any) -> None:
    with pytest.raises(ValueError, match="checkpoint"):
        job.checkpoint(cursor)
    assert written(events) == []


def test_result(events: Path) -> None:
    largest = "x" * (262144 - 2)
    for value in (None, {"accuracy": 0.97, "text": "é"}, largest):
        job.result(value)
    assert [event["value"] for event in written(events)] == [None, {"accuracy": 0.97, "text": "é"}, largest]


@pytest.mark.parametrize("value", ["x" * 262143, math.nan, [math.inf], object(), {1, 2}, {("a",): 1}])
def test_bad_result(events: Path, value: Any) -> None:
    with pytest.raises(ValueError, match="result"):
        job.result(value)
    recursive: list[Any] = []
    recursive.append(recursive)
    with pytest.raises(ValueError, match="result"):
        job.result(recursive)
    assert written(events) == []


def test_error(events: Path) -> None:
    try:
        raise KeyError("missing \ud800")
    except KeyError as failure:
        job.error(failure, retryable=False)
    job.error("out of luck")
    job.error(json.JSONDecodeError("bad", "doc", 0))
    raised, plain, qualified = (event["error"] for event in written(events))
    assert (raised["type"], raised["retryable"]) == ("KeyError", False)
    assert "test_job.py" in raised["traceback"]
    assert plain == {"type": "ERROR", "message": "out of luck", "traceback": "", "retryable": True}
    assert qualified["type"] == "json.decoder.JSONDecodeError"


def test_long_error_is_cut(events: Path) -> None:
    job.error(RuntimeError("m" * 100_000))
    [event] = written(events)
    assert len(event["error"]["message"].encode()) <= 16384
    assert len(event["error"]["traceback"].encode()) <= 65536
    # The end of a traceback says what happened.
    assert event["error"]["traceback"].endswith("mmm\n")


def run_script(script: str, events: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "LESSOR_EVENTS": str(events)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_uncaught_exception_is_reported_and_shown(events: Path) -> None:
    result = run_script("from lessor import job; job.report_exceptions(); 1/0", events)
    assert result.returncode == 1
    assert "ZeroDivisionError" in result.stderr
    [event] = written(events)
    assert event["error"]["type"] == "ZeroDivisionError"
    assert "1/0" in event["error"]["traceback"] or "<string>" in event["error"]["traceback"]


def test_import_needs_only_the_standard_library(events: Path) -> None:
    script = """
import sys
from lessor import job
heavy = {"grpc", "google", "asyncio", "pydantic", "rich", "typer"} & set(sys.modules)
sys.exit(repr(heavy) if heavy else 0)
"""
    assert run_script(script, events).returncode == 0


def test_lines_of_many_writers_stay_whole(events: Path) -> None:
    script = "from lessor import job\nfor n in range(200): job.result({'n': n, 'fill': 'x' * 3000})"
    with ThreadPoolExecutor(4) as pool:
        assert [result.returncode for result in pool.map(lambda _: run_script(script, events), range(4))] == [0] * 4
    assert sorted(event["value"]["n"] for event in written(events)) == sorted(list(range(200)) * 4)


def test_full_disk(monkeypatch: pytest.MonkeyPatch, events: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint that was not stored is an error, progress is not, and neither swallows the next line."""
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: real(fd, data[:10]))
        with pytest.raises(OSError, match="only 10 of"):
            job.checkpoint("a")
        job.progress(0.5)
    assert "progress dropped" in capsys.readouterr().err
    job.checkpoint("b")
    lines = events.read_text().splitlines()
    assert json.loads(lines[-1])["cursor"] == "b"


def test_unwritable_events_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LESSOR_EVENTS", str(tmp_path / "nowhere" / "events"))
    job.progress(0.5)
    with pytest.raises(OSError, match="nowhere"):
        job.result(1)
