"""For pytest: ``-p lessor_agent.testing.conformance.plugin --conformance-report FILE`` writes what a run found.

Works with pytest-xdist: the processes that run tests pass their verdicts on with their reports.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from lessor_agent.testing.conformance.holding import held
from lessor_agent.testing.conformance.report import Report, Status, Verdict
from lessor_agent.testing.conformance.stage import UNSUPPORTED
from lessor_agent.testing.conformance.subject import Subject

_OPTION = "--conformance-report"
_PROPERTY = "lessor_conformance"
_MAX_REASON = 200


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option."""
    group = parser.getgroup("lessor", "conformance of runtimes of Lessor")
    group.addoption(_OPTION, metavar="FILE", type=Path, help="write which runtime keeps which check, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Collects verdicts where a report is asked for, in the process that sees all of them."""
    path: Path | None = config.getoption(_OPTION)
    if path is None or hasattr(config, "workerinput"):
        return
    if not path.absolute().parent.is_dir():
        raise pytest.UsageError(f"{_OPTION} {path}: {path.absolute().parent} is no directory; make it first")
    config.pluginmanager.register(Collector(path.absolute()), "lessor-conformance-collector")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attaches the verdict to the report of a check's test."""
    report = yield
    found, subject = held(getattr(item, "function", None)), getattr(item, "cls", None)
    if found is not None and isinstance(subject, type) and issubclass(subject, Subject):
        verdict = verdict_of(report, call)
        if verdict is not None:
            told = {
                "runtime": subject.called(),
                "ran_against": subject().ran_against(),
                "check": found.check.id,
                "status": verdict.status.value,
                "reason": verdict.reason,
            }
            report.user_properties = [*report.user_properties, (_PROPERTY, told)]
    return report


def verdict_of(report: pytest.TestReport, call: pytest.CallInfo[None]) -> Verdict | None:
    """Returns what a phase of a test says of its check; None: nothing."""
    said = "" if call.excinfo is None else " ".join(str(call.excinfo.value).split())
    if report.failed:
        return Verdict(Status.FAILED, said[:_MAX_REASON])
    if report.skipped:
        if said.startswith(UNSUPPORTED):
            return Verdict(Status.UNSUPPORTED, said.removeprefix(UNSUPPORTED))
        return Verdict(Status.NOT_RUN, said[:_MAX_REASON])
    return Verdict(Status.PASSED) if report.when == "call" else None


class Collector:
    """Gathers the verdicts of a session and writes them at its end."""

    def __init__(self, path: Path) -> None:
        """Makes one that will write ``path``."""
        self._path = path
        self._report = Report()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Takes note of what is attached to a report."""
        for name, told in report.user_properties:
            if name == _PROPERTY:
                self._note(told)

    def pytest_sessionfinish(self) -> None:
        """Writes the file, also if some of the checks failed."""
        self._report.write(self._path)

    def _note(self, told: Any) -> None:
        verdict = Verdict(Status(told["status"]), told["reason"])
        self._report.note(told["runtime"], told["ran_against"], told["check"], verdict)
