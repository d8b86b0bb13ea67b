"""The systemd units: what jobs depend on stands in them, and systemd understands them."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
NAMES = ("lessor-server.service", "lessor-agent.service")


def read(name: str) -> configparser.ConfigParser:
    unit = configparser.ConfigParser(strict=True, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(UNITS / name)
    return unit


def test_a_restart_of_the_agent_ends_no_job() -> None:
    service = read("lessor-agent.service")["Service"]
    assert service["KillMode"] == "process"
    assert service["OOMPolicy"] == "continue"
    assert service["Delegate"] == "yes"
    # A sandbox of the agent would be one of its jobs, and PrivateTmp would go with the agent.
    for forbidden in ("PrivateTmp", "ProtectSystem", "ProtectHome", "NoNewPrivileges", "RuntimeMaxSec", "PAMName"):
        assert forbidden not in service


def test_the_agent_keeps_its_state_where_it_is_told() -> None:
    service = read("lessor-agent.service")["Service"]
    assert service["StateDirectory"] == "lessor-agent"
    assert "--state-dir %S/lessor-agent" in service["ExecStart"]


def test_the_server_keeps_its_secrets_off_the_command_line() -> None:
    service = read("lessor-server.service")["Service"]
    assert service["EnvironmentFile"] == "/etc/lessor/server.env"
    assert "database" not in service["ExecStart"]


@pytest.mark.parametrize("name", NAMES)
def test_they_come_back_always(name: str) -> None:
    unit = read(name)
    assert unit["Service"]["Restart"] == "always"
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    assert unit["Install"]["WantedBy"] == "multi-user.target"


@pytest.mark.parametrize("name", NAMES)
def test_systemd_understands_them(name: str, tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("needs systemd-analyze")
    # It looks for the program too, which is installed nowhere here.
    unit = tmp_path / name
    unit.write_text((UNITS / name).read_text().replace("/opt/lessor/bin/lessor", sys.executable))
    done = subprocess.run([analyze, "verify", "--man=no", unit], capture_output=True, text=True, timeout=60)
    complaints = [line for line in done.stderr.splitlines() if name in line]
    assert complaints == []
