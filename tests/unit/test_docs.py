"""The pages say what the code says: links, names, numbers, the state diagram, commands."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import typer.main

from lessor import timing
from lessor.cli.main import app
from lessor_server.domain.states import mermaid

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [*ROOT.glob("*.md"), *(page for folder in ("docs", "examples", "deploy") for page in (ROOT / folder).rglob("*.md"))]
)
EXAMPLE_TTLS = [timedelta(seconds=10), timedelta(seconds=20), timedelta(minutes=1), timedelta(hours=1)]

_FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
_NAMED = re.compile(r"\]\(([^)\s]+\.py)\)[\s,(]*((?:`\w+`[\s,]*)+)\)")
"""A link to a module, and the names in it that the text gives in the same parentheses or behind it."""


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """Returns a page without its fenced blocks."""
    return _FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Returns what links to a page's headings are called."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def defined(pattern: str, folder: str) -> set[str]:
    """Returns the groups of ``pattern`` in the Python files below a folder."""
    found: set[str] = set()
    for path in (ROOT / folder).rglob("*.py"):
        found.update(re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE))
    return found


def seconds(value: timedelta) -> str:
    return f"{value.total_seconds():g} s"


def table(page: Path, marker: str) -> list[list[str]]:
    """Returns the cells of the table behind ``<!-- marker -->``, its head left out."""
    _, _, rest = page.read_text(encoding="utf-8").partition(f"<!-- {marker} -->\n\n")
    lines = rest.partition("\n\n")[0].splitlines()
    assert len(lines) > 2, f"no table {marker} in {name(page)}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_a_page_and_a_heading(page: Path) -> None:
    dead = []
    for _, target in _LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            dead.append(target)
    assert not dead


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_names_beside_a_link_stand_in_the_module(page: Path) -> None:
    missing = []
    for target, names in _NAMED.findall(prose(page)):
        module = (page.parent / target).read_text(encoding="utf-8")
        for wanted in re.findall(r"\w+", names):
            if not re.search(rf"^\s*(?:async )?(?:def|class) {wanted}\b|^{wanted}\b", module, re.MULTILINE):
                missing.append(f"{wanted} in {target}")
    assert not missing


def test_the_architecture_names_its_code() -> None:
    """The test above would hold for a page that names nothing."""
    assert len(_NAMED.findall(prose(DOCS / "architecture.md"))) > 30


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tests_that_are_named_exist(page: Path) -> None:
    named = set(re.findall(r"`(test_\w+)`", prose(page)))
    assert named <= defined(r"^\s*(?:async )?def (test_\w+)", "tests")


def test_the_state_diagram_is_that_of_the_code() -> None:
    assert f"```mermaid\n{mermaid()}```" in (DOCS / "architecture.md").read_text(encoding="utf-8")


def test_the_numbers_are_those_of_the_code() -> None:
    rows = table(DOCS / "lease-protocol.md", "numbers")
    for _, value, constant in rows:
        ours = getattr(timing, constant.strip("`"))
        assert value == (seconds(ours) if isinstance(ours, timedelta) else str(ours)), constant
    told = {constant.strip("`") for _, _, constant in rows}
    durations = {constant for constant, value in vars(timing).items() if isinstance(value, timedelta)}
    assert durations <= told


def test_the_deadlines_are_those_of_the_code() -> None:
    assert table(DOCS / "lease-protocol.md", "deadlines") == [
        [
            seconds(value)
            for value in (
                ttl,
                timing.margin(ttl),
                ttl - timing.margin(ttl),
                ttl + timing.margin(ttl),
                timing.longest_heartbeat(ttl),
                timing.default_grace(ttl),
            )
        ]
        for ttl in EXAMPLE_TTLS
    ]


def commands(command: Any, typed: str) -> list[str]:
    """Returns every command below ``command``, as it is typed."""
    children: dict[str, Any] = getattr(command, "commands", {})
    return [found for child in children for found in commands(children[child], f"{typed} {child}")] or [typed]


def test_every_command_is_told() -> None:
    told = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    typed = commands(typer.main.get_command(app), "lessor")
    assert len(typed) > 15
    assert [command for command in typed if not re.search(rf"{command}\b", told)] == []


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8") + (DOCS / "adr" / "README.md").read_text(encoding="utf-8")
    targets = {Path(target).name for _, target in _LINK.findall(index)}
    assert [name(page) for page in DOCS.rglob("*.md") if page.name not in targets and page.name != "README.md"] == []


def test_decisions_have_a_number_of_their_own_and_all_parts() -> None:
    decisions = sorted((DOCS / "adr").glob("0*.md"))
    assert [int(page.name[:4]) for page in decisions] == list(range(1, len(decisions) + 1))
    parts = ["Context", "Decision", "Alternatives", "Consequences", "What would change our mind"]
    for page in decisions:
        text = page.read_text(encoding="utf-8")
        assert text.startswith(f"# {page.name[:4]}. "), name(page)
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == parts, name(page)
