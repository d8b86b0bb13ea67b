"""``python -m tests.chaos``: a chaos run of any length, the mutants, or the restart matrix."""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.chaos import network
from tests.chaos.restarts import run_restarts
from tests.chaos.run import chaos
from tests.chaos.scenarios import run_mutants
from tests.chaos.world import Shape


def main(argv: Sequence[str]) -> int:
    """Returns 0 if every promise was kept (or every mutant caught), 1 if not, 2 if it cannot run here."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Real processes under faults.")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long faults are injected (default: 60)")
    parser.add_argument("--seed", type=int, help="draws faults and jobs (default: a fresh one, printed)")
    parser.add_argument("--agents", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="an empty directory in which everything is left for inspection")
    parser.add_argument("--mutants", nargs="*", metavar="NAME", help="plant bugs instead, all or these")
    parser.add_argument("--restarts", nargs="*", metavar="CELL", help="restart every part in every way, or these")
    parser.add_argument(
        "--away", type=float, default=0.0, metavar="SECONDS", help="with --restarts: the whole control plane, too"
    )
    arguments = parser.parse_args(argv)
    # Whoever ends it by SIGTERM wants namespaces, mounts and processes gone as well.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if arguments.mutants is not None:
        return asyncio.run(run_mutants(arguments.mutants))
    if arguments.keep is not None:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    if arguments.restarts is not None:
        return asyncio.run(run_restarts(arguments.restarts, tell, arguments.away, arguments.keep))
    if lacking := network.missing():
        print(f"chaos needs network namespaces, iptables and tmpfs: {lacking}", file=sys.stderr)
        return 2
    seed = random.SystemRandom().randrange(1_000_000) if arguments.seed is None else arguments.seed
    shape = Shape(agents=arguments.agents)
    verdict = asyncio.run(chaos(arguments.seconds, seed, shape, tell, arguments.keep))
    print(*verdict.figures(), sep="\n", flush=True)
    if verdict.violations or verdict.broken:
        print(f"again: python -m tests.chaos --seconds {arguments.seconds:g} --seed {seed} --agents {arguments.agents}")
        return 1
    return 0


def tell(line: str) -> None:
    """Prints a line at once."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
