"""A copy of the installed packages, first on the path of the processes under test.

A run is not disturbed by edits of the source while it lasts, and a mutant is an
edit of the copy: nothing in what is shipped knows of either.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("lessor", "lessor_server", "lessor_agent")


class EditDoesNotFit(Exception):
    """The text that a mutant replaces does not stand in the source exactly once; the message names both."""


@dataclass(frozen=True, slots=True)
class Edit:
    """A replacement in one file of the packages."""

    path: str
    """Such as ``lessor_server/store/sql/end.sql``."""
    old: str
    """Stands in the file exactly once."""
    new: str


def make_overlay(directory: Path, edits: Iterable[Edit] = ()) -> Path:
    """Copies the packages into ``directory`` and edits the copy. Returns what belongs on PYTHONPATH.

    Raises:
        EditDoesNotFit: The source has changed; the mutant must be written anew.
    """
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        source = Path(spec.submodule_search_locations[0])
        shutil.copytree(source, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    for edit in edits:
        path = directory / edit.path
        text = path.read_text(encoding="utf-8")
        if text.count(edit.old) != 1:
            raise EditDoesNotFit(f"{edit.path} holds {text.count(edit.old)} times, not once: {edit.old!r}")
        path.write_text(text.replace(edit.old, edit.new), encoding="utf-8")
    return directory
