"""``lessor agent drain``: the host's own word, by the id in its state directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lessor.v1 import fleet_service_pb2
from lessor_agent.main import main
from lessor_agent.state_dir import StateDir
from tests.support.fake_services import FakeServer

pytestmark = pytest.mark.integration


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


@pytest.fixture
def state_dir(tmp_path: Path, server: FakeServer) -> Path:
    """That of an agent which the server knows, and which holds it at this moment."""
    with StateDir(tmp_path / "state") as state:
        agent = server.add_agent("alpha")
        agent.id = state.agent_id
    return tmp_path / "state"


def test_a_host_is_drained_and_put_back(
    server: FakeServer, state_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with StateDir(state_dir):
        # The agent itself runs: reading its id takes no lock.
        assert main(["drain", "--state-dir", str(state_dir), "--address", server.address]) == 0
    assert capsys.readouterr().out == "alpha\tdraining\t0\n"
    assert server.agent_rows["alpha"].drained
    monkeypatch.setenv("LESSOR_AGENT_STATE_DIR", str(state_dir))
    monkeypatch.setenv("LESSOR_AGENT_ADDRESS", server.address)
    assert main(["undrain"]) == 0
    assert not server.agent_rows["alpha"].drained


def test_jobs_that_still_run_are_waited_for(
    server: FakeServer, state_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.agent_rows["alpha"].lease_count = 1
    server.lease_rows.append(fleet_service_pb2.LeaseStatus(lease_id=1, job_id="j1"))
    here = ["--state-dir", str(state_dir), "--address", server.address]
    assert main(["drain", *here, "--no-wait"]) == 0
    assert main(["drain", *here, "--timeout", "0s"]) == 124
    assert "jobs had not ended on alpha" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--state-dir: is needed (or LESSOR_AGENT_STATE_DIR)"),
        (["--state-dir", "{empty}"], "no agent has lived in the state directory {empty}; give its own"),
        (["--state-dir", "{state}", "--timeout", "soon"], "--timeout"),
        (["--state-dir", "{state}", "--address", "nowhere:port"], "address: "),
    ],
    ids=["no_directory", "empty_directory", "timeout", "address"],
)
def test_a_mistake_is_one_line(
    flags: list[str], said: str, tmp_path: Path, state_dir: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("LESSOR_AGENT_STATE_DIR", raising=False)
    names = {"empty": tmp_path, "state": state_dir}
    assert main(["drain", *(flag.format(**names) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said.format(**names) in error


def test_a_host_that_the_server_has_never_seen(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with StateDir(tmp_path / "new"):
        pass
    assert main(["drain", "--state-dir", str(tmp_path / "new"), "--address", server.address]) == 3
    assert capsys.readouterr().err.startswith("error: no agent ")
