"""``python -m lessor_agent.testing.conformance.table REPORT… [--page FILE]``: reports as a table, for people.

With ``--page`` it takes the place of what stands between the lines
``<!-- conformance -->`` and ``<!-- end of conformance -->`` of a page of Markdown.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from lessor_agent.testing.conformance.checks import Check
from lessor_agent.testing.conformance.report import (
    Report,
    ReportUnreadable,
    Status,
    Verdict,
    read_reports,
    replace_text,
)

BEGIN, END = "<!-- conformance -->", "<!-- end of conformance -->"
_MARKED = re.compile(rf"^{BEGIN}$.*?^{END}$", re.DOTALL | re.MULTILINE)
"""On lines of their own: a page may also talk about them."""


class MarkersMissing(Exception):
    """A page does not say where the table goes; the message says what to write into it."""


def render(report: Report) -> str:
    """Returns two tables in Markdown: what ran, and runtimes × checks."""
    columns = list(report.runtimes.values())
    ran = [
        [
            title,
            held.ran_against,
            str(held.count(Status.PASSED)),
            str(held.count(Status.UNSUPPORTED)),
            str(held.count(Status.FAILED)),
            str(len(Check) - len(held.verdicts) + held.count(Status.NOT_RUN)),
        ]
        for title, held in report.runtimes.items()
    ]
    checks = [
        [
            check.topic,
            f"`{check.id}`",
            check.promise,
            *(cell(held.verdicts.get(check.id, Verdict(Status.NOT_RUN))) for held in columns),
        ]
        for check in Check
    ]
    return "\n".join(
        [
            *rows(["runtime", "ran against", "passed", "unsupported", "failed", "not run"], ran),
            "",
            *rows(["", "check", "what is promised", *report.runtimes], checks),
        ]
    )


def cell(verdict: Verdict) -> str:
    """Returns a verdict as it stands in the table."""
    if verdict.status is Status.FAILED:
        return "**failed**"
    return f"{verdict.status}: {verdict.reason}" if verdict.reason else str(verdict.status)


def rows(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """Returns the lines of a table."""
    lines = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines]


def put(page: str, table: str) -> str:
    """Returns a page with the table between its markers.

    Raises:
        MarkersMissing: They are not there, or not once and in this order.
    """
    found = _MARKED.findall(page)
    if len(found) != 1:
        raise MarkersMissing(f"write the lines {BEGIN} and {END} into it, once, where the table goes")
    return _MARKED.sub(lambda _: f"{BEGIN}\n\n{table}\n\n{END}", page)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, or puts it into a page; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lessor_agent.testing.conformance.table")
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT", help="what --conformance-report wrote")
    parser.add_argument("--page", type=Path, help="a page of Markdown to put the table into; default: print it")
    options = parser.parse_args(arguments)
    page: Path | None = options.page
    try:
        table = render(read_reports(options.reports))
        if page is None:
            print(table)
        else:
            replace_text(page, put(page.read_text(encoding="utf-8"), table))
    except ReportUnreadable as error:
        print(error, file=sys.stderr)
        return 2
    except MarkersMissing as error:
        print(f"{page}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{page}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
