"""The demo: a real training survives the loss of the agent it runs on.

    python examples/demo.py            # or: make demo

It starts an embedded Postgres, a server and two agents, submits
``examples/train_digits``, and kills the agent halfway: the agent alone, not the
job. The old attempt is stopped by its keeper before the lease expires, the
second agent resumes from the last checkpoint. Nothing is left running.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import asyncpg
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

import lessor
from lessor import timing
from lessor_agent.runtimes.process import find_keepers
from lessor_server import children
from lessor_server.embedded import EmbeddedPostgres
from lessor_server.store import migrate

HERE = Path(__file__).resolve().parent
AGENTS = ("agent-1", "agent-2")
TTL = timedelta(seconds=10)
HEARTBEAT = "2s"
KILL_AT = 0.5
LATENCY_RUNS = 30
STOP_S = 10.0

console = Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Tells what the demo does next."""
    console.print(f"[bold cyan]──[/] {text}")


class Fleet:
    """Postgres, a server and two agents in a temporary directory."""

    def __init__(self, directory: Path, database_url: str) -> None:
        self.directory = directory
        self.database_url = database_url
        self._environment = {"LESSOR_SERVER_DATABASE_URL": database_url}
        self.children: dict[str, subprocess.Popen[str]] = {}
        self.address = ""

    def start(self) -> None:
        """Starts the server and both agents."""
        os.environ.update(self._environment)
        log = self.directory / "server.log"
        self.children["server"] = children.start(["-m", "lessor_server", "--listen", "127.0.0.1:0"], log, os.getpid())
        self.address = children.first_line(self.children["server"], log).rpartition(" ")[2]
        for name in AGENTS:
            arguments = ["-m", "lessor_agent", "--address", self.address, "--name", name, "--heartbeat", HEARTBEAT,
                         "--state-dir", str(self.directory / name), "--on-exit", "stop"]  # fmt: skip
            self.children[name] = children.start(arguments, self.directory / f"{name}.log", os.getpid())

    def stop(self) -> None:
        """Stops all of it, agents first."""
        for child in reversed(self.children.values()):
            children.stop(child, STOP_S)


@contextlib.contextmanager
def running_fleet() -> Iterator[Fleet]:
    """A fleet that is gone after the block."""
    with tempfile.TemporaryDirectory(prefix="lessor-demo-") as folder:
        say("starting an embedded Postgres")
        with EmbeddedPostgres(None) as postgres:
            migrate.upgrade(postgres.database_url)
            fleet = Fleet(Path(folder), postgres.database_url)
            try:
                say("starting a server and two agents")
                fleet.start()
                yield fleet
            finally:
                fleet.stop()


def wait_for_agents(client: lessor.Client, count: int) -> None:
    """Waits until so many agents are connected."""
    deadline = time.monotonic() + 30
    while sum(agent.state == lessor.AgentState.ACTIVE for agent in client.agents()) < count:
        if time.monotonic() > deadline:
            raise SystemExit("the agents did not connect within 30 s")
        time.sleep(0.05)


def first_line_latency_ms(client: lessor.Client) -> float:
    """Returns the median time from submit to the first log line, with nothing else going on."""
    taken = []
    for _ in range(LATENCY_RUNS):
        begun = time.perf_counter()
        for _ in client.logs(client.submit(["echo", "hello"]), follow=True):
            taken.append((time.perf_counter() - begun) * 1000)
            break
        time.sleep(0.05)
    return statistics.median(taken)


class Show:
    """The job's log lines as they come, above a progress bar on a terminal."""

    def __init__(self, client: lessor.Client, job_id: str) -> None:
        self._client = client
        self._job_id = job_id
        self._progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task: TaskID = self._progress.add_task("training", total=1.0)
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Show:
        self._progress.start()
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.join(10)
        self._progress.stop()

    def moved(self, fraction: float) -> None:
        """Moves the bar."""
        self._progress.update(self._task, completed=fraction)

    def _read(self) -> None:
        rest: dict[tuple[int, lessor.LogStream | None], bytes] = {}
        for chunk in self._client.logs(self._job_id, follow=True):
            key = (chunk.attempt, chunk.stream)
            *lines, rest[key] = (rest.get(key, b"") + chunk.data).split(b"\n")
            for line in lines:
                console.print(f"   [dim]attempt {chunk.attempt} │[/] {line.decode(errors='replace')}", markup=True)


def train(client: lessor.Client, fleet: Fleet) -> lessor.Job:
    """Runs the training, kills its agent halfway, and returns the ended job."""
    work = fleet.directory / "training"
    work.mkdir()
    command = [sys.executable, "-u", str(HERE / "train_digits" / "train.py"), "--checkpoint-dir", str(work)]
    # Not frozen, as it would be by default: its agent never comes back, and nothing is to be left of it.
    job = client.submit(command, name="train-digits", ttl=TTL, max_losses=3, on_lease_lost="stop")
    say(f"submitted [bold]{job.id}[/]: examples/train_digits, 20 epochs, lease ttl {TTL.total_seconds():g} s")
    killed_at = 0.0
    with Show(client, job.id) as show:
        for change in client.watch(job.id, include_progress=True):
            if change.progress is not None and change.progress.fraction is not None:
                show.moved(change.progress.fraction)
                if not killed_at and change.progress.fraction >= KILL_AT:
                    killed_at = kill_agent_of(client, fleet, job.id)
            elif killed_at and change.attempt == 2 and change.state is lessor.JobState.LEASED:
                tell_take_over(client, fleet, job.id, killed_at)
            if change.state is not None and change.state.is_terminal:
                break
    return client.get(job)


def kill_agent_of(client: lessor.Client, fleet: Fleet, job_id: str) -> float:
    """Kills the agent that runs the job, and nothing else. Returns when (monotonic seconds)."""
    agent = client.get(job_id).agent or ""
    child = fleet.children[agent]
    say(f"halfway: kill -9 of [bold]{agent}[/] (process {child.pid}), the agent alone; its job is still alive")
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    margin = timing.margin(TTL)
    say(
        f"the job's keeper ends it within {(TTL - margin).total_seconds():g} s of the last renewal; "
        f"the server waits {(TTL + margin).total_seconds():g} s before it gives the job to another agent"
    )
    return time.monotonic()


def reassigned_after_ms(fleet: Fleet) -> int:
    """Returns how long after ttl + margin the lease of the dead agent's job was granted anew, in ms of lease time."""

    async def look() -> int:
        connection = await asyncpg.connect(fleet.database_url)
        try:
            waited = await connection.fetchval("SELECT offered_at - (SELECT min(renewed_at) FROM session) FROM lease")
        finally:
            await connection.close()
        return int(waited) - (TTL + timing.margin(TTL)) // timedelta(milliseconds=1)

    return asyncio.run(look())


def tell_take_over(client: lessor.Client, fleet: Fleet, job_id: str, killed_at: float) -> None:
    """Says who has the job now, and since when."""
    job = client.get(job_id)
    say(
        f"the lease expired; [bold]{job.agent}[/] has the job, {time.monotonic() - killed_at:.1f} s after the kill "
        f"and {reassigned_after_ms(fleet)} ms after ttl + margin (fencing token {job.lease_id})"
    )


def main() -> int:
    """Runs the demo. Returns the exit code."""
    begun = time.monotonic()
    with running_fleet() as fleet, lessor.Client(fleet.address) as client:
        wait_for_agents(client, 2)
        say(f"up after {time.monotonic() - begun:.1f} s: LESSOR_ADDRESS={fleet.address}")
        say(f"submit → first log line: median {first_line_latency_ms(client):.0f} ms of {LATENCY_RUNS} jobs")
        job = train(client, fleet)
        for attempt in client.attempts(job):
            error = f": {attempt.error.type}" if attempt.error else ""
            outcome = attempt.outcome.name if attempt.outcome else "not ended"
            console.print(f"   attempt {attempt.attempt} on {attempt.agent}: {outcome}{error}")
        result = job.result if isinstance(job.result, dict) else {}
        resumed = result.get("resumed_from")
        good = job.state is lessor.JobState.SUCCEEDED and job.attempt == 2 and bool(resumed)
        if good:
            say(f"resumed from epoch {resumed}; [bold green]test accuracy {result['accuracy']:.4f}[/]")
        else:
            say(f"[bold red]the demo failed[/]: {job.state.name}, attempt {job.attempt}, {job.error}")
        say("stopping everything")
    left = [pid for name in AGENTS for pid in find_keepers(fleet.directory / name).values()]
    rest = f"[bold red]keepers {left} are left running[/]" if left else "nothing is left running"
    say(f"done in {time.monotonic() - begun:.0f} s, {rest}")
    return 0 if good and not left else 1


if __name__ == "__main__":
    sys.exit(main())
