"""Many seeds, on as many processors as there are: each process has a database of its own."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.queues import SimpleQueue
from typing import NamedTuple

from tests.simulation.cluster import Cluster
from tests.simulation.mutants import MUTANTS, Mutant
from tests.simulation.world import Result, run
from tests.support.postgres import PostgresServer


class Found(NamedTuple):
    """A planted bug that was found."""

    seeds: int
    """How many it took."""
    violation: str


def search(cluster: Cluster, mutant: Mutant, first: int, limit: int) -> Found | None:
    """Runs seeds from ``first`` on until a planted bug is found; None: it was not, by ``limit`` seeds."""
    for tried in range(1, limit + 1):
        result = run(cluster, first + tried - 1, mutant)
        if result.violation is not None:
            return Found(tried, result.violation)
    return None


class Searchers:
    """Processes that run seeds."""

    def __init__(self, pool: ProcessPoolExecutor, count: int) -> None:
        self._pool = pool
        self._count = count

    def explore(self, seeds: Iterable[int], seconds: float | None) -> Iterator[Result]:
        """Runs seeds, in order, and begins none after so many seconds. Stop taking results to stop it."""
        until_s = None if seconds is None else time.monotonic() + seconds
        coming = iter(seeds)

        def begin() -> Iterator[Future[Result]]:
            for seed in coming:
                if until_s is not None and time.monotonic() >= until_s:
                    return
                yield self._pool.submit(_explore, seed)

        return _results(begin(), ahead=2 * self._count)

    def search(
        self, mutants: Iterable[Mutant], firsts: Sequence[int], limit: int
    ) -> Iterator[tuple[Mutant, list[Found | None]]]:
        """Yields each planted bug and, for each first seed, what :func:`search` returns."""
        begun = [
            (mutant, [self._pool.submit(_search, mutant.name, first, limit) for first in firsts]) for mutant in mutants
        ]
        for mutant, futures in begun:
            yield mutant, [future.result() for future in futures]


@contextmanager
def searchers(server: PostgresServer, count: int) -> Iterator[Searchers]:
    """So many processes; what they have not begun when it is left they never do."""
    spawning = multiprocessing.get_context("spawn")
    urls: SimpleQueue[str] = spawning.SimpleQueue()
    for _ in range(count):
        urls.put(server.create_migrated())
    pool = ProcessPoolExecutor(count, spawning, _connect, (urls,))
    try:
        yield Searchers(pool, count)
    finally:
        pool.shutdown(cancel_futures=True)


def _results(begun: Iterator[Future[Result]], ahead: int) -> Iterator[Result]:
    """Yields what comes of each, with so many begun ahead of what is waited for."""
    waiting: deque[Future[Result]] = deque()
    for future in begun:
        waiting.append(future)
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


# ── in such a process ────────────────────────────────────────────────────────

_own: list[Cluster] = []
"""The one that this process has."""


def _connect(urls: SimpleQueue[str]) -> None:
    # Ctrl-C ends it at once; else it would go on with what is queued.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _own.append(Cluster(urls.get()))


def _explore(seed: int) -> Result:
    try:
        return run(_own[0], seed)
    except Exception as error:
        raise RuntimeError(f"seed {seed} could not be run") from error


def _search(name: str, first: int, limit: int) -> Found | None:
    return search(_own[0], next(mutant for mutant in MUTANTS if mutant.name == name), first, limit)
