"""The code of other releases: copies of the packages, changed to what came before or may come next."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lessor_server.store import migrate
from tests.chaos.overlay import Edit, make_overlay
from tests.e2e.test_bad_input import Ran, run

VERSIONS = "lessor_server/store/migrations/versions"
SQL = "lessor_server/store/sql"

BEFORE = {
    "0002": [
        # The value is still handed over; nothing stores it.
        Edit(f"{SQL}/tick.sql", ", stood_ms = CAST(:stood_ms AS bigint)\nWHERE", "\nWHERE :stood_ms >= 0 AND"),
        Edit(f"{SQL}/take_over.sql", "RETURNING epoch, clock, stood_ms", "RETURNING epoch, clock, 0 AS stood_ms"),
    ],
    "0003": [
        Edit(f"{SQL}/begin_session.sql", "replica, drained)", "replica)"),
        Edit(f"{SQL}/begin_session.sql", "CAST(:replica AS text), a.drained", "CAST(:replica AS text)"),
        Edit(
            f"{SQL}/resume_session.sql",
            ",\n    drained = (SELECT a.drained FROM agent AS a WHERE a.id = CAST(:agent_id AS text))",
            "",
        ),
        Edit(f"{SQL}/claim.sql", " AND NOT s.drained", ""),
    ],
    "0004": [],
    "0005": [],
}
"""Of each migration: what the statements were that have since come to use what it adds."""

MIGRATION = '''"""{about}"""

from alembic import op
from lessor_server.store.online_index import build_index

revision = "{revision}"
down_revision = "{before}"
{marker}

def upgrade():
    {steps}
'''


@dataclass
class Release:
    """The code of a release, in a directory that comes first on the path of its processes."""

    directory: Path
    newest: str = field(default_factory=migrate.head_revision)
    """The schema that it speaks."""

    @classmethod
    def of_schema(cls, revision: str, directory: Path) -> Release:
        """Makes the code that spoke an older schema.

        Raises:
            EditDoesNotFit: A statement has changed; what it was is to be written anew.
        """
        later = [number for number in BEFORE if number > revision]
        release = cls(make_overlay(directory, [edit for number in later for edit in BEFORE[number]]), revision)
        for number in later:
            for file in (directory / VERSIONS).glob(f"{number}_*.py"):
                file.unlink()
        return release

    @classmethod
    def following(cls, directory: Path) -> Release:
        """Makes the same code, to which migrations may be added."""
        return cls(make_overlay(directory))

    @property
    def environment(self) -> dict[str, str]:
        """What its processes are started with, beside the variables there are."""
        return {"PYTHONPATH": str(self.directory)}

    def run(self, *arguments: str) -> Ran:
        """Runs ``lessor server`` of this release to its end."""
        return run("server", *arguments, timeout_s=90, **self.environment)

    def add(self, about: str, *steps: str, marker: str = "") -> None:
        """Gives this release one more migration."""
        before, self.newest = self.newest, f"{int(self.newest) + 1:04}"
        text = MIGRATION.format(
            about=about, revision=self.newest, before=before, marker=marker, steps="\n    ".join(steps)
        )
        (self.directory / VERSIONS / f"{self.newest}_next.py").write_text(text)


def sql(statement: str) -> str:
    """A step that executes a statement."""
    return f"op.execute({statement!r})"
