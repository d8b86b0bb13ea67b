"""How soon watchers hear of a change, and what that costs the server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.load import no_op
from benchmarks.report import Result, percentile
from benchmarks.system import Bench, Postgres, Server
from benchmarks.watchers import Watchers
from lessor.v1 import job_pb2
from lessor.v1 import job_service_pb2 as pb

_PROBE_EVERY_S = 0.1
_HEARD_TIMEOUT_S = 30.0


@dataclass
class Cpu:
    """CPU and time of one stretch of the measurement."""

    server: Server
    postgres: Postgres

    def __post_init__(self) -> None:
        self._before = (time.monotonic(), self.server.cpu_s(), self.postgres.cpu_s())

    def shares(self) -> tuple[float, float]:
        """Returns what the server and what PostgreSQL used of one core since it was made."""
        began, server_s, postgres_s = self._before
        seconds = time.monotonic() - began
        return (self.server.cpu_s() - server_s) / seconds, (self.postgres.cpu_s() - postgres_s) / seconds


class Watching:
    """Times how soon watchers hear of a change."""

    def __init__(self, bench: Bench, postgres: Postgres, server: Server, stub: Any, result: Result) -> None:
        self._bench = bench
        self._postgres = postgres
        self._server = server
        self._stub = stub
        self._result = result

    def run(
        self,
        what: str,
        figure: str,
        requests: Sequence[dict[str, Any]],
        probe: Callable[[int], str],
        state: job_pb2.JobState.ValueType,
        listeners: int,
    ) -> None:
        """Opens the watches, makes changes one after the other, and asks who heard of them when.

        Args:
            what: For the table.
            figure: Begins the names of the figures.
            requests: One per watcher.
            probe: Makes the change of that number; returns the job.
            state: What the job then is.
            listeners: So many watchers hear of each change.
        """
        probes = self._bench.scale(100, 20)
        with Watchers(self._server.address) as watchers:
            watchers.watch(requests)
            before = watchers.count()
            cpu = Cpu(self._server, self._postgres)
            began: dict[str, int] = {}
            pause = threading.Event()
            for number in range(probes):
                began_ns = time.monotonic_ns()
                began[probe(number)] = began_ns
                # One after the other, and evenly.
                pause.wait(max(0.0, _PROBE_EVERY_S - (time.monotonic_ns() - began_ns) / 1e9))
            server_share, postgres_share = cpu.shares()
            after = watchers.count()
            heard = _heard(watchers, state, list(began), listeners)
        took_ms = [(at - began[job_id]) / 1e6 for job_id, times in heard.items() for at in times]
        seconds = probes * _PROBE_EVERY_S
        self._result.rows.append(
            {
                "what": what,
                "calls": len(took_ms),
                "p50 ms": percentile(took_ms, 0.5),
                "p99 ms": percentile(took_ms, 0.99),
                "changes/s": (after[0] - before[0]) / seconds,
                "messages/s": (after[1] - before[1]) / seconds,
                "server cores": server_share,
                "postgres cores": postgres_share,
            }
        )
        self._result.figures[f"{figure}_p50_ms"] = percentile(took_ms, 0.5)
        self._result.figures[f"{figure}_p99_ms"] = percentile(took_ms, 0.99)
        self._result.figures[f"{figure}_server_cores"] = server_share

    def cancel(self, job_ids: Sequence[str]) -> Callable[[int], str]:
        """Returns a probe that cancels one of these jobs."""

        def probe(number: int) -> str:
            self._stub.CancelJobs(pb.CancelJobsRequest(job_ids=[job_ids[number]]))
            return job_ids[number]

        return probe

    def submit(self, queues: Sequence[str]) -> Callable[[int], str]:
        """Returns a probe that submits a job nobody can run, to one of the queues."""

        def probe(number: int) -> str:
            spec = no_op(queues[number % len(queues)], gpus=8)
            job_id: str = self._stub.SubmitJob(pb.SubmitJobRequest(spec=spec)).job_id
            return job_id

        return probe


def _heard(
    watchers: Watchers, state: job_pb2.JobState.ValueType, job_ids: Sequence[str], listeners: int
) -> dict[str, list[int]]:
    """Returns job → when each of the watchers heard of it, once all of them have.

    Raises:
        RuntimeError: They have not in time.
    """
    deadline_s = time.monotonic() + _HEARD_TIMEOUT_S
    while True:
        heard = watchers.seen(state, job_ids)
        missing = sum(listeners - len(times) for times in heard.values())
        if not missing:
            return heard
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"of {len(job_ids) * listeners} changes {missing} were not heard of")
        threading.Event().wait(0.1)
