"""The page about runtimes shows what `make conformance` wrote, of the checks there are."""

from __future__ import annotations

import re
from pathlib import Path

from lessor_agent.testing.conformance import Check
from lessor_agent.testing.conformance.table import BEGIN, END

PAGE = Path(__file__).resolve().parents[2] / "docs" / "runtimes.md"


def test_the_page_names_every_check_and_the_process_runtime_keeps_them() -> None:
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(f"\n{BEGIN}\n\n")
    runtimes, _, table = rest.partition(f"\n\n{END}\n")[0].partition("\n\n")
    assert re.search(rf"^\| process \| .+ \| {len(Check)} \| 0 \| 0 \| 0 \|$", runtimes, re.MULTILINE)
    assert table.splitlines() == [
        "|  | check | what is promised | process |",
        "| --- | --- | --- | --- |",
        *(f"| {check.topic} | `{check.id}` | {check.promise} | passed |" for check in Check),
    ], "run `make conformance`"
