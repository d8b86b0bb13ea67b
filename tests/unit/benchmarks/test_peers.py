"""Peers: the registry is well-formed, and one that cannot be had is a note, never an error."""

from __future__ import annotations

import os
import select
import sys
import time
from pathlib import Path

import pytest

from benchmarks.peers import PEERS, Peer, PeerFigures
from benchmarks.peers.peer import (
    Installation,
    PythonEnvironment,
    ask_worker,
    cache_directory,
    figures,
    install_step,
)
from benchmarks.scenarios import peers as scenario
from benchmarks.system import Bench, Unavailable

pytestmark = pytest.mark.unit

SOON_S = 30.0


class FakePeer(Peer):
    """A peer that needs nothing."""

    what_runs = "nothing"
    jobs = 1000
    quick_jobs: int | None = 10

    def __init__(self, name: str, *, missing: str = "", broken: str = "") -> None:
        self.name = self.key = name
        self._missing = missing
        self._broken = broken

    def install(self, timeout_s: float = SOON_S) -> None:
        if self._missing:
            raise Unavailable(self._missing)

    def measure(self, bench: Bench, jobs: int) -> PeerFigures:
        if self._broken:
            raise Unavailable(self._broken)
        return PeerFigures(jobs, 500.0, 1.0, 2.0, "1.2.3")


class SlowPeer(FakePeer):
    """One that is too slow for a quick run."""

    quick_jobs = None


def test_registry_names_every_peer_once_and_bounds_its_jobs() -> None:
    assert len({peer.name for peer in PEERS}) == len({peer.key for peer in PEERS}) == len(PEERS) == 5
    for peer in PEERS:
        assert peer.key.isidentifier()
        assert "no remote agent, no lease" in peer.what_runs
        assert peer.jobs > 0
        assert peer.quick_jobs is None or 0 < peer.quick_jobs < peer.jobs


def test_quick_run_has_the_fast_peers_only() -> None:
    quick = [peer.key for peer in PEERS if peer.quick_jobs is not None]
    assert quick == ["graphile_worker_local_queue", "graphile_worker", "pgqueuer"]


def test_measured_peers_are_rows_and_figures(tmp_path: Path) -> None:
    result = scenario.measure(Bench(quick=False, directory=tmp_path), [FakePeer("one"), FakePeer("two")])
    assert [row["peer"] for row in result.rows] == ["one", "two"]
    assert [row["jobs"] for row in result.rows] == [1000, 1000]
    assert result.figures["drained_per_s.one"] == 500.0
    assert result.figures["start_p99_ms.two"] == 2.0


@pytest.mark.parametrize(
    "absent",
    [FakePeer("absent", missing="no registry"), FakePeer("absent", broken="no registry")],
    ids=["install", "run"],
)
def test_peer_that_cannot_be_had_is_a_note_and_the_others_are_measured(tmp_path: Path, absent: Peer) -> None:
    result = scenario.measure(Bench(quick=False, directory=tmp_path), [absent, FakePeer("here")])
    assert [row["peer"] for row in result.rows] == ["here"]
    assert "absent: left out: no registry" in result.notes
    assert "drained_per_s.absent" not in result.figures


def test_quick_run_measures_fewer_jobs_and_names_who_is_too_slow(tmp_path: Path) -> None:
    result = scenario.measure(Bench(quick=True, directory=tmp_path), [FakePeer("fast"), SlowPeer("slow")])
    assert [row["jobs"] for row in result.rows] == [10]
    assert "slow: left out of the quick run" in result.notes


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.key)
def test_peer_that_is_not_installed_says_so(peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(Unavailable, match="not installed"):
        peer.measure(Bench(quick=True, directory=tmp_path), 1)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.key)
def test_peer_whose_registry_is_out_of_reach_says_so_and_leaves_nothing_that_counts(
    peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No program is on the path, and no time is left for the interpreter's own steps.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(Unavailable):
        peer.install(timeout_s=0.0)
    with pytest.raises(Unavailable, match="not installed"):
        peer.measure(Bench(quick=True, directory=tmp_path), 1)


def test_peers_are_kept_in_the_users_cache() -> None:
    assert cache_directory({"XDG_CACHE_HOME": "/somewhere"}) == Path("/somewhere/lessor-bench")
    assert cache_directory({}) == Path.home() / ".cache" / "lessor-bench"


def test_environment_is_of_one_version_and_one_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = PythonEnvironment("peer", "1.2", []).installation.directory
    assert directory == tmp_path / "lessor-bench" / f"peer-1.2-py{sys.version_info.major}.{sys.version_info.minor}"


def test_installation_is_made_once(tmp_path: Path) -> None:
    made: list[float] = []
    installation = Installation(tmp_path / "peer")
    for _ in range(2):
        installation.make(made.append, SOON_S)
    assert len(made) == 1
    assert time.monotonic() < made[0] <= time.monotonic() + SOON_S
    installation.require()


def test_installation_that_failed_halfway_starts_anew(tmp_path: Path) -> None:
    installation = Installation(tmp_path / "peer")

    def fail(deadline: float) -> None:
        (installation.directory / "half").touch()
        raise Unavailable("broken off")

    with pytest.raises(Unavailable, match="broken off"):
        installation.make(fail, SOON_S)
    with pytest.raises(Unavailable, match="not installed"):
        installation.require()
    installation.make(lambda deadline: None, SOON_S)
    assert not (installation.directory / "half").exists()


def test_directory_that_cannot_be_written_makes_a_peer_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable, match="cannot write"):
        Installation(tmp_path / "file" / "peer").make(lambda deadline: None, SOON_S)


def test_install_steps_fail_with_a_reason(tmp_path: Path) -> None:
    soon = time.monotonic() + SOON_S
    with pytest.raises(Unavailable, match="no-such-program is not on this host"):
        install_step(["no-such-program"], tmp_path, soon)
    with pytest.raises(Unavailable, match="could not install it: no such package"):
        install_step([sys.executable, "-c", "import sys; sys.exit('first line\\nno such package\\n')"], tmp_path, soon)
    with pytest.raises(Unavailable, match="in time"):
        install_step([sys.executable, "-c", "input()"], tmp_path, time.monotonic())


def test_answer_is_the_last_line_that_a_worker_prints() -> None:
    assert ask_worker([sys.executable, "-c", "print('hello'); print('{\"first_ns\": 1}')"]) == {"first_ns": 1}


def test_worker_that_fails_says_why() -> None:
    with pytest.raises(Unavailable, match="ended with 1: ZeroDivisionError"):
        ask_worker([sys.executable, "-c", "1 / 0"])


def test_worker_that_hangs_is_given_up() -> None:
    with pytest.raises(Unavailable, match=r"not done within 0\.1 s"):
        ask_worker([sys.executable, "-c", "import threading; threading.Event().wait()"], timeout_s=0.1)


def test_nothing_that_a_worker_started_is_left(tmp_path: Path) -> None:
    path = tmp_path / "held"
    os.mkfifo(path)
    held = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    # The child holds the pipe's other end for as long as it lives, and its parent ends before it.
    program = (
        "import os, subprocess, sys\n"
        f"pipe = os.open({str(path)!r}, os.O_WRONLY)\n"
        "subprocess.Popen([sys.executable, '-c', 'import threading; threading.Event().wait()'], pass_fds=[pipe],\n"
        "                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "print('{}')\n"
    )
    assert ask_worker([sys.executable, "-c", program]) == {}
    assert select.select([held], [], [], SOON_S)[0]
    assert os.read(held, 1) == b""
    os.close(held)


def test_figures_are_those_of_the_workers_clock() -> None:
    latencies_ns = [number * 1_000_000 for number in range(1, 101)]
    answer = {"first_ns": 5_000_000_000, "last_ns": 7_000_000_000, "latencies_ns": latencies_ns}
    found = figures(answer, 1000, "1.0")
    assert found == PeerFigures(1000, 500.0, 50.5, 100.0, "1.0")
