"""Migrations only add, unless they say since when nobody needs what they take away."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
from alembic.script import Script, ScriptDirectory

import lessor_server.store
from tests.support.expand_lint import complaints, statements_of

pytestmark = pytest.mark.unit

MIGRATIONS = Path(lessor_server.store.__file__).parent / "migrations"


def later_migrations() -> list[Script]:
    """Returns all but the first, which met no servers, oldest first."""
    scripts = list(ScriptDirectory(str(MIGRATIONS)).walk_revisions())
    return sorted(scripts, key=lambda script: script.revision)[1:]


def marks(module: ModuleType) -> tuple[str, str] | None:
    """Returns what a contract step says: the oldest schema that it serves, and the last release that needed more."""
    if hasattr(module, "serves_from") or hasattr(module, "last_needed_by"):
        return module.serves_from, module.last_needed_by
    return None


@pytest.mark.parametrize("script", later_migrations(), ids=lambda script: script.revision)
def test_a_migration_only_adds(script: Script) -> None:
    assert complaints(statements_of(script.module), contract=marks(script.module) is not None) == []


@pytest.mark.parametrize("script", later_migrations(), ids=lambda script: script.revision)
def test_a_migration_says_which_of_the_two_it_is(script: Script) -> None:
    marked = marks(script.module)
    about = script.doc + (script.longdoc or "")
    if marked is None:
        assert "Expand: " in about
        assert "Contract: " not in about
        return
    serves_from, last_needed_by = marked
    assert "Contract: " in about
    assert "0001" <= serves_from < script.revision, "serves_from names a schema before it"
    assert re.fullmatch(r"\d+\.\d+(\.\d+)?", last_needed_by), "last_needed_by names a release"


GOOD = [
    ["ALTER TABLE leader ADD COLUMN stood_ms bigint NOT NULL DEFAULT 0"],
    ["ALTER TABLE lease ADD COLUMN a text, ADD b text[] NOT NULL DEFAULT '{}', ADD c numeric(4, 2)"],
    ["alter table job add column note text not null default 'drop table (job)' -- DROP TABLE job"],
    [
        "CREATE TABLE note (id bigint PRIMARY KEY, job_id bigint UNIQUE)",
        "CREATE UNIQUE INDEX note_job ON note (job_id)",
    ],
    ["CREATE TABLE note (id bigint)", "ALTER TABLE note ALTER id SET NOT NULL", "DELETE FROM note"],
    ["CREATE FUNCTION f() RETURNS int LANGUAGE sql AS $$ DROP TABLE job; SELECT 1 $$", "CREATE SEQUENCE s"],
    ["ALTER TABLE attempt DROP CONSTRAINT c, ADD CONSTRAINT c CHECK (outcome IN (1, 2)) NOT VALID"],
    ["ALTER TABLE attempt VALIDATE CONSTRAINT c"],
    ["create trigger t after update of drained on agent for each row when (new.drained) execute function f()"],
    ["ALTER TABLE job SET (fillfactor = 90), ALTER spec SET STORAGE EXTERNAL"],
    ["SET LOCAL lock_timeout = '2s'", "ALTER TABLE session ADD COLUMN d boolean", "UPDATE session SET d = true"],
]


@pytest.mark.parametrize("statements", GOOD, ids=lambda statements: statements[-1][:50])
def test_what_only_adds_is_let_through(statements: list[str]) -> None:
    assert complaints(statements) == []


TAKES = [
    "DROP TABLE job",
    "drop   index\n job_queue",
    "DROP FUNCTION next_job_id",
    "TRUNCATE event",
    "ALTER TABLE job RENAME TO jobs",
    "ALTER TABLE job RENAME COLUMN name TO called",
    "ALTER TABLE ONLY job RENAME name TO called",
    "ALTER INDEX job_queue RENAME TO j",
    "ALTER TABLE job DROP COLUMN name",
    "ALTER TABLE job ADD COLUMN called text, DROP name",
    "ALTER TABLE job DROP CONSTRAINT job_pkey",
    "ALTER TABLE job DROP CONSTRAINT c, ADD CONSTRAINT d CHECK (true) NOT VALID",
    "ALTER TABLE lease ALTER COLUMN phase DROP DEFAULT",
    "ALTER TABLE lease ALTER phase DROP NOT NULL",
    "ALTER TABLE lease ADD CONSTRAINT narrow CHECK (phase < 3) NOT VALID",
    "ALTER TYPE state RENAME VALUE 'a' TO 'b'",
]


@pytest.mark.parametrize("statement", TAKES)
def test_what_takes_away_waits_for_a_contract_step(statement: str) -> None:
    assert complaints([statement])
    assert complaints([statement], contract=True) == []


LOCKS = [
    "CREATE INDEX job_name ON job (name)",
    "CREATE UNIQUE INDEX IF NOT EXISTS job_name ON job (name)",
    "create index on only attempt using brin (ended_at)",
    "ALTER TABLE job ALTER COLUMN priority TYPE bigint",
    "ALTER TABLE job ALTER dedupe_key SET NOT NULL",
    "ALTER TABLE job ADD COLUMN note text NOT NULL",
    "ALTER TABLE job ADD note text, ADD COLUMN other text NOT NULL",
    "ALTER TABLE job ADD COLUMN at timestamptz NOT NULL DEFAULT clock_timestamp()",
    "ALTER TABLE job ADD COLUMN number bigserial",
    "ALTER TABLE job ADD COLUMN number bigint GENERATED ALWAYS AS (priority + 1) STORED",
    "ALTER TABLE job ADD COLUMN key text UNIQUE",
    "ALTER TABLE job ADD COLUMN agent text REFERENCES agent (id)",
    "ALTER TABLE attempt DROP CONSTRAINT c, ADD CONSTRAINT c CHECK (outcome < 20)",
    "ALTER TABLE attempt DROP CONSTRAINT c, ADD CONSTRAINT c CHECK (true) NOT VALID, VALIDATE CONSTRAINT c",
    "UPDATE job SET name = ''",
    "DELETE FROM attempt",
    "LOCK TABLE job",
    "VACUUM FULL job",
    "DO $$ BEGIN END $$",
    "CREATE OR REPLACE TRIGGER t AFTER UPDATE ON agent FOR EACH ROW EXECUTE FUNCTION f()",
    "CREATE TRIGGER t AFTER INSERT ON job EXECUTE FUNCTION f()",
    "CREATE OR REPLACE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "ALTER TABLE job CLUSTER ON job_pkey",
    "ALTER TABLE job ENABLE TRIGGER ALL",
    "ALTER TABLE job SET TABLESPACE other",
]


@pytest.mark.parametrize("statement", LOCKS)
def test_what_locks_or_cannot_be_judged_is_refused_in_either(statement: str) -> None:
    assert complaints([statement])
    assert complaints([statement], contract=True)


def test_a_migration_locks_one_table() -> None:
    statements = ["ALTER TABLE lease ADD COLUMN a text", "ALTER TABLE attempt ADD COLUMN a text"]
    assert [line for line in complaints(statements) if "locks lease, attempt in one transaction" in line]


def test_a_constraint_is_not_validated_while_the_table_is_locked_for_it() -> None:
    added = "ALTER TABLE attempt DROP CONSTRAINT c, ADD CONSTRAINT c CHECK (true) NOT VALID"
    assert complaints([added]) == []
    assert complaints([added, "ALTER TABLE attempt VALIDATE CONSTRAINT c"])


def test_a_step_that_is_no_sql_is_refused() -> None:
    module = ModuleType("migration")
    exec("op = None\ndef upgrade():\n    op.drop_column('job', 'name')", module.__dict__)
    with pytest.raises(AssertionError, match=r"op\.drop_column: write the step as SQL"):
        statements_of(module)
