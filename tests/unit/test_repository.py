"""Rules of the house that a machine can hold: sizes, names, SQL headers, locks, links."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("client/lessor", "server/lessor_server", "agent/lessor_agent")
GENERATED = ROOT / "client" / "lessor" / "v1"
SQL = ROOT / "server" / "lessor_server" / "store" / "sql"
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))

MAX_MODULE_LINES = 600
VAGUE_NAMES = {"util", "utils", "common", "helper", "helpers", "manager", "misc"}
WHOLE_TABLE = {"ask_back", "read_leader", "resign", "take_over", "tick"}
"""Statements that need no index: ``leader`` has one row, ``lease`` holds live leases only."""
SETS_ON_IMPORT = {"client/lessor/cli/__init__.py"}
"""Sets a default that gRPC looks for when it is imported itself; it reads nothing."""
JOBS = {"tests/support/ticker.py"}
"""Programs that tests submit as jobs: they keep a pace of their own."""


def modules(*folders: str) -> list[Path]:
    """Returns the Python files below ``folders`` that people write."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in found if GENERATED not in path.parents)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    """Yields the nodes that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        # What stands under `if __name__ == "__main__"` does not run on import.
        if isinstance(node, ast.If) and "__name__" in ast.dump(node.test):
            continue
        yield node
        yield from outside_functions(node)


def comment_block(text: str) -> str:
    """Returns the comment lines that a SQL file begins with, without their dashes."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("--"):
            break
        lines.append(line.removeprefix("--").strip())
    return "\n".join(lines)


def test_there_is_something_to_look_at() -> None:
    for folder in PACKAGES:
        assert modules(folder), f"no modules in {folder}"
    assert list(SQL.glob("*.sql"))
    assert {path.name for path in LOCKS} == {"agent.txt", "dev.txt", "server.txt"}
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_a_module_has_one_idea_and_fits_it() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules(*PACKAGES, "tests", "proto")}
    long = [f"{relative(path)}: {count} lines" for path, count in lines.items() if count > MAX_MODULE_LINES]
    assert not long, f"split these (at most {MAX_MODULE_LINES} lines): {long}"


def test_modules_are_named_for_what_they_are_about() -> None:
    vague = [relative(path) for path in modules(*PACKAGES, "tests") if VAGUE_NAMES & {path.stem, path.parent.name}]
    assert not vague, f"name these after their idea: {vague}"


def test_nothing_reads_the_environment_on_import() -> None:
    found = [
        f"{relative(path)}:{node.lineno}"
        for path in modules(*PACKAGES)
        if relative(path) not in SETS_ON_IMPORT
        for node in outside_functions(parse(path))
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}
    ]
    assert not found, f"read the environment in a function: {found}"


@pytest.mark.parametrize("path", sorted(SQL.glob("*.sql")), ids=lambda path: path.stem)
def test_a_statement_says_its_event_locks_index_and_result(path: Path) -> None:
    header = comment_block(path.read_text(encoding="utf-8"))
    assert header.startswith(f"{path.stem} | "), f"line 1 of {path.name} must be '-- {path.stem} | EVENT: …'"
    wanted = ["Locks:", "Returns:"] if path.stem in WHOLE_TABLE else ["Locks:", "Index:", "Returns:"]
    missing = [word for word in wanted if word not in header]
    assert not missing, f"the header of {path.name} does not say {missing}"


def test_fragments_of_statements_say_what_they_do() -> None:
    bare = [path.name for path in SQL.glob("*/*.sql") if not comment_block(path.read_text(encoding="utf-8"))]
    assert not bare


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_locks_name_no_host(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "http" not in text
    assert "://" not in text
    assert not re.search(r"^\s*(-i|-f|--index-url|--extra-index-url|--find-links)\b", text, re.MULTILINE)


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_locks_pin_every_package_by_hash(path: Path) -> None:
    entries = re.split(r"\n(?=\S)", path.read_text(encoding="utf-8").strip())
    pinned = [entry for entry in entries if not entry.startswith("#")]
    assert pinned
    loose = [entry.splitlines()[0] for entry in pinned if "==" not in entry or "--hash=sha256:" not in entry]
    assert not loose


@pytest.mark.parametrize(
    ("lock", "extras"),
    [("dev", ("server", "agent", "examples", "dev")), ("server", ("server",)), ("agent", ("agent",))],
)
def test_locks_hold_what_the_project_asks_for(lock: str, extras: tuple[str, ...]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(name for extra in extras for name in project["optional-dependencies"][extra])]
    locked = set(re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==", lock_text(lock), re.MULTILINE))
    missing = {normal(requirement) for requirement in asked} - {normal(name) for name in locked}
    assert not missing, f"run `make lock`: {sorted(missing)} are not in requirements/{lock}.txt"


def lock_text(name: str) -> str:
    return (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")


def normal(requirement: str) -> str:
    """Returns the normalised name of the package in a requirement."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None, requirement
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def test_tests_wait_for_events_not_for_time() -> None:
    found = []
    for path in modules("tests"):
        if relative(path) in JOBS:
            continue
        for node in ast.walk(parse(path)):
            called = isinstance(node, ast.Attribute) and node.attr == "sleep" and ast.unparse(node.value) == "time"
            imported = isinstance(node, ast.ImportFrom) and node.module == "time" and any(
                name.name == "sleep" for name in node.names
            )  # fmt: skip
            if called or imported:
                found.append(f"{relative(path)}:{getattr(node, 'lineno', 0)}")
    assert not found, f"wait for what is to happen, or inject the clock: {found}"


def test_no_test_is_excused() -> None:
    excused = [
        f"{relative(path)}:{node.lineno}"
        for path in modules("tests")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute) and node.attr == "flaky" and ast.unparse(node.value) == "pytest.mark"
    ]
    assert not excused, f"find out why they fail: {excused}"


def pages() -> list[Path]:
    return [*ROOT.glob("*.md"), *(page for folder in ("docs", "examples") for page in (ROOT / folder).rglob("*.md"))]


def test_links_between_pages_lead_somewhere() -> None:
    dead = []
    for page in pages():
        prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            if not re.match(r"[a-z]+:", target) and not (page.parent / target.partition("#")[0]).exists():
                dead.append(f"{relative(page)} → {target}")
    assert not dead
