"""Loads the ``.sql`` files of this package.

A file holds one statement with named parameters (``:name``), written for
asyncpg's numbered ones on loading. A line ``-- include NAME`` stands for the
file ``fragments/NAME.sql``: what becomes of a job when a lease ends is written
once and is part of every statement that ends leases.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

_INCLUDE = re.compile(r"^-- include (\w+)$", re.MULTILINE)
_COMMENT = re.compile(r"--[^\n]*")
# A colon that is not part of a cast (::) and not inside a word.
_PARAMETER = re.compile(r"(?<![:\w]):([a-z_][a-z0-9_]*)")


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement, ready for asyncpg."""

    name: str
    text: str
    """SQL with $1, $2, …"""
    parameters: tuple[str, ...]
    """Name of $1, of $2, …"""

    def arguments(self, values: Mapping[str, Any]) -> list[Any]:
        """Returns ``values`` in the order of the parameters.

        Raises:
            KeyError: A parameter has no value, or a value no parameter.
        """
        if len(values) != len(self.parameters):
            raise KeyError(f"{self.name} takes {sorted(self.parameters)}, got {sorted(values)}")
        return [values[name] for name in self.parameters]


def _read(name: str) -> str:
    return files(__package__).joinpath("sql", f"{name}.sql").read_text(encoding="utf-8")


@cache
def statement(name: str) -> Statement:
    """Returns the statement of ``sql/<name>.sql``.

    Raises:
        FileNotFoundError: There is no such file.
    """
    text = _INCLUDE.sub(lambda match: _read(f"fragments/{match.group(1)}"), _read(name))
    text = _COMMENT.sub("", text)
    order: dict[str, int] = {}

    def number(match: re.Match[str]) -> str:
        return f"${order.setdefault(match.group(1), len(order) + 1)}"

    text = _PARAMETER.sub(number, text)
    return Statement(name, text.strip(), tuple(order))


def all_names() -> list[str]:
    """Returns the names of all statements, sorted."""
    return sorted(p.name.removesuffix(".sql") for p in files(__package__).joinpath("sql").iterdir() if p.is_file())
