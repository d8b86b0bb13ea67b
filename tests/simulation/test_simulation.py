"""A short run of the simulation: seeds that found bugs, a fixed set, a few fresh ones, and that it works at all."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from lessor.lifecycle import LeasePhase
from lessor.v1 import agent_service_pb2 as pb
from lessor_agent.journal import Journal
from lessor_agent.protocol.actions import DropEvents, DropLease, Entry, PutEvent, PutHandle, PutLease, PutPhase
from lessor_agent.runtimes.base import Handle
from tests.simulation.cluster import Cluster
from tests.simulation.memory_journal import MemoryJournal
from tests.simulation.mutants import MUTANTS
from tests.simulation.scheduler import MAX_DRIFT_PPM, SECOND_NS, Clock
from tests.simulation.search import search
from tests.simulation.world import run
from tests.support.postgres import PostgresServer

pytestmark = pytest.mark.simulation

REGRESSIONS: dict[int, str] = {}
"""Seed → what it found. Listed in docs/verification.md."""

FIXED = range(1, 11)
FRESH = 3
"""CI runs more of them on their own: ``make sim SIM_SECONDS=180``."""

QUICKLY_FOUND = ("end-unfenced", "outbox-dropped", "revoke-ignored")
"""Planted bugs that few seeds find; all of them: ``make sim-mutants``."""


@pytest.fixture(scope="module")
def cluster(postgres_server: PostgresServer) -> Iterator[Cluster]:
    """Connections to a database of its own."""
    url = postgres_server.create_migrated()
    made = Cluster(url)
    yield made
    made.close()
    postgres_server.drop(url)


@pytest.mark.parametrize("seed", [*REGRESSIONS, *FIXED])
def test_a_known_seed_is_clean(cluster: Cluster, seed: int) -> None:
    assert run(cluster, seed).violation is None


def test_fresh_seeds_are_clean(cluster: Cluster) -> None:
    first = random.SystemRandom().randrange(1 << 40)
    for seed in range(first, first + FRESH):
        assert run(cluster, seed).violation is None, f"replay it with: make sim SEED={seed}"


def test_a_seed_takes_the_same_steps_each_time(cluster: Cluster) -> None:
    for seed in (3, 4):
        first, second = run(cluster, seed, keeps_trace=True), run(cluster, seed, keeps_trace=True)
        assert list(first.trace) == list(second.trace)
        assert first.digest == second.digest


@pytest.mark.parametrize("name", QUICKLY_FOUND)
def test_a_planted_bug_is_found(cluster: Cluster, name: str) -> None:
    mutant = next(mutant for mutant in MUTANTS if mutant.name == name)
    assert search(cluster, mutant, 1, limit=40) is not None


@pytest.mark.parametrize("rate_ppm", [-MAX_DRIFT_PPM, 0, 7, MAX_DRIFT_PPM])
def test_a_clock_rings_at_the_first_moment_it_shows_the_time(rate_ppm: int) -> None:
    clock = Clock(rate_ppm, 5 * SECOND_NS)
    for local_ns in (5 * SECOND_NS, 5 * SECOND_NS + 1, 17 * SECOND_NS, 123_456_789_012):
        real_ns = clock.real_ns(local_ns)
        assert clock.local_ns(real_ns) >= local_ns
        assert real_ns <= 0 or clock.local_ns(real_ns - 1) < local_ns


def test_the_journal_reads_like_the_real_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    groups: list[list[Entry]] = [
        [PutLease(7, "job-7", pb.Grant(job_id="job-7", lease_id=7).SerializeToString())],
        [
            PutHandle(7, Handle("process", 1, {"lease_id": 7})),
            PutPhase(7, LeasePhase.ACCEPTED),
            PutEvent(1, 7, pb.LeaseEvent(seq=1, lease_id=7, accepted=pb.Accepted()).SerializeToString()),
        ],
        [PutLease(8, "job-8", pb.Grant(job_id="job-8", lease_id=8).SerializeToString())],
        [
            PutEvent(2, 7, pb.LeaseEvent(seq=2, lease_id=7, running=pb.Running()).SerializeToString()),
            PutPhase(7, LeasePhase.RUNNING),
            DropEvents((1,)),
        ],
        [DropLease(8), PutEvent(3, 8, pb.LeaseEvent(seq=3, lease_id=8, released=pb.Released()).SerializeToString())],
        [DropEvents((3, 99)), PutPhase(99, LeasePhase.RUNNING)],
    ]
    for count in range(len(groups) + 1):
        real = Journal(tmp_path_factory.mktemp("journal") / "journal.db")
        real.open("boot-1")
        memory = MemoryJournal()
        memory.open("boot-1")
        for ticket, entries in enumerate(groups[:count]):
            real.submit(ticket, entries, lambda ticket, error: None)
            memory.commit(entries)
        real.close()
        assert real.open("boot-2") == memory.open("boot-2")
        real.close()
