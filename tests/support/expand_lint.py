"""Reads migrations and says which steps servers of the release before would notice.

It knows what it reads by its first words, not by a grammar: what it does not
recognise is refused, so that a step which it cannot judge is not let through. It
cannot see what the words mean: that a wider check is wider, that a default fits, or
that nobody reads a column any more. The tests under load see that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

SMALL = frozenset({"agent", "gpu", "leader", "queue", "session", "shape", "schema_floor", "event_floor"})
"""Tables of so few rows that one statement may change them all."""

_NAME = r'"?(?:public\.)?(\w+)"?'
_BODY = re.compile(r"\$(\w*)\$.*?\$\1\$", re.DOTALL)
_TEXT = re.compile(r"'(?:[^']|'')*'")
_COMMENT = re.compile(r"--[^\n]*|/\*.*?\*/", re.DOTALL)
_NEW = re.compile(rf"CREATE (?:UNLOGGED )?TABLE (?:IF NOT EXISTS )?{_NAME}")
_HARMLESS = re.compile(
    r"(CREATE (SEQUENCE|FUNCTION|VIEW|TYPE|STATISTICS)|COMMENT ON|SET LOCAL|GRANT|INSERT INTO|SELECT)\b"
)
_ALTER_TABLE = re.compile(rf"ALTER TABLE (?:IF EXISTS )?(?:ONLY )?{_NAME} (.*)")
_INDEX = re.compile(rf"CREATE (UNIQUE )?INDEX (?:IF NOT EXISTS )?.*?\bON (?:ONLY )?{_NAME}")
_TRIGGER = re.compile(rf"CREATE TRIGGER \w+ (?:BEFORE|AFTER) .*? ON {_NAME} FOR EACH ROW\b")
_CHANGE = re.compile(rf"(?:UPDATE|DELETE FROM) (?:ONLY )?{_NAME}")

TAKES = "takes something away that servers of the release before use: wait for a contract step"
LOCKS = "keeps the table locked for as long as it takes"


@dataclass
class Recorder:
    """Stands in for ``alembic.op``: notes the statements, in order."""

    statements: list[str] = field(default_factory=list)

    def execute(self, statement: str) -> None:
        """Notes a statement."""
        self.statements.append(statement)

    def build_index(self, _: object, name: str, table: str, columns: str) -> None:
        """Stands in for the function of :mod:`lessor_server.store.online_index`."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"op.{name}: write the step as SQL in op.execute, so that it can be read here")


def statements_of(module: ModuleType) -> list[str]:
    """Returns what a migration executes, without a database."""
    recorder = Recorder()
    with _replaced(module, op=recorder, build_index=recorder.build_index):
        module.upgrade()
    return recorder.statements


@contextmanager
def _replaced(module: ModuleType, **stand_ins: object) -> Iterator[None]:
    before = {name: getattr(module, name) for name in stand_ins if hasattr(module, name)}
    for name in before:
        setattr(module, name, stand_ins[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def complaints(statements: Sequence[str], *, contract: bool = False) -> list[str]:
    """Returns what is wrong with one migration, a line each.

    Args:
        statements: What it executes, in one transaction.
        contract: It is marked as a contract step: it may take away, and still not lock.
    """
    found: list[str] = []
    new: set[str] = set()
    locked: list[str] = []
    for statement in statements:
        text = plain(statement)
        if made := _NEW.match(text):
            new.add(made[1])
            continue
        if table := _table_of(text):
            if table in new:
                continue
            if "VALIDATE CONSTRAINT" in text and table in locked:
                found.append(f"{text[:100]!r}: {LOCKS}: validate it in the next migration")
            if table not in locked and not text.startswith(("UPDATE", "DELETE")):
                locked.append(table)
        for why, takes in _faults(text):
            if not (takes and contract):
                found.append(f"{text[:100]!r}: {why}")
    if len(locked) > 1:
        found.append(f"locks {', '.join(locked)} in one transaction: a migration for each, or servers meet a deadlock")
    return found


def plain(statement: str) -> str:
    """Returns a statement without comments, texts and function bodies, in one line."""
    for pattern, instead in ((_BODY, "''"), (_TEXT, "''"), (_COMMENT, " ")):
        statement = pattern.sub(instead, statement)
    words = re.split(r"(\W+)", " ".join(statement.split()).rstrip("; "))
    return "".join(word.upper() if word.lower() in _WORDS else word for word in words)


_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        add after alter always and as before by cascade check column comment concurrently constraint create default
        delete do drop each exists for foreign from function generated grant identity if in index insert into is key
        local lock not null on only or primary references rename replace row select sequence set statistics storage
        stored table to trigger truncate type unique unlogged update using valid validate view where
        """,
    )
)


def _table_of(text: str) -> str | None:
    if named := (_ALTER_TABLE.match(text) or _TRIGGER.match(text) or _CHANGE.match(text)):
        return named[1]
    named = _INDEX.match(text)
    return named[2] if named else None


def _faults(text: str) -> Iterator[tuple[str, bool]]:
    """Yields what is wrong with a statement on what was there before, and whether a contract step may do it."""
    if altered := _ALTER_TABLE.match(text):
        actions = list(_actions(altered[2]))
        for action in actions:
            yield from _action_faults(action, actions)
    elif index := _INDEX.match(text):
        if index[1]:
            yield "a unique index refuses what servers of the release before may write", True
        yield f"{LOCKS}: use build_index", False
    elif changed := _CHANGE.match(text):
        if changed[1] not in SMALL:
            yield f"changes rows of {changed[1]} at once: do it in bounded batches, apart from the migration", False
    elif re.match(r"(DROP|TRUNCATE)\b", text) or " RENAME " in text or text.startswith("ALTER TYPE"):
        yield TAKES, True
    elif _TRIGGER.match(text) and "OR REPLACE" not in text:
        # What it does is in its function, which no words tell.
        return
    elif "OR REPLACE" in text or not _HARMLESS.match(text):
        yield "is nothing that this test can judge", False


def _actions(rest: str) -> Iterator[str]:
    """Cuts the actions of an ALTER TABLE at the commas outside of parentheses."""
    depth, action = 0, ""
    for letter in rest + ",":
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            yield action.strip()
            action = ""
        else:
            action += letter


def _action_faults(action: str, actions: Sequence[str]) -> Iterator[tuple[str, bool]]:
    if added := re.match(r"ADD CONSTRAINT (\w+)", action):
        if f"DROP CONSTRAINT {added[1]}" not in actions:
            yield "a constraint refuses what servers of the release before may write (widen one: DROP and ADD)", True
        if not action.endswith("NOT VALID"):
            yield f"{LOCKS}: add it NOT VALID, and validate it in the next migration", False
    elif dropped := re.match(r"DROP CONSTRAINT (\w+)$", action):
        if not any(other.startswith(f"ADD CONSTRAINT {dropped[1]} CHECK") for other in actions):
            yield TAKES, True
    elif action.startswith("ADD"):
        yield from _column_faults(action)
    elif action.startswith("VALIDATE CONSTRAINT"):
        if len(actions) > 1:
            yield f"{LOCKS}: validate it in a migration of its own", False
    elif re.match(r"ALTER (COLUMN )?\w+ SET (STORAGE|STATISTICS)|SET \(", action):
        return
    elif re.match(r"(DROP|RENAME)\b|ALTER (COLUMN )?\w+ (TYPE|SET NOT NULL|DROP|SET DEFAULT)", action):
        yield TAKES, True
        if re.match(r"ALTER (COLUMN )?\w+ (TYPE|SET NOT NULL)", action):
            # Not even then: the whole table is rewritten, or read.
            yield f"{LOCKS}: add a column beside it, or a NOT VALID check, and validate that", False
    else:
        yield f"{action!r} is nothing that this test can judge", False


def _column_faults(action: str) -> Iterator[tuple[str, bool]]:
    default = re.search(r"\bDEFAULT (.*)", action)
    if "NOT NULL" in action and default is None:
        yield "NOT NULL without DEFAULT: servers of the release before write no value", False
    if default is not None and "(" in default[1].partition("NOT NULL")[0]:
        yield f"{LOCKS}: a default that is computed is written into every row; give a constant", False
    if re.search(r"\b(GENERATED|[a-z]*serial)\b", action):
        yield f"{LOCKS}: a value is written into every row", False
    if re.search(r"\b(UNIQUE|PRIMARY KEY|REFERENCES|CHECK)\b", action):
        yield f"{LOCKS}: add the constraint apart, NOT VALID", False
