"""PgQueuer: jobs in PostgreSQL, coroutines in one Python process."""

from __future__ import annotations

from benchmarks.peers.peer import (
    INSTALL_TIMEOUT_S,
    SAMPLES,
    WORKERS,
    Peer,
    PeerFigures,
    PythonEnvironment,
    ask_worker,
    database,
    figures,
)
from benchmarks.system import Bench

VERSION = "1.6.0"
_ENVIRONMENT = PythonEnvironment(
    "pgqueuer", VERSION, [f"pgqueuer[asyncpg]=={VERSION}", "asyncpg==0.32.0", "uvloop==0.23.0"]
)


class PgQueuer(Peer):
    """PgQueuer with asyncpg and uvloop, in batches of 100."""

    key = "pgqueuer"
    name = "PgQueuer, batch 100"
    what_runs = "coroutines in one Python process; no remote agent, no lease"
    jobs = 30_000
    quick_jobs = 10_000

    def install(self, timeout_s: float = INSTALL_TIMEOUT_S) -> None:
        """Installs it with pip.

        Raises:
            Unavailable: It cannot be had.
        """
        _ENVIRONMENT.install(timeout_s)

    def measure(self, bench: Bench, jobs: int) -> PeerFigures:
        """Measures it.

        Raises:
            Unavailable: It is not installed, or fails.
        """
        _ENVIRONMENT.installation.require()
        with database(bench) as url:
            command = [str(_ENVIRONMENT.python), str(WORKERS / "pgqueuer_worker.py"), url, str(jobs), str(SAMPLES)]
            return figures(ask_worker(command), jobs, VERSION)
