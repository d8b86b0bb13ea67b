"""procrastinate: jobs in PostgreSQL, coroutines in one Python process."""

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

VERSION = "3.10.0"
# The fastest on two cores; more jobs at once contend for the same rows.
CONCURRENCY = 2
_ENVIRONMENT = PythonEnvironment(
    "procrastinate", VERSION, [f"procrastinate=={VERSION}", "psycopg[binary,pool]==3.3.9", "uvloop==0.23.0"]
)


class Procrastinate(Peer):
    """procrastinate with psycopg and uvloop."""

    key = "procrastinate"
    name = "procrastinate"
    what_runs = "coroutines in one Python process; no remote agent, no lease"
    jobs = 2_000

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
            command = [str(_ENVIRONMENT.python), str(WORKERS / "procrastinate_worker.py"), url, str(jobs), str(SAMPLES)]
            return figures(ask_worker([*command, str(CONCURRENCY)]), jobs, VERSION)
