"""``lessor dev``: Postgres, a server and agents on this machine, for trying things out.

Everything it starts is a child of this process and ends with it, jobs included.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from lessor.address import DEFAULT_ADDRESS
from lessor_server import children
from lessor_server.domain.errors import LessorServerError
from lessor_server.embedded import DataDirInUse, EmbeddedPostgres, EmbeddedPostgresError, default_data_dir
from lessor_server.store import migrate

_STOP_S = 10.0
_WATCH_S = 0.2
_MOST_AT_ONCE = 20
"""Development set-ups that may run side by side without naming a data directory."""

app = typer.Typer(name="lessor dev", add_completion=False, pretty_exceptions_enable=False)


class DevError(Exception):
    """It cannot start, or a part of it ended; the message says why."""


@dataclass(slots=True)
class Dev:
    """What runs, in the order it was started."""

    data_dir: Path
    address: str
    agents: list[subprocess.Popen[str]] = field(default_factory=list)
    server: subprocess.Popen[str] | None = None

    def parts(self) -> dict[str, subprocess.Popen[str]]:
        """Returns name → child."""
        named = {f"agent {number}": agent for number, agent in enumerate(self.agents, start=1)}
        return named if self.server is None else {"server": self.server, **named}


@app.command()
def run(
    agents: Annotated[int, typer.Option(min=0, max=64, help="How many agents to run.")] = 1,
    fake_gpus: Annotated[
        int | None,
        typer.Option(min=0, max=1024, help="GPUs that do not exist, per agent; the real ones are left alone."),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(help=f"HOST:PORT of the server.  [default: {DEFAULT_ADDRESS}, or a free port if it is taken]"),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where everything is kept between runs.  [default: one of this user's]")
    ] = None,
    ephemeral: Annotated[bool, typer.Option("--ephemeral", help="Keep nothing.")] = False,
    heartbeat: Annotated[str, typer.Option(help="How often agents renew; jobs with a short ttl need 2s.")] = "2s",
) -> None:
    """Runs Postgres, a server and agents until Ctrl-C. Nothing else is needed to try Lessor out."""
    if ephemeral and data_dir is not None:
        raise DevError("--ephemeral keeps nothing: leave out --data-dir, or --ephemeral")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        postgres, home = stack.enter_context(_postgres(data_dir, ephemeral))
        migrate.upgrade(postgres.database_url)
        dev = stack.enter_context(_running(postgres, home, listen, agents, fake_gpus, heartbeat))
        count = f"{agents} agent{'' if agents == 1 else 's'}"
        print(f"lessor is up with {count}: export LESSOR_ADDRESS={dev.address}   (Ctrl-C stops it)", flush=True)
        _watch(dev, postgres)


@contextlib.contextmanager
def _postgres(wanted: Path | None, ephemeral: bool) -> Iterator[tuple[EmbeddedPostgres, Path]]:
    """Starts Postgres; yields it and the directory for everything else."""
    if ephemeral:
        with (
            tempfile.TemporaryDirectory(prefix="lessor-dev-") as folder,
            EmbeddedPostgres(None, durable=False) as postgres,
        ):
            yield postgres, Path(folder)
        return
    base = wanted or default_data_dir().parent / "dev"
    for number in range(1, _MOST_AT_ONCE + 1):
        home = base if number == 1 else base.with_name(f"{base.name}-{number}")
        postgres = EmbeddedPostgres(home / "postgres")
        try:
            postgres.start()
        except DataDirInUse:
            if wanted is not None:
                raise
            continue
        try:
            yield postgres, home
        finally:
            postgres.stop()
        return
    raise DevError(f"{_MOST_AT_ONCE} of these run already: stop one, or give --data-dir")


@contextlib.contextmanager
def _running(
    postgres: EmbeddedPostgres, home: Path, listen: str | None, agents: int, fake_gpus: int | None, heartbeat: str
) -> Iterator[Dev]:
    logs = home / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    dev = Dev(home, "")
    try:
        dev.server, dev.address = _start_server(postgres, logs, listen)
        for number in range(1, agents + 1):
            dev.agents.append(_start_agent(dev, logs, number, fake_gpus, heartbeat))
        yield dev
    finally:
        # A second Ctrl-C must not leave half of it running.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for agent in dev.agents:
            if agent.poll() is None:
                agent.terminate()
        for agent in dev.agents:
            children.stop(agent, _STOP_S)
        if dev.server is not None:
            children.stop(dev.server, _STOP_S)


def _start_server(postgres: EmbeddedPostgres, logs: Path, listen: str | None) -> tuple[subprocess.Popen[str], str]:
    log = logs / "server.log"
    tries = [listen] if listen else [DEFAULT_ADDRESS, "127.0.0.1:0"]
    for last, address in enumerate(tries, start=1):
        environment = {"LESSOR_SERVER_DATABASE_URL": postgres.database_url}
        # By the environment, not by a flag: other users can read a command line.
        os.environ.update(environment)
        try:
            child = children.start(["-m", "lessor_server", "--listen", address], log, os.getpid())
        finally:
            for name in environment:
                del os.environ[name]
        try:
            return child, children.first_line(child, log).rpartition(" ")[2]
        except children.ChildEndedError as error:
            children.stop(child, _STOP_S)
            if last == len(tries) or "cannot listen" not in str(error):
                raise DevError(f"the server did not start: {str(error).removeprefix('error: ')}") from None
    raise AssertionError("unreachable")


def _start_agent(dev: Dev, logs: Path, number: int, fake_gpus: int | None, heartbeat: str) -> subprocess.Popen[str]:
    arguments = [
        "-m", "lessor_agent",
        "--address", dev.address,
        "--state-dir", str(dev.data_dir / "agents" / str(number)),
        "--name", f"dev-{number}",
        "--heartbeat", heartbeat,
        "--on-exit", "stop",
    ]  # fmt: skip
    if fake_gpus is not None:
        arguments += ["--fake-gpus", str(fake_gpus)]
    elif number > 1:
        # The real GPUs belong to one agent.
        arguments += ["--fake-gpus", "0"]
    return children.start(arguments, logs / f"agent-{number}.log", os.getpid())


def _watch(dev: Dev, postgres: EmbeddedPostgres) -> None:
    """Waits for Ctrl-C.

    Raises:
        DevError: A part of it ended by itself.
    """
    try:
        while True:
            for name, child in dev.parts().items():
                if child.poll() is not None:
                    log = dev.data_dir / "logs" / f"{name.replace(' ', '-')}.log"
                    raise DevError(
                        f"the {name} ended with code {child.returncode}: {children.last_line(log)} (see {log})"
                    )
            if not postgres.running:
                raise DevError(f"Postgres ended (see {postgres.data_dir})")
            time.sleep(_WATCH_S)
    except KeyboardInterrupt:
        print("stopping", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """Runs ``lessor dev`` with these arguments. Returns the exit code: 0, 1 (it cannot run) or 2 (usage)."""
    try:
        app(args=argv, prog_name="lessor dev", standalone_mode=False)
    except (DevError, EmbeddedPostgresError, LessorServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        # Click's usage errors carry their own text.
        if not hasattr(error, "format_message"):
            raise
        print(f"error: {error.format_message()}", file=sys.stderr)
        return 2
    return 0
