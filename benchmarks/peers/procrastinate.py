"""procrastinate: jobs in PostgreSQL, coroutines in one Python process."""

from __future__ import annotations

from benchmarks.peers.peer import (
    PeerFigures,
    PythonEnvironment,
    PythonPeer,
    database,
)
from benchmarks.system import Bench

VERSION = "3.10.0"
# The fastest on two cores; more jobs at once contend for the same rows.
CONCURRENCY = 2
_ENVIRONMENT = PythonEnvironment(
    "procrastinate", VERSION, [f"procrastinate=={VERSION}", "psycopg[binary,pool]==3.3.9", "uvloop==0.23.0"]
)


class Procrastinate(PythonPeer):
    """procrastinate with psycopg and uvloop."""

    version = VERSION
    environment = _ENVIRONMENT
    key = "procrastinate"
    name = "procrastinate"
    what_runs = "coroutines in one Python process; no remote agent, no lease"
    jobs = 2_000

    def measure(self, bench: Bench, jobs: int) -> PeerFigures:
        """Measures it.

        Raises:
            Unavailable: It is not installed, or fails.
        """
        self.environment.installation.require()
        with database(bench) as url:
            return self.ask(url, jobs, CONCURRENCY)
