"""A fake server per test, and ways to run the command line against it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import pytest
from typer.testing import CliRunner

import lessor
from lessor.cli.main import app
from lessor.sdk.connection import Patience
from tests.support.fake_services import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


@pytest.fixture
def client(server: FakeServer) -> Iterator[lessor.Client]:
    with lessor.Client(server.address, timeout=60) as made:
        yield made


@pytest.fixture
def one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients try once: the wait before a second try would take longer than their timeouts."""
    monkeypatch.setattr(Patience, "backoff", lambda patience, tries: timedelta(days=1))


@dataclass
class Ran:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(server: FakeServer) -> Callable[..., Ran]:
    """Runs ``lessor`` in this process, as in a pipe."""

    def run(*argv: str, stdin: str | None = None, address: str | None = None) -> Ran:
        result = CliRunner().invoke(app, list(argv), input=stdin, env={"LESSOR_ADDRESS": address or server.address})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ran(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def lessor_command(server: FakeServer) -> Callable[..., subprocess.Popen[bytes]]:
    """Starts the installed ``lessor`` as a process of its own, its output in pipes."""

    def start(*argv: str, **options: object) -> subprocess.Popen[bytes]:
        process: subprocess.Popen[bytes] = subprocess.Popen(
            [sys.executable, "-c", "import sys; from lessor.cli.main import main; sys.exit(main())", *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "LESSOR_ADDRESS": server.address, "COLUMNS": "200"},
            **options,  # type: ignore[call-overload]
        )
        return process

    return start
