"""The training example: it resumes to the very same model, and never loses what it saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.train_digits.train import EXIT_CANCELLED, Checkpoints, Options, main, train
from lessor.sdk.specs import JobSpec

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "train_digits"


@dataclass
class RecordingReporter:
    """Keeps what the training reports."""

    handed_on: str | None = None
    cancel_after: int | None = None
    """Epochs after which the job is cancelled."""
    cursors: list[str] = field(default_factory=list)
    fractions: list[float] = field(default_factory=list)
    values: list[Mapping[str, float]] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)

    def progress(self, fraction: float, message: str = "", /) -> None:
        self.fractions.append(fraction)

    def metrics(self, values: Mapping[str, float], /) -> None:
        self.values.append(values)

    def checkpoint(self, cursor: str, /) -> None:
        # What is reported can be loaded at that moment, whatever happens next.
        assert Path(cursor).is_file()
        self.cursors.append(cursor)

    def last_checkpoint(self) -> str | None:
        return self.handed_on

    def result(self, value: Any, /) -> None:
        self.results.append(value)

    def cancelled(self) -> bool:
        return self.cancel_after is not None and len(self.cursors) >= self.cancel_after


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(epochs=4, repeat=1, checkpoint_dir=tmp_path, hidden=(24,))


def run(options: Options, reporter: RecordingReporter, token: str, stopping: Callable[[], bool] = lambda: False) -> int:
    return train(options, Checkpoints(options.checkpoint_dir, token), reporter, stopping)


def test_a_resumed_training_ends_with_the_model_of_an_undisturbed_one(options: Options, tmp_path: Path) -> None:
    undisturbed = RecordingReporter()
    assert train(options, Checkpoints(tmp_path / "undisturbed", "1"), undisturbed) == 0
    first = RecordingReporter(cancel_after=2)
    assert run(options, first, "2") == EXIT_CANCELLED
    assert first.results == []
    second = RecordingReporter(handed_on=first.cursors[-1])
    assert run(options, second, "3") == 0
    assert [values["epoch"] for values in first.values + second.values] == [1, 2, 3, 4]
    assert first.values + second.values == undisturbed.values
    assert second.results == [{**undisturbed.results[0], "resumed_from": 2}]


def test_it_learns(tmp_path: Path) -> None:
    reporter = RecordingReporter()
    assert run(Options(epochs=3, repeat=4, checkpoint_dir=tmp_path, hidden=(160,)), reporter, "1") == 0
    assert reporter.results[0]["accuracy"] > 0.6
    assert reporter.values[-1]["loss"] < reporter.values[0]["loss"]


def test_progress_ends_at_one(options: Options) -> None:
    reporter = RecordingReporter()
    assert run(options, reporter, "1") == 0
    assert reporter.fractions == [0.25, 0.5, 0.75, 1.0]


def test_two_attempts_share_no_file_and_each_keeps_its_last_two(options: Options) -> None:
    for token in ("41", "42"):
        assert run(options, RecordingReporter(), token) == 0
    assert sorted(path.name for path in options.checkpoint_dir.iterdir()) == [
        f"epoch-000{epoch}.lease-{token}.joblib" for epoch in (3, 4) for token in ("41", "42")
    ]


def test_a_signal_stops_it_before_the_next_epoch(options: Options) -> None:
    reporter = RecordingReporter()
    assert run(options, reporter, "1", stopping=lambda: len(reporter.cursors) == 1) == EXIT_CANCELLED
    assert len(reporter.cursors) == 1


@pytest.mark.parametrize("damage", ["absent", "cut", "empty", "foreign"])
def test_a_checkpoint_that_cannot_be_used_is_named_and_the_training_starts_over(
    options: Options, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = RecordingReporter(cancel_after=1)
    run(options, first, "1")
    path = Path(first.cursors[0])
    if damage == "absent":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        foreign = Options(epochs=1, repeat=1, checkpoint_dir=options.checkpoint_dir, seed=7, hidden=(24,))
        run(foreign, RecordingReporter(), "1")
    second = RecordingReporter(handed_on=str(path))
    assert run(options, second, "2") == 0
    assert second.results[0]["resumed_from"] == 0
    assert str(path) in capsys.readouterr().err


def test_what_an_attempt_saved_but_could_not_tell_is_used(options: Options) -> None:
    first = RecordingReporter()
    run(options, first, "1")
    told, untold = Path(first.cursors[0]), Path(first.cursors[-1])
    assert not told.exists(), "it was pruned after its agent had died"
    second = RecordingReporter(handed_on=str(told))
    assert run(options, second, "2") == 0
    assert second.results[0]["resumed_from"] == len(first.cursors)
    assert untold.exists()


def test_a_finished_training_that_is_resumed_reports_its_result_again(options: Options) -> None:
    first = RecordingReporter()
    run(options, first, "1")
    again = RecordingReporter(handed_on=first.cursors[-1])
    assert run(options, again, "2") == 0
    assert again.cursors == []
    assert again.results[0]["accuracy"] == first.results[0]["accuracy"]


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--repeat", "-1"], ["--epochs", "many"]])
def test_flags_that_make_no_sense_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_the_job_file_is_one_that_lessor_takes() -> None:
    spec = JobSpec.from_dict(yaml.safe_load((FOLDER / "job.yaml").read_text(encoding="utf-8")))
    assert (FOLDER / spec.argv[1]).is_file()
    spec.to_proto()
