"""The processes of a chaos run: PostgreSQL, replicas, agents; each can be killed, stopped and started again."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg

import lessor
from lessor_server.embedded import EmbeddedPostgres
from tests.chaos import audit
from tests.chaos.network import Cable, SmallDisk
from tests.chaos.overlay import Edit, make_overlay
from tests.chaos.relay import Relay
from tests.support.cluster import LESSOR, processes_of
from tests.support.processes import wait_gone

_START_S = 60.0
_SUPERVISED_EVERY_S = 0.5
_POSTGRES = {
    "max_connections": "200",
    # A process that is killed loses nothing of this; what was answered must survive its kill.
    "synchronous_commit": "on",
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "64MB",
    "max_wal_senders": "0",
    "wal_level": "minimal",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """How large a world is, and what of it is real."""

    agents: int = 4
    replicas: int = 2
    cpus: int = 6
    """Jobs of one CPU that an agent runs at once."""
    gpus: int = 2
    """Of each agent; they do not exist."""
    networks: bool = True
    """Each agent has a network namespace and a small disk; needs root. Else all is on loopback."""
    heartbeat: str = "2s"
    """Fits the shortest ttl there is, 10 s."""
    edits: Sequence[Edit] = ()
    """What is planted in the packages."""


class Program:
    """One process at a time of ``lessor``, started with the same words each time."""

    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self._world = world
        self.process: subprocess.Popen[bytes] | None = None
        self.wanted = False
        """It is to run: whoever supervises it starts it again when it ends by itself."""

    def words(self) -> list[str]:
        """Returns the command line."""
        raise NotImplementedError

    def start(self) -> None:
        """Starts it; nothing happens if it runs."""
        self.wanted = True
        if self.running:
            return
        with (self._world.directory / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.words(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._world.environment,
                # What happens to the harness's terminal is no fault of the schedule.
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether it runs, or stands still."""
        return self.process is not None and self.process.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Sends a signal; nothing happens if it does not run."""
        if self.process is not None:
            self.process.send_signal(number)

    async def kill(self) -> None:
        """Kills it with SIGKILL, and it alone."""
        self.wanted = False
        if self.process is not None:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)

    async def terminate(self, patience_s: float = 15.0) -> None:
        """Asks it to stop and waits; kills it if it does not."""
        self.wanted = False
        if self.process is None:
            return
        self.process.terminate()
        try:
            await asyncio.to_thread(self.process.wait, patience_s)
        except subprocess.TimeoutExpired:
            await self.kill()


class Replica(Program):
    """A server process, at the same port each time."""

    def __init__(self, world: World, number: int) -> None:
        super().__init__(world, f"server-{number}")
        self.number = number
        self.port = free_port()

    def words(self) -> list[str]:
        """See :meth:`Program.words`."""
        return [str(LESSOR), "server", "--listen", f"0.0.0.0:{self.port}", "--insecure"]

    async def listens(self) -> None:
        """Returns once it takes connections."""
        async with asyncio.timeout(_START_S):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                except OSError:
                    if not self.running:
                        raise WorldBroken(f"{self.name} did not start, see its log") from None
                    await asyncio.sleep(0.05)
                else:
                    writer.close()
                    return


class AgentHost(Program):
    """An agent process on a state directory, with its own way to the replicas."""

    def __init__(self, world: World, number: int) -> None:
        super().__init__(world, f"agent-{number}")
        self.number = number
        self.state_dir = world.directory / f"state-{number}"
        networks = world.shape.networks
        self.cable = Cable(number) if networks else None
        self.disk = SmallDisk(self.state_dir) if networks else None
        self.relay = Relay(world.targets, self.cable.host if self.cable else "127.0.0.1")
        # One agent in three speaks to a replica itself: then its connection, not the relay's, is what breaks.
        self._direct = world.replicas[number % len(world.replicas)] if networks and number % 3 == 2 else None
        self.labels = f"host={self.name}"

    def words(self) -> list[str]:
        """See :meth:`Program.words`."""
        address = self.relay.address
        if self._direct is not None and self.cable is not None:
            address = f"{self.cable.host}:{self._direct.port}"
        shape = self._world.shape
        return [
            *(self.cable.enter if self.cable else []), str(LESSOR), "agent", "--address", address, "--insecure",
            "--state-dir", str(self.state_dir), "--name", self.name, "--heartbeat", shape.heartbeat,
            "--label", self.labels, "--cpu", str(shape.cpus), "--memory", "8GiB", "--fake-gpus", str(shape.gpus),
        ]  # fmt: skip

    async def lay(self) -> None:
        """Makes its network, disk and relay."""
        if self.cable is not None:
            self.cable.lay()
        if self.disk is not None:
            self.disk.mount()
        await self.relay.open()

    async def clear_away(self) -> None:
        """Removes its network and disk; nothing of it runs any more."""
        await self.relay.close()
        if self.disk is not None:
            self.disk.unmount()
        if self.cable is not None:
            self.cable.remove()


class WorldBroken(Exception):
    """The harness itself cannot go on; the message says why."""


@dataclass
class World:
    """Everything that runs. Made by :func:`running_world`, gone with it."""

    directory: Path
    shape: Shape
    rng: random.Random
    """For choices that the schedule does not make: which replica takes a connection."""
    environment: dict[str, str] = field(default_factory=dict)
    replicas: list[Replica] = field(default_factory=list)
    agents: list[AgentHost] = field(default_factory=list)
    died: list[str] = field(default_factory=list)
    """Programs that ended by themselves, each time they did."""

    def __post_init__(self) -> None:
        self.diaries = self.directory / "diaries"
        self.postgres = EmbeddedPostgres(
            self.directory / "postgres", port=free_port(), settings=_POSTGRES, durable=False
        )
        self.front = Relay(self.targets)
        """By which clients reach a replica that lives."""

    def targets(self) -> list[tuple[str, int]]:
        """Returns where a relay may connect to, in the order to try."""
        return [("127.0.0.1", replica.port) for replica in self.rng.sample(self.replicas, len(self.replicas))]

    def client(self) -> lessor.AsyncClient:
        """Returns a client that reaches whatever replica lives."""
        return lessor.AsyncClient(self.front.address, timeout=90)

    @asynccontextmanager
    async def database(self) -> AsyncIterator[asyncpg.Connection]:
        """Opens a connection of the harness's own.

        Raises:
            OSError, asyncpg.PostgresError: The database is out of reach just now.
        """
        connection = await asyncpg.connect(self.postgres.database_url, timeout=5, command_timeout=30)
        try:
            yield connection
        finally:
            connection.terminate()

    async def begin(self) -> None:
        """Starts everything, and returns once every agent has a session."""
        self.diaries.mkdir()
        overlay = await asyncio.to_thread(make_overlay, self.directory / "packages", self.shape.edits)
        await asyncio.to_thread(self.postgres.start)
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(overlay),
            "LESSOR_SERVER_DATABASE_URL": self.postgres.database_url,
            "TMPDIR": str(self.directory),
        }
        await self._migrate()
        async with self.database() as connection:
            await connection.execute(audit.WATCH)
        self.replicas += [Replica(self, number) for number in range(self.shape.replicas)]
        self.agents += [AgentHost(self, number) for number in range(self.shape.agents)]
        for replica in self.replicas:
            replica.start()
        await self.front.open()
        for agent in self.agents:
            await agent.lay()
        for replica in self.replicas:
            await replica.listens()
        for agent in self.agents:
            agent.start()
        async with asyncio.timeout(_START_S), self.database() as connection:
            # Other processes write it: there is no event.
            while await connection.fetchval("SELECT count(*) FROM session") < len(self.agents):  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def _migrate(self) -> None:
        # By a process of its own: Alembic's state is global, and two worlds may begin side by side.
        migration = await asyncio.create_subprocess_exec(
            str(LESSOR), "server", "migrate", env=self.environment, stdout=asyncio.subprocess.DEVNULL
        )
        if await migration.wait():
            raise WorldBroken("the database cannot be migrated: the error stands above")

    async def supervise(self) -> None:
        """Starts what has ended by itself again, as the host's service manager would, until cancelled."""
        while True:
            for program in (*self.replicas, *self.agents):
                if program.wanted and not program.running:
                    self.died.append(program.name)
                    program.start()
            await asyncio.sleep(_SUPERVISED_EVERY_S)

    async def end(self) -> None:
        """Ends everything, keepers and jobs included."""
        for program in (*self.agents, *self.replicas):
            await program.kill()
        await self.front.close()
        await asyncio.to_thread(self._end_the_rest)
        await asyncio.to_thread(self.postgres.stop)
        for agent in self.agents:
            await agent.clear_away()

    def _end_the_rest(self) -> None:
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            wait_gone(pid)

    def processes(self) -> list[int]:
        """Returns everything of this world that runs, but for PostgreSQL: servers, agents, keepers, jobs."""
        database = str(self.postgres.data_dir).encode()
        return [pid for pid in processes_of(self.directory) if database not in read_proc(pid, "cmdline")]


def read_proc(pid: int, name: str) -> bytes:
    """Returns a file of a process; empty once it is gone."""
    try:
        return Path("/proc", str(pid), name).read_bytes()
    except OSError:
        return b""


def free_port() -> int:
    """Returns a TCP port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def running_world(directory: Path, shape: Shape, seed: int) -> AsyncIterator[World]:
    """A world in ``directory / "world"``, by whose name its processes are known; the directory is empty."""
    directory.chmod(0o755)
    (directory / "world").mkdir(mode=0o755)
    world = World(directory / "world", shape, random.Random(seed))
    try:
        await world.begin()
        yield world
    finally:
        await world.end()
