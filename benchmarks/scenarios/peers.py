"""Peers: other queues drain no-op jobs and begin single ones, on this host in this run."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.peers import PEERS, Peer
from benchmarks.report import Result
from benchmarks.system import Bench, Unavailable

TITLE = "other queues on this host"
QUICK = True

_QUICK_INSTALL_S = 15.0
_INSTALL_S = 300.0


def run(bench: Bench) -> Result:
    """Runs the scenario."""
    return measure(bench, PEERS)


def measure(bench: Bench, peers: Iterable[Peer]) -> Result:
    """Measures peers one after the other; one that is not to be had here leaves a note and no figures."""
    result = Result("peers", TITLE)
    for peer in peers:
        jobs = peer.quick_jobs if bench.quick else peer.jobs
        if jobs is None:
            result.notes.append(f"{peer.name}: left out of the quick run")
            continue
        bench.say(peer.name)
        try:
            peer.install(_QUICK_INSTALL_S if bench.quick else _INSTALL_S)
            found = peer.measure(bench, jobs)
        except Unavailable as missing:
            result.notes.append(f"{peer.name}: left out: {missing}")
            continue
        result.rows.append(
            {
                "peer": peer.name,
                "jobs": found.jobs,
                "drained jobs/s": found.drained_per_s,
                "start p50 ms": found.start_p50_ms,
                "start p99 ms": found.start_p99_ms,
                "version": found.version,
                "what runs": peer.what_runs,
            }
        )
        result.figures[f"drained_per_s.{peer.key}"] = found.drained_per_s
        result.figures[f"start_p50_ms.{peer.key}"] = found.start_p50_ms
        result.figures[f"start_p99_ms.{peer.key}"] = found.start_p99_ms
    result.notes.append(
        "drained: from the first job begun to the last begun, all stored before; start: from the submit of a single "
        "job to its begin on an idle system. Ends that are committed later are not waited for."
    )
    return result
