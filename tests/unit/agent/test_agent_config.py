"""The agent's settings, its state directory, and how it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from lessor_agent.config import ConfigError, parse_arguments
from lessor_agent.main import main
from lessor_agent.state_dir import StateDir, StateDirError

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LESSOR_")]:
        monkeypatch.delenv(name)


def test_flags_are_read_in_human_units() -> None:
    config = parse_arguments(
        [
            "--address",
            "localhost:7000",
            "--state-dir",
            "/var/x",
            "--name",
            "gpu-7",
            "--heartbeat",
            "500ms",
            "--label",
            "zone=a",
            "--label",
            "rack=7",
            "--cpu",
            "2500m",
            "--memory",
            "4GiB",
            "--fake-gpus",
            "8",
            "--env-allow",
            "HTTP_PROXY",
            "--env-allow",
            "NCCL_*",
        ]
    )
    assert str(config.address) == "localhost:7000"
    assert config.heartbeat == timedelta(milliseconds=500)
    assert config.labels == {"zone": "a", "rack": "7"}
    assert (config.cpu, config.memory, config.fake_gpus) == (2500, 4 << 30, 8)
    assert config.env_rules[-2:] == ("HTTP_PROXY", "NCCL_*")


def test_defaults() -> None:
    config = parse_arguments(["--state-dir", "/var/x"])
    assert str(config.address) == "127.0.0.1:7780"
    assert config.heartbeat == timedelta(seconds=5)
    assert (config.cpu, config.memory, config.fake_gpus, config.labels) == (None, None, None, {})


def test_variables_are_read_and_flags_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LESSOR_AGENT_STATE_DIR", "/from/env")
    monkeypatch.setenv("LESSOR_AGENT_HEARTBEAT", "2s")
    monkeypatch.setenv("LESSOR_AGENT_LABELS", "a=1,b=2")
    monkeypatch.setenv("LESSOR_AGENT_MEMORY", "1GiB")
    monkeypatch.setenv("LESSOR_ADDRESS", "127.0.0.1:9")
    config = parse_arguments(["--heartbeat", "3s"])
    assert config.state_dir == Path("/from/env")
    assert config.heartbeat == timedelta(seconds=3)
    assert config.labels == {"a": "1", "b": "2"}
    assert config.memory == 1 << 30
    assert str(config.address) == "127.0.0.1:9"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "--state-dir: is needed"),
        (["--state-dir", "/x", "--address", "gpu.example.com:1"], "--insecure"),
        (["--state-dir", "/x", "--address", "nonsense:port"], "--address"),
        (["--state-dir", "/x", "--heartbeat", "soon"], "--heartbeat"),
        (["--state-dir", "/x", "--heartbeat", "1ms"], "from 100ms to 5m"),
        (["--state-dir", "/x", "--memory", "4gb"], "--memory"),
        (["--state-dir", "/x", "--cpu", "-1"], ""),
        (["--state-dir", "/x", "--label", "novalue"], "key=value"),
        (["--state-dir", "/x", "--fake-gpus", "2000"], "--fake-gpus"),
        (["--state-dir", "/x", "--env-allow", "A B"], "is no variable"),
    ],
)
def test_a_wrong_setting_is_one_readable_line(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert says in error
    if says:
        assert error.count("\n") == 1


def test_another_host_may_be_reached_when_asked_for() -> None:
    flags = ["--state-dir", "/x", "--address", "gpu.example.com:1", "--insecure"]
    assert parse_arguments(flags).address.host == "gpu.example.com"


def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LESSOR_ADDRESS", "http://x")
    with pytest.raises(ConfigError, match="LESSOR_ADDRESS"):
        parse_arguments(["--state-dir", "/x"])


def test_a_state_dir_is_private_and_keeps_its_id(tmp_path: Path) -> None:
    with StateDir(tmp_path / "a" / "state") as state:
        first = state.agent_id
        # Jobs of other users, which only root can start, pass through to their own directory.
        assert state.path.stat().st_mode & 0o777 == (0o711 if os.geteuid() == 0 else 0o700)
        (state.path / "agent_id").chmod(0o644)
    with StateDir(tmp_path / "a" / "state") as state:
        assert state.agent_id == first
        assert (state.path / "agent_id").stat().st_mode & 0o777 == 0o600
    with StateDir(tmp_path / "other") as state:
        assert state.agent_id != first


def test_a_second_agent_is_told_who_has_it(tmp_path: Path) -> None:
    with StateDir(tmp_path), pytest.raises(StateDirError, match=f"pid {os.getpid()}"):
        StateDir(tmp_path)


def test_the_lock_goes_with_the_process(tmp_path: Path) -> None:
    code = "import sys, os; from pathlib import Path; from lessor_agent.state_dir import StateDir; "
    code += "StateDir(Path(sys.argv[1])); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 9
    with StateDir(tmp_path):
        pass


@pytest.mark.parametrize("place", ["file/below", "file"])
def test_a_state_dir_that_cannot_be_made_is_one_readable_line(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--state-dir", str(tmp_path / place)]) == 1
    error = capsys.readouterr().err
    assert "cannot use the state directory" in error
    assert "--state-dir" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("flags", [("--heartbeat", "abc"), ("--cpu", "abc"), ("--memory", "abc")])
def test_a_bad_flag_is_named_once(flags: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--state-dir", "/x", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {flags[0]}: ")
    assert error.count(flags[0].removeprefix("--")) == 1


def test_the_limit_of_open_files_is_raised_and_told() -> None:
    code = "import resource as r; from lessor.open_files import raise_open_files as f;"
    code += "h = r.getrlimit(r.RLIMIT_NOFILE)[1]; r.setrlimit(r.RLIMIT_NOFILE, (99, h));"
    code += "assert (f(), r.getrlimit(r.RLIMIT_NOFILE)) == (99, (h, h))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
