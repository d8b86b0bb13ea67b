"""A steady trickle of no-op jobs, beside which other things are measured."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence

from benchmarks.system import Server
from lessor.v1 import job_pb2
from lessor.v1 import job_service_pb2 as pb


class Load:
    """Submits no-op jobs at a steady rate from a thread of its own while the block runs."""

    def __init__(self, server: Server, queues: Sequence[str], per_s: int, *, batch: int = 10) -> None:
        self._server = server
        self._queues = queues
        self._per_s = per_s
        self._batch = batch
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.submitted = 0

    def __enter__(self) -> Load:
        """Begins."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        queues = itertools.cycle(self._queues)
        period_s = self._batch / self._per_s
        due_s = time.monotonic()
        with self._server.channel() as channel:
            stub = self._server.jobs(channel)
            while not self._stop.wait(max(0.0, due_s - time.monotonic())):
                specs = [no_op(next(queues)) for _ in range(self._batch)]
                stub.SubmitJobs(pb.SubmitJobsRequest(specs=specs))
                self.submitted += self._batch
                due_s += period_s


def no_op(queue: str, *, gpus: int = 0) -> job_pb2.JobSpec:
    """Returns a job that ends at once, where there is an agent with so many GPUs."""
    resources = job_pb2.Resources(gpu_count=gpus) if gpus else None
    return job_pb2.JobSpec(queue=queue, command=job_pb2.Command(argv=["/bin/true"]), resources=resources)
