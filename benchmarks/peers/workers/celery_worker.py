"""Celery, measured: submits no-op jobs, has its worker drain them, then begins single ones. Prints one JSON object.

Runs with the Python of Celery's environment. Arguments: the broker's URL, jobs to drain, jobs to begin one at a time,
worker processes, an empty directory.
"""

from __future__ import annotations

import json
import os
import select
import signal
import struct
import subprocess
import sys
from pathlib import Path
from time import monotonic_ns

RECORD = struct.Struct("=q")


class Begun:
    """What the worker's processes write when they begin a job."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        # Read and write: opening does not wait for the worker.
        self._pipe = os.open(path, os.O_RDWR)

    def read(self, jobs: int, worker: subprocess.Popen[bytes]) -> list[int]:
        """Returns when each of the next ``jobs`` jobs began, in ns of CLOCK_MONOTONIC, once all have.

        Raises:
            RuntimeError: The worker ended before.
        """
        read = bytearray()
        while len(read) < RECORD.size * jobs:
            if select.select([self._pipe], [], [], 1.0)[0]:
                read += os.read(self._pipe, RECORD.size * jobs - len(read))
            elif worker.poll() is not None:
                raise RuntimeError(f"Celery's worker ended with {worker.returncode}")
        return [moment for (moment,) in RECORD.iter_unpack(read)]


def main(broker: str, jobs: int, samples: int, processes: int, directory: Path) -> dict[str, object]:
    """Measures; returns what is printed."""
    path = directory / "begun"
    os.environ.update(PEER_BROKER=broker, PEER_PIPE=str(path))
    begun = Begun(path)
    # Not at the top: the application reads at its import what was set above.
    from celery_app import app, task  # type: ignore[import-not-found,unused-ignore]

    with app.producer_or_acquire() as producer:
        for _ in range(jobs):
            task.apply_async(producer=producer)
    command = [
        sys.executable, "-m", "celery", "--app", "celery_app", "worker", "--pool", "prefork",
        "--concurrency", str(processes), "--optimization", "fair", "--without-gossip", "--without-mingle",
        "--without-heartbeat", "--loglevel", "ERROR",
    ]  # fmt: skip
    worker = subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.DEVNULL)
    try:
        drained = begun.read(jobs, worker)
        latencies_ns = []
        for _ in range(samples):
            submitted = monotonic_ns()
            task.apply_async()
            latencies_ns.append(begun.read(1, worker)[0] - submitted)
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait()
    return {"first_ns": min(drained), "last_ns": max(drained), "latencies_ns": latencies_ns}


if __name__ == "__main__":
    url, drained_jobs, single_jobs, concurrency, scratch = sys.argv[1:]
    print(json.dumps(main(url, int(drained_jobs), int(single_jobs), int(concurrency), Path(scratch))))
