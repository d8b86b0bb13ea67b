"""What a run of the suite found: runtime × check → verdict, and the file that tells it.

The file is JSON::

    {"format": 1, "runtimes": {TITLE: {"ran_against": TEXT, "checks": {ID: {"status": STATUS, "reason": TEXT}}}}}

A check that is not in it was not run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

FORMAT = 1


class Status(StrEnum):
    """What became of a check."""

    PASSED = "passed"
    UNSUPPORTED = "unsupported"
    """Its author declared that the runtime does not keep it, or its capabilities say so."""
    FAILED = "failed"
    NOT_RUN = "not run"


class ReportUnreadable(Exception):
    """A file is no report of this suite; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one check on one runtime."""

    status: Status
    reason: str = ""
    """Why it is unsupported, was not run, or failed: one line."""


@dataclass(slots=True)
class Held:
    """What is known of one runtime."""

    ran_against: str
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    """id of the check → what became of it."""

    def count(self, status: Status) -> int:
        """Returns how many checks had that verdict."""
        return sum(verdict.status is status for verdict in self.verdicts.values())


@dataclass(slots=True)
class Report:
    """What is known of all runtimes."""

    runtimes: dict[str, Held] = field(default_factory=dict)
    """title → what is known, in the order in which they came."""

    def note(self, title: str, ran_against: str, check_id: str, verdict: Verdict) -> None:
        """Takes note of a verdict; a later one of the same check takes its place."""
        held = self.runtimes.setdefault(title, Held(ran_against))
        held.ran_against = ran_against
        held.verdicts[check_id] = verdict

    def write(self, path: Path) -> None:
        """Writes it, whole or not at all.

        Raises:
            OSError: The file cannot be written.
        """
        runtimes = {
            title: {
                "ran_against": held.ran_against,
                "checks": {
                    check_id: {"status": verdict.status.value, "reason": verdict.reason}
                    for check_id, verdict in sorted(held.verdicts.items())
                },
            }
            for title, held in self.runtimes.items()
        }
        replace_text(path, json.dumps({"format": FORMAT, "runtimes": runtimes}, indent=2, ensure_ascii=False) + "\n")


def read_reports(paths: Iterable[Path]) -> Report:
    """Returns what several files say together; of two that know one check of one runtime the later counts.

    Raises:
        ReportUnreadable: One of them cannot be read, or is no report.
    """
    report = Report()
    for path in paths:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ReportUnreadable(f"{path}: format {data['format']!r}; this version reads {FORMAT}: run it again")
            for title, held in data["runtimes"].items():
                for check_id, verdict in held["checks"].items():
                    found = Verdict(Status(verdict["status"]), str(verdict["reason"]))
                    report.note(title, str(held["ran_against"]), check_id, found)
        except OSError as error:
            raise ReportUnreadable(f"{path}: {error.strerror}; make it with --conformance-report {path}") from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ReportUnreadable(f"{path}: no report of the conformance suite: {error!r}") from None
    return report


def replace_text(path: Path, text: str) -> None:
    """Writes a file that readers see as it was or as it is to be.

    Raises:
        OSError: It cannot be written.
    """
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staged.write_text(text, encoding="utf-8")
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
