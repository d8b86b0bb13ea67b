"""Commands that other parts of Lessor, or other packages, bring: ``server``, ``agent``, ``dev``.

They are entry points of the group ``lessor.commands``: name →
``main(argv: list[str]) -> int``. They are loaded only when called, parse their
own arguments, and may need an extra that is not installed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

GROUP = "lessor.commands"


@dataclass(frozen=True, slots=True)
class Builtin:
    """A command of Lessor's own that needs an extra."""

    extra: str
    help: str


BUILTINS = {
    "server": Builtin("server", "Run the scheduler service. See `lessor server --help`."),
    "agent": Builtin("agent", "Run the agent of this host. See `lessor agent --help`."),
    "dev": Builtin("server", "Run Postgres, a server and agents on this machine. See `lessor dev --help`."),
}


def names() -> list[str]:
    """Returns the commands there are: Lessor's own, then those of other packages."""
    return [*BUILTINS, *sorted({point.name for point in entry_points(group=GROUP)} - set(BUILTINS))]


def help_of(name: str) -> str:
    """Returns one line about a command."""
    if name in BUILTINS:
        return BUILTINS[name].help
    return f"From another package. See `lessor {name} --help`."


def find(name: str) -> EntryPoint | None:
    """Returns the entry point of the command; None: no package brings it."""
    return next(iter(entry_points(group=GROUP, name=name)), None)


def run(name: str, argv: list[str]) -> int:
    """Runs the command with its arguments and returns its exit code.

    A command whose extra is not installed says so in one line (exit code 1).
    """
    point = find(name)
    missing = ""
    if point is not None:
        try:
            main = point.load()
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if missing.startswith(("lessor.", "lessor_")) and "." in missing:
                # Not an extra: the package itself is broken, and hiding it would mislead.
                raise
        else:
            return int(main(argv) or 0)
    extra = BUILTINS[name].extra if name in BUILTINS else ""
    remedy = f"lessor {name} needs the {extra} extra: pip install 'lessor[{extra}]'" if extra else ""
    detail = f" ({missing} is not installed)" if missing else ""
    print(f"error: {remedy or f'lessor {name} cannot be loaded'}{detail}", file=sys.stderr)
    return 1
