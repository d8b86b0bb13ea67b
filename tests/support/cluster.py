"""Real processes: the installed ``lessor`` server and agents on one database."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import lessor
from tests.support.processes import wait_gone

LESSOR = Path(sysconfig.get_path("scripts")) / "lessor"
TICKER = Path(__file__).with_name("ticker.py")


class Agent:
    """An agent's process and state directory."""

    def __init__(self, cluster: Cluster, name: str, flags: tuple[str, ...], environment: dict[str, str]) -> None:
        self._cluster = cluster
        self._flags = flags
        self._environment = environment
        self.name = name
        self.state_dir = cluster.directory / name
        self.process: subprocess.Popen[bytes] | None = None
        self.address = ""
        """Overrides the cluster's address, for a proxy in between."""

    def start(self) -> None:
        """Starts it, or starts it again on its state directory."""
        arguments = [
            "agent", "--address", self.address or self._cluster.address, "--state-dir", str(self.state_dir),
            "--name", self.name, "--heartbeat", "2s", *self._flags,
        ]  # fmt: skip
        self.process = self._cluster.spawn(self.name, arguments, self._environment)

    def kill(self) -> None:
        """Kills the agent alone, with SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def terminate(self) -> None:
        """Asks it to stop and waits."""
        assert self.process is not None
        self.process.terminate()
        self.process.wait(20)


class Cluster:
    """A server and agents. Everything that was started is gone after the test, keepers and jobs included."""

    def __init__(self, database_url: str, directory: Path) -> None:
        self.database_url = database_url
        self.directory = directory
        self.address = ""
        self.server: subprocess.Popen[bytes] | None = None
        self._started: list[subprocess.Popen[bytes]] = []
        self.agents: list[Agent] = []

    def spawn(
        self, name: str, arguments: list[str], environment: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Runs ``lessor`` with arguments; standard error goes to a file of the test's directory."""
        with (self.directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(LESSOR), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **(environment or {})},
            )
        self._started.append(process)
        return process

    async def start_server(self, listen: str = "127.0.0.1:0", *flags: str, **environment: str) -> None:
        """Starts the server and waits until it listens."""
        # Workers inherit the directory, so that they can be found again.
        own = {"LESSOR_SERVER_DATABASE_URL": self.database_url, "TMPDIR": str(self.directory)}
        self.server = self.spawn("server", ["server", "--listen", listen, *flags], {**own, **environment})
        assert self.server.stdout is not None
        line = await asyncio.to_thread(self.server.stdout.readline)
        assert line, (self.directory / "server.log").read_text()
        self.address = line.decode().split()[-1]

    async def kill_server(self) -> None:
        """Kills the server with SIGKILL."""
        assert self.server is not None
        self.server.kill()
        await asyncio.to_thread(self.server.wait)

    def agent(self, name: str, *flags: str, **environment: str) -> Agent:
        """Starts an agent."""
        made = Agent(self, name, flags, environment)
        self.agents.append(made)
        made.start()
        return made

    async def stop(self) -> None:
        """Ends everything, keepers and jobs included."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
            await asyncio.to_thread(process.wait)
            if process.stdout is not None:
                process.stdout.close()
        for pid in processes_of(self.directory):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            await asyncio.to_thread(wait_gone, pid)


def processes_of(directory: Path) -> list[int]:
    """Returns the processes whose command line or environment names the directory: keepers and jobs."""
    mark = str(directory).encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            if mark in (entry / "cmdline").read_bytes() or mark in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@asynccontextmanager
async def running_cluster(
    database_url: str, directory: Path, *flags: str, **environment: str
) -> AsyncIterator[Cluster]:
    """A cluster with a server, which may have flags and variables of its own; agents are the test's."""
    cluster = Cluster(database_url, directory)
    try:
        await cluster.start_server("127.0.0.1:0", *flags, **environment)
        yield cluster
    finally:
        await cluster.stop()


async def submit_ticker(client: lessor.AsyncClient, ticks: Path, seconds: float, **options: Any) -> str:
    """Submits a job that writes its life into ``ticks``; returns its id. Its ttl is the shortest there is."""
    ticks.mkdir(exist_ok=True)
    ticks.chmod(0o777)
    options.setdefault("ttl", "10s")
    job = await client.submit([sys.executable, str(TICKER), str(ticks), str(seconds)], **options)
    return job.id


def lives(ticks: Path) -> dict[int, list[tuple[str, int]]]:
    """Returns fencing token → (what, CLOCK_BOOTTIME ns) of each attempt, in token order."""
    found = {}
    for file in sorted(ticks.iterdir(), key=lambda f: int(f.name)):
        # A killed writer may leave half a line.
        lines = [line.split() for line in file.read_text().splitlines()]
        found[int(file.name)] = [(line[0], int(line[1])) for line in lines if len(line) == 2]
    return found


def assert_no_overlap(ticks: Path) -> None:
    """Each attempt's last sign of life is before the next one's first."""
    attempts = list(lives(ticks).values())
    for earlier, later in itertools.pairwise(attempts):
        assert earlier[-1][1] < later[0][1], "two attempts lived at once"


async def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Waits until something that the test can only look at has happened."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - there is no event: another process writes a file
            await asyncio.sleep(0.01)
