"""What every peer has in common: where it is installed, what it runs on, how its worker is asked for figures."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import median, percentile
from benchmarks.system import POSTGRES_SETTINGS, Bench, Unavailable
from lessor_server.embedded import EmbeddedPostgres, EmbeddedPostgresError

WORKERS = Path(__file__).parent / "workers"
"""Programs that run in the peers' own environments."""

SAMPLES = 200
"""Single jobs whose latency is taken."""

INSTALL_TIMEOUT_S = 300.0
_WORKER_TIMEOUT_S = 120.0
_INSTALLED = "installed"


@dataclass(frozen=True)
class PeerFigures:
    """What one peer did."""

    jobs: int
    """No-op jobs that were drained."""
    drained_per_s: float
    """Jobs per second from the first begun to the last begun, all of them stored before."""
    start_p50_ms: float
    """From the submit of a single job to its begin, on an idle system."""
    start_p99_ms: float
    version: str


class Peer(ABC):
    """A queue that others made."""

    name: str
    key: str
    """Its name in figures: letters, digits and underscores."""
    what_runs: str
    """One line: what it does, and what it does not do that Lessor does."""
    jobs: int
    """Jobs that it drains in seconds."""
    quick_jobs: int | None = None
    """Jobs in a quick run; None: it is too slow, or too slow to start, for one."""

    @abstractmethod
    def install(self, timeout_s: float = INSTALL_TIMEOUT_S) -> None:
        """Installs it into its cache directory, once.

        Raises:
            Unavailable: It cannot be installed on this host.
        """

    @abstractmethod
    def measure(self, bench: Bench, jobs: int) -> PeerFigures:
        """Drains ``jobs`` jobs and begins :data:`SAMPLES` single ones, on a store of its own.

        Raises:
            Unavailable: It, or what it needs, is not installed or does not start.
        """


def cache_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Returns where peers are installed, of all checkouts of this user."""
    base = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lessor-bench"


class Installation:
    """A directory that a peer is installed into, whole or not at all."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def done(self) -> bool:
        """Whether it is complete."""
        return (self.directory / _INSTALLED).exists()

    def make(self, fill: Callable[[float], None], timeout_s: float) -> None:
        """Has ``fill`` fill the empty directory within the seconds it is given, unless that was done before.

        Raises:
            Unavailable: It failed; the next call starts anew.
        """
        if self.done:
            return
        shutil.rmtree(self.directory, ignore_errors=True)
        try:
            self.directory.mkdir(parents=True)
            fill(time.monotonic() + timeout_s)
            (self.directory / _INSTALLED).touch()
        except OSError as error:
            raise Unavailable(f"cannot write {self.directory}: {error}") from error

    def require(self) -> None:
        """Raises :class:`Unavailable` unless it is complete."""
        if not self.done:
            raise Unavailable("it is not installed")


def install_step(command: Sequence[str], cwd: Path, deadline: float) -> None:
    """Runs one step of an installation, until ``deadline`` of the monotonic clock.

    Raises:
        Unavailable: It failed, is not here or took too long.
    """
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=max(0.0, deadline - time.monotonic()),
        )
    except FileNotFoundError:
        raise Unavailable(f"{name} is not on this host") from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{name} did not install it in time") from None
    if done.returncode:
        raise Unavailable(f"{name} could not install it: {_last_line(done.stderr)}")


class PythonEnvironment:
    """A virtual environment with pinned distributions, made with this interpreter."""

    def __init__(self, name: str, version: str, requirements: Sequence[str]) -> None:
        self._name = f"{name}-{version}-py{sys.version_info.major}.{sys.version_info.minor}"
        self._requirements = requirements

    @property
    def installation(self) -> Installation:
        """Where it is."""
        return Installation(cache_directory() / self._name)

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.installation.directory / "bin" / "python"

    def install(self, timeout_s: float) -> None:
        """Makes it, unless it was made before.

        Raises:
            Unavailable: The distributions cannot be had, or not as wheels for this interpreter.
        """
        self.installation.make(self._fill, timeout_s)

    def _fill(self, deadline: float) -> None:
        directory = self.installation.directory
        install_step([sys.executable, "-m", "venv", str(directory)], directory, deadline)
        pip = [
            str(self.python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--only-binary",
            ":all:",
        ]
        install_step([*pip, *self._requirements], directory, deadline)


class PythonPeer(Peer):
    """A queue in Python, in an environment of its own; its program is ``workers/<key>_worker.py``."""

    version: str
    environment: PythonEnvironment

    def install(self, timeout_s: float = INSTALL_TIMEOUT_S) -> None:
        """Installs it with pip.

        Raises:
            Unavailable: It cannot be had.
        """
        self.environment.install(timeout_s)

    def ask(self, store: str, jobs: int, *more: object) -> PeerFigures:
        """Has its program measure.

        Args:
            store: URL of its database or broker.
            jobs: To be drained.
            more: Further arguments of the program.

        Raises:
            Unavailable: It failed or took too long.
        """
        program = WORKERS / f"{self.key}_worker.py"
        arguments = map(str, (self.environment.python, program, store, jobs, SAMPLES, *more))
        return figures(ask_worker(list(arguments)), jobs, self.version)


@contextmanager
def database(bench: Bench) -> Iterator[str]:
    """A durable PostgreSQL of its own with an empty database: gives its URL.

    Raises:
        Unavailable: It does not start.
    """
    directory = bench.scratch("peer-postgres")
    postgres = EmbeddedPostgres(directory / "data", settings=POSTGRES_SETTINGS)
    try:
        postgres.start()
    except EmbeddedPostgresError as error:
        shutil.rmtree(directory, ignore_errors=True)
        raise Unavailable(f"PostgreSQL does not start: {error}") from error
    try:
        yield postgres.database_url
    finally:
        postgres.stop()
        shutil.rmtree(directory, ignore_errors=True)


def ask_worker(command: Sequence[str], timeout_s: float = _WORKER_TIMEOUT_S) -> dict[str, Any]:
    """Runs a peer's program; returns the JSON object that it printed last. Nothing that it started is left.

    Raises:
        Unavailable: It failed or took too long; the message has the end of what it said.
    """
    worker = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, complaints = worker.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"its worker was not done within {timeout_s:g} s") from None
    finally:
        _kill_group(worker)
    if worker.returncode:
        raise Unavailable(f"its worker ended with {worker.returncode}: {_last_line(complaints)}")
    answer: dict[str, Any] = json.loads(said.splitlines()[-1])
    return answer


def figures(answer: Mapping[str, Any], jobs: int, version: str) -> PeerFigures:
    """Returns the figures in what a peer's program printed."""
    latencies_ms = [latency / 1e6 for latency in answer["latencies_ns"]]
    seconds = (answer["last_ns"] - answer["first_ns"]) / 1e9
    return PeerFigures(jobs, jobs / seconds, median(latencies_ms), percentile(latencies_ms, 0.99), version)


def _kill_group(worker: subprocess.Popen[str]) -> None:
    """Kills a program and all that it started."""
    # Suppressed where all of them have ended by themselves.
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
