"""PgQueuer: jobs in PostgreSQL, coroutines in one Python process."""

from __future__ import annotations

from benchmarks.peers.peer import (
    PeerFigures,
    PythonEnvironment,
    PythonPeer,
    database,
)
from benchmarks.system import Bench

VERSION = "1.6.0"
_ENVIRONMENT = PythonEnvironment(
    "pgqueuer", VERSION, [f"pgqueuer[asyncpg]=={VERSION}", "asyncpg==0.32.0", "uvloop==0.23.0"]
)


class PgQueuer(PythonPeer):
    """PgQueuer with asyncpg and uvloop, in batches of 100."""

    version = VERSION
    environment = _ENVIRONMENT
    key = "pgqueuer"
    name = "PgQueuer, batch 100"
    what_runs = "coroutines in one Python process; no remote agent, no lease"
    jobs = 30_000
    quick_jobs = 10_000

    def measure(self, bench: Bench, jobs: int) -> PeerFigures:
        """Measures it.

        Raises:
            Unavailable: It is not installed, or fails.
        """
        self.environment.installation.require()
        with database(bench) as url:
            return self.ask(url, jobs)
