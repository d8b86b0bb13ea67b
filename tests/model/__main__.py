"""``python -m tests.model``: searches the model in every size, and every planted bug, and prints what was found.

Exit codes: 0 all is well, 1 a promise was broken or a planted bug was not found, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from tests.model.planted import BUGS, LARGE, SIZES, Bug
from tests.model.protocol import Protocol
from tests.model.search import Found, Search
from tests.model.world import Size


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    names = [bug.name for bug in BUGS]
    parser.add_argument("--bug", choices=names, help="search only this planted bug and print the way to it")
    parser.add_argument("--quick", action="store_true", help="leave out the sizes that the tests leave out")
    options = parser.parse_args(argv)
    chosen = options.bug
    if chosen is not None:
        (bug,) = (bug for bug in BUGS if bug.name == chosen)
        return _show(bug)
    searched = [_search(size) for size in (*SIZES, *(() if options.quick else LARGE))]
    print("\n| planted bug | size | what is broken | steps |")
    print("| --- | --- | --- | --- |")
    return 0 if all([*searched, *map(_hunt, BUGS)]) else 1


def _search(size: Size) -> bool:
    began_s = time.monotonic()
    found = Search(Protocol(size)).run()
    print(
        f"{size.name + ':':19} {found.states:>7,} states, {found.transitions:>9,} transitions, depth {found.depth}, "
        f"{time.monotonic() - began_s:.1f} s: {found.broken or 'every promise holds'}",
        flush=True,
    )
    _print_way(found)
    return found.broken is None


def _hunt(bug: Bug) -> bool:
    found = bug.search()
    print(f"| `{bug.name}` | {bug.size.name} | {found.broken or 'nothing'} | {len(found.trace)} |", flush=True)
    return found.broken is bug.promise


def _show(bug: Bug) -> int:
    found = bug.search()
    print(f"{bug.name}, {bug.size.name}: {found.broken or 'not found'}")
    _print_way(found)
    return 0 if found.broken is bug.promise else 1


def _print_way(found: Found) -> None:
    for number, line in enumerate(found.trace, start=1):
        print(f"{number:>4}  {line}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
