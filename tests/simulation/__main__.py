"""``python -m tests.simulation``: runs seeds, replays one, or measures how soon planted bugs are found.

Exit codes: 0 all is well, 1 a promise was broken or a planted bug was not found, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence

from tests.simulation.cluster import Cluster
from tests.simulation.mutants import MUTANTS
from tests.simulation.search import Searchers, searchers
from tests.simulation.world import run
from tests.support.postgres import PostgresServer, wanted_version

STARTS = 5
"""Searches per planted bug, each from seeds of its own."""
_LIMIT = 400
_FAR = 1_000_000
"""Between the first seeds of two searches."""


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    options = _parser().parse_args(argv)
    with PostgresServer(wanted_version()) as server:
        if options.seed is not None:
            cluster = Cluster(server.create_migrated())
            try:
                return _replay(cluster, options.seed, options.mutant)
            finally:
                cluster.close()
        with searchers(server, options.jobs) as pool:
            if options.mutants is not None:
                return _mutants(pool, options.mutants, options.limit)
            return _explore(pool, options.seeds, options.start, options.seconds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=_positive, default=100, help="how many fresh seeds to run (default: 100)")
    parser.add_argument("--start", type=int, default=None, help="the first of them (default: a random one)")
    parser.add_argument("--seconds", type=float, default=None, help="run fresh seeds for so long instead")
    parser.add_argument(
        "--jobs", type=_positive, default=len(os.sched_getaffinity(0)), help="processes (default: one a processor)"
    )
    parser.add_argument("--seed", type=int, default=None, help="replay this seed and print every step")
    parser.add_argument("--mutant", choices=[mutant.name for mutant in MUTANTS], help="with --seed: plant this bug")
    parser.add_argument(
        "--mutants", nargs="*", metavar="NAME", help="search planted bugs, all or those named, and print what it took"
    )
    parser.add_argument("--limit", type=_positive, default=_LIMIT, help=f"seeds per search (default: {_LIMIT})")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _explore(pool: Searchers, count: int, start: int | None, seconds: float | None) -> int:
    """Runs seeds until one fails."""
    first = random.randrange(1 << 40) if start is None else start
    began_s = time.monotonic()
    seeds: Iterable[int] = itertools.count(first) if seconds is not None else range(first, first + count)
    happened: Counter[str] = Counter()
    done = steps = executions = 0
    for result in pool.explore(seeds, seconds):
        if result.violation is not None:
            print(f"seed {result.seed}: {result.violation}")
            print(f"replay it with: make sim SEED={result.seed}")
            return 1
        done += 1
        steps += result.steps
        executions += result.executions
        happened.update(result.happened)
    took_s = time.monotonic() - began_s
    print(
        f"{done} seeds from {first} are clean: {steps} steps, {executions} executions, "
        f"{took_s:.0f} s, {done / took_s:.1f} seeds/s"
    )
    rare = ("expire", "revive", "adopt_leases", "take_over", "truncate_drained", "waits for a lock", "deadlocks")
    print("met: " + ", ".join(f"{name} {happened[name]}" for name in rare))
    return 0


def _replay(cluster: Cluster, seed: int, mutant: str | None) -> int:
    planted = next((each for each in MUTANTS if each.name == mutant), None)
    result = run(cluster, seed, planted, keeps_trace=True)
    for line in result.trace:
        print(line)
    print(f"seed {seed}: {result.steps} steps, digest {result.digest}: {result.violation or 'clean'}")
    return 1 if result.violation else 0


def _mutants(pool: Searchers, names: Sequence[str], limit: int) -> int:
    known = {mutant.name: mutant for mutant in MUTANTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"--mutants: {', '.join(unknown)} is not known; use one of {', '.join(known)}", file=sys.stderr)
        return 2
    missed = 0
    print(f"| planted bug | seeds until it was found, median of {STARTS} searches | found as |")
    print("| --- | --- | --- |")
    firsts = [(start + 1) * _FAR for start in range(STARTS)]
    for mutant, searches in pool.search([known[name] for name in names] or MUTANTS, firsts, limit):
        needed = [limit + 1 if found is None else found.seeds for found in searches]
        how = Counter(found.violation.partition(" at ")[0].partition(":")[0] for found in searches if found)
        median = statistics.median(needed)
        shown = f"more than {limit}" if median > limit else f"{median:g}"
        missed += median > limit
        print(f"| {mutant.what} (`{mutant.name}`) | {shown} | {', '.join(how) or 'nothing'} |", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
