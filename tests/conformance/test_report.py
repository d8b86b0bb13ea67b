"""What a run of the suite leaves for people: the report, the table, and the page that shows both."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lessor_agent.testing.conformance import Check, workload
from lessor_agent.testing.conformance.report import Report, ReportUnreadable, Status, Verdict, read_reports
from lessor_agent.testing.conformance.table import BEGIN, END, MarkersMissing, main, put, render

PAGE = Path(__file__).resolve().parents[2] / "docs" / "runtimes.md"
SOME = "start_error or exit_code or argv or start_refused"


def run_suite(tmp_path: Path, source: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs a module of tests as a stranger would: a directory of its own, no settings, and no plugin but ours."""
    (tmp_path / "test_mine.py").write_text(source, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), *options]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(
        [*command, "test_mine.py"], cwd=tmp_path, env=environment, text=True, capture_output=True, check=False
    )


def example() -> str:
    """Returns the module that the page shows."""
    found = re.search(r"<!-- example -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


def checks(path: Path, title: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["runtimes"][title]["checks"]
    return found


@pytest.mark.parametrize("parallel", [(), ("-p", "xdist", "-n", "2")], ids=["alone", "xdist"])
def test_the_example_of_the_page_runs_and_is_reported(tmp_path: Path, parallel: tuple[str, ...]) -> None:
    plugin = ("-p", "lessor_agent.testing.conformance.plugin", "--conformance-report", "nice.json")
    ran = run_suite(tmp_path, example(), *plugin, *parallel, "-k", SOME)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = checks(tmp_path / "nice.json", "nice")
    assert {check: verdict["status"] for check, verdict in found.items()} == {
        "exit-code": "passed",
        "start-error-missing": "unsupported",
        "start-error-permission": "unsupported",
        "start-error-directory": "passed",
        "argv": "passed",
        "start-refused": "passed",
    }
    assert found["start-error-missing"]["reason"] == "`nice` is found, and exits with 127"


FAILING = """
import pytest
from lessor_agent.runtimes.process import ProcessRuntime
from lessor_agent.testing.conformance import Check, RuntimeConformance

class Broken(ProcessRuntime):
    async def prepare(self, request):
        raise OSError("nothing | works\\nhere")

class TestBroken(RuntimeConformance):
    runtime_class = Broken

    @pytest.mark.skip(reason="not today")
    def test_argv(self):
        pass
"""


def test_what_failed_is_reported_and_shown_and_what_was_not_run_is_not_called_kept(tmp_path: Path) -> None:
    plugin = ("-p", "lessor_agent.testing.conformance.plugin", "--conformance-report", "broken.json")
    ran = run_suite(tmp_path, FAILING, *plugin, "-k", "exit_code or argv")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert checks(tmp_path / "broken.json", "process") == {
        "exit-code": {"status": "failed", "reason": "nothing | works here"}
    }
    shown = render(read_reports([tmp_path / "broken.json"])).splitlines()
    assert shown[2].endswith(f"| 0 | 0 | 1 | {len(Check) - 1} |")
    assert next(line for line in shown if "`exit-code`" in line).endswith("| **failed** |")
    assert next(line for line in shown if "`argv`" in line).endswith("| not run |")


def test_a_report_that_could_not_be_written_is_told_before_anything_runs(tmp_path: Path) -> None:
    options = ("-p", "lessor_agent.testing.conformance.plugin", "--conformance-report", "nowhere/report.json")
    ran = run_suite(tmp_path, example(), *options)
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    assert re.search(
        r"--conformance-report nowhere/report\.json: .*/nowhere is no directory; make it first", ran.stderr
    )


def report(**verdicts: Verdict) -> Report:
    """Returns what is known of one runtime called ``mine``."""
    made = Report()
    for name, verdict in verdicts.items():
        made.note("mine", "a | b", name.replace("_", "-"), verdict)
    return made


def test_reports_are_read_as_they_were_written_and_later_ones_count(tmp_path: Path) -> None:
    first = report(argv=Verdict(Status.FAILED, "it"), user=Verdict(Status.UNSUPPORTED, "one user"))
    first.write(tmp_path / "first")
    report(argv=Verdict(Status.PASSED)).write(tmp_path / "second")
    both = read_reports([tmp_path / "first", tmp_path / "second"]).runtimes["mine"]
    assert both.ran_against == "a | b"
    assert both.verdicts == {"argv": Verdict(Status.PASSED), "user": Verdict(Status.UNSUPPORTED, "one user")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_the_table_shows_reasons_and_keeps_its_columns() -> None:
    shown = render(report(user=Verdict(Status.UNSUPPORTED, "one | user")))
    assert "| mine | a \\| b | 0 | 1 | 0 |" in shown
    assert f"{Check.USER.promise} | unsupported: one \\| user |" in shown


ODD = '{"format": 1, "runtimes": {"a": {"ran_against": "b", "checks": {"c": {"status": "odd", "reason": ""}}}}}'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no report"),
        ("[]", "no report"),
        ('{"format": 2, "runtimes": {}}', "format 2; this version reads 1"),
        (ODD, "'odd' is not a valid Status"),
    ],
)
def test_what_is_no_report_is_told_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "report").write_text(text)
    with pytest.raises(ReportUnreadable, match=said):
        read_reports([tmp_path / "report"])


def test_the_command_writes_the_page_or_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, found = tmp_path / "page.md", tmp_path / "report"
    report(argv=Verdict(Status.PASSED)).write(found)
    page.write_text("no markers")
    assert main([str(found), "--page", str(page)]) == 2
    assert f"{page}: write the lines {BEGIN} and {END} into it" in capsys.readouterr().err
    assert main([str(tmp_path / "missing")]) == 2
    assert "missing: No such file or directory; make it with --conformance-report" in capsys.readouterr().err
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        assert main([str(found), "--page", str(page)]) == 0
        assert page.read_text() == f"before\n{BEGIN}\n\n{render(read_reports([found]))}\n\n{END}\nafter\n"
    assert main([str(found)]) == 0
    assert capsys.readouterr().out.strip() == render(read_reports([found]))


@pytest.mark.parametrize(
    "page", ["", BEGIN, f"{END}\n{BEGIN}\n", f"Between `{BEGIN}` and `{END}`.", f"{BEGIN}\n{END}\n" * 2]
)
def test_a_page_without_its_markers_is_left_alone(page: str) -> None:
    with pytest.raises(MarkersMissing):
        put(page, "table")


def test_the_rest_of_the_agent_does_not_need_pytest() -> None:
    code = "import sys, lessor_agent.testing, lessor_agent.main; sys.exit('pytest' in sys.modules)"
    assert subprocess.run([sys.executable, "-I", "-c", code], check=False).returncode == 0


def test_the_workload_needs_nothing_but_an_older_python() -> None:
    source = Path(workload.__file__).read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 8))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert imported <= set(sys.stdlib_module_names)
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"__future__", "collections.abc"}
