"""A Lessor to measure: a durable PostgreSQL, servers and simulated fleets, each a process of its own."""

from __future__ import annotations

import json
import os
import platform
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil

from lessor.v1 import fleet_service_pb2_grpc, job_service_pb2_grpc
from lessor_server.embedded import EmbeddedPostgres

LESSOR = Path(sys.executable).with_name("lessor")
_UP_TIMEOUT_S = 60.0

POSTGRES_SETTINGS = {
    "shared_buffers": "1GB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "15min",
    "max_connections": "200",
}
"""What anyone would set on a host of this size. Commits are durable: fsync and synchronous_commit are on."""


class Unavailable(Exception):
    """Something a measurement needs is not on this host; the message says what."""


class Bench:
    """What scenarios share: how large they are, where they write, what they start."""

    def __init__(self, *, quick: bool, directory: Path) -> None:
        self.quick = quick
        self.directory = directory

    def scale(self, full: int, quick: int) -> int:
        """Returns the size to use in this run."""
        return quick if self.quick else full

    def say(self, line: str) -> None:
        """Tells how far a scenario is, on standard error: results alone go to standard output."""
        print(f"  … {line}", file=sys.stderr, flush=True)

    def scratch(self, name: str) -> Path:
        """Returns a new, empty directory."""
        made = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.directory))
        # PostgreSQL runs as a user of its own where we are root.
        made.chmod(0o755)
        return made

    @contextmanager
    def postgres(self, **settings: str) -> Iterator[Postgres]:
        """A PostgreSQL of its own with an empty, migrated database; gone afterwards."""
        directory = self.scratch("postgres")
        made = EmbeddedPostgres(directory / "data", settings={**POSTGRES_SETTINGS, **settings})
        made.start()
        try:
            url = made.database_url
            subprocess.run([LESSOR, "server", "migrate", "--database-url", url], check=True, stdout=subprocess.DEVNULL)
            yield Postgres(made, url)
        finally:
            made.stop()
            shutil.rmtree(directory, ignore_errors=True)

    @contextmanager
    def server(self, postgres: Postgres, *flags: str, **environment: str) -> Iterator[Server]:
        """``lessor server`` on a database; stopped afterwards."""
        server = Server(self, postgres, flags, environment)
        server.start()
        try:
            yield server
        finally:
            server.stop()

    @contextmanager
    def fleet(self, server: Server, agents: int, *, processes: int = 1, **options: Any) -> Iterator[Fleet]:
        """Simulated agents, connected when the block begins; killed when it ends. Options: see ``fleet.py``."""
        fleet = Fleet(self, server.address, agents, processes, options)
        fleet.start()
        try:
            yield fleet
        finally:
            fleet.kill()

    @contextmanager
    def system(self, agents: int, **fleet_options: Any) -> Iterator[tuple[Postgres, Server, Fleet]]:
        """PostgreSQL, one server and a fleet."""
        with ExitStack() as stack:
            postgres = stack.enter_context(self.postgres())
            server = stack.enter_context(self.server(postgres))
            fleet = stack.enter_context(self.fleet(server, agents, **fleet_options))
            yield postgres, server, fleet


class Postgres:
    """A running PostgreSQL."""

    def __init__(self, made: EmbeddedPostgres, url: str) -> None:
        self.made = made
        self.url = url

    def process(self) -> psutil.Process:
        """Returns its postmaster; the backends are its children."""
        pid = int((self.made.data_dir / "pgdata" / "postmaster.pid").read_text().split()[0])
        return psutil.Process(pid)

    def cpu_s(self) -> float:
        """Returns the CPU seconds used so far by all its processes that live, and by those that have ended."""
        postmaster = self.process()
        total = 0.0
        for process in (postmaster, *postmaster.children(recursive=True)):
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        own = postmaster.cpu_times()
        return total + own.children_user + own.children_system


class Server:
    """A ``lessor server``."""

    def __init__(
        self, bench: Bench, postgres: Postgres, flags: tuple[str, ...], environment: Mapping[str, str]
    ) -> None:
        self._bench = bench
        self._postgres = postgres
        self._flags = flags
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self.address = "127.0.0.1:0"
        """Where it listens, once started; kept over :meth:`kill` and :meth:`start`."""
        self.log = bench.scratch("server") / "server.log"

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Starts it and waits until it listens."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(LESSOR), "server", "--listen", self.address, "--log-level", "warning", *self._flags],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "LESSOR_SERVER_DATABASE_URL": self._postgres.url, **self._environment},
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode()
        if not line:
            raise RuntimeError(f"the server did not start:\n{self.log.read_text()}")
        self.address = line.split()[-1]

    def kill(self) -> None:
        """Kills it with SIGKILL, and whatever processes it started."""
        assert self._process is not None
        family = [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]
        for process in family:
            process.kill()
        self._process.wait()
        psutil.wait_procs(family)

    def stop(self) -> None:
        """Stops it as an operator would."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()

    def processes(self) -> list[psutil.Process]:
        """Returns its processes: itself, and its workers if it has any."""
        parent = psutil.Process(self.pid)
        return [parent, *parent.children(recursive=True)]

    def cpu_s(self) -> float:
        """Returns the CPU seconds used so far."""
        return sum(times.user + times.system for times in (p.cpu_times() for p in self.processes()))

    def rss_bytes(self) -> int:
        """Returns the resident memory."""
        return sum(int(process.memory_info().rss) for process in self.processes())

    def channel(self) -> grpc.Channel:
        """Returns a channel to it."""
        return grpc.insecure_channel(self.address, options=[("grpc.max_receive_message_length", 64 << 20)])

    def jobs(self, channel: grpc.Channel) -> job_service_pb2_grpc.JobServiceStub:
        """Returns a stub of JobService."""
        return job_service_pb2_grpc.JobServiceStub(channel)

    def fleet(self, channel: grpc.Channel) -> fleet_service_pb2_grpc.FleetServiceStub:
        """Returns a stub of FleetService."""
        return fleet_service_pb2_grpc.FleetServiceStub(channel)


class Fleet:
    """Simulated agents in processes of their own (``benchmarks.fleet``)."""

    def __init__(self, bench: Bench, address: str, agents: int, processes: int, options: Mapping[str, Any]) -> None:
        self._bench = bench
        self._address = address
        self.agents = agents
        self._shares = [agents // processes + (number < agents % processes) for number in range(processes)]
        self._options = options
        self._processes: list[subprocess.Popen[str]] = []
        self._answers: list[queue.Queue[dict[str, Any]]] = []
        self._log = bench.scratch("fleet") / "fleet.log"

    def start(self) -> None:
        """Starts the agents and waits until each was welcomed."""
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in self._options.items()]
        first = 0
        for share in self._shares:
            with self._log.open("a") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.fleet", f"--address={self._address}", f"--agents={share}",
                     f"--first={first}", *flags],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1,
                )  # fmt: skip
            first += share
            answers: queue.Queue[dict[str, Any]] = queue.Queue()
            threading.Thread(target=_read_lines, args=(process, answers), daemon=True).start()
            self._processes.append(process)
            self._answers.append(answers)
        for answers in self._answers:
            self._answer(answers, "up", _UP_TIMEOUT_S + self.agents * 0.02)

    def ask(self, command: str) -> list[dict[str, Any]]:
        """Has every process carry out a command; returns their answers. Commands: see ``fleet.py``."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(command + "\n")
            process.stdin.flush()
        return [self._answer(answers, command.split()[0], _UP_TIMEOUT_S) for answers in self._answers]

    def _answer(self, answers: queue.Queue[dict[str, Any]], kind: str, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                answer = answers.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                tail = self._log.read_text()[-4000:]
                raise RuntimeError(f"the simulated fleet did not answer {kind!r} in time:\n{tail}") from None
            if answer["event"] == kind:
                return answer

    def ended(self) -> int:
        """Returns how many leases have ended on the agents and were acked."""
        return sum(answer["ended"] for answer in self.ask("stats"))

    def cpu_s(self) -> float:
        """Returns the CPU seconds used so far."""
        total = 0.0
        for process in self._processes:
            times = psutil.Process(process.pid).cpu_times()
            total += times.user + times.system
        return total

    def kill(self) -> None:
        """Kills all agents at once, with SIGKILL."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()


def _read_lines(process: subprocess.Popen[str], answers: queue.Queue[dict[str, Any]]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        answers.put(json.loads(line))


def environment() -> dict[str, Any]:
    """Returns what of this host the figures depend on."""
    memory = psutil.virtual_memory().total
    return {
        "cpus": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "python": platform.python_version(),
        "grpcio": grpc.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }
