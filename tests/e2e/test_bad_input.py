"""What is wrong is told in one readable line that says what to do, and nothing is half done."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import pytest

import lessor
from lessor import JobState
from tests.support.cluster import LESSOR, Cluster, running_cluster
from tests.support.privileges import bind_by_modes

pytestmark = pytest.mark.e2e

TRUE = ("--", "/bin/true")
HUGE = 100 * 1024 * 1024
NOBODY_LISTENS = "127.0.0.1:9"


@dataclass
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    def refused(self, *words: str, code: int | None = None) -> None:
        """Asserts one line on standard error that holds all words, and an exit code that is not 0."""
        lines = self.err.splitlines()
        assert self.code != 0, self.out
        assert code in (None, self.code), self.err
        assert len(lines) == 1, f"more than one line:\n{self.err}"
        assert "Traceback" not in self.err
        assert len(lines[0]) < 700, "a line that nobody reads"
        for word in words:
            assert word in lines[0], self.err
        assert not self.out


def run(*arguments: str, timeout_s: float = 60, **environment: str) -> Ran:
    """Runs the installed ``lessor`` as a user does in a script."""
    return run_as(None, *arguments, timeout_s=timeout_s, **environment)


def run_as(becomes: Callable[[], None] | None, *arguments: str, timeout_s: float = 60, **environment: str) -> Ran:
    """Runs it after the new process has done something to itself."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LESSOR_")}
    done = subprocess.run(
        [str(LESSOR), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**kept, **environment},
        preexec_fn=becomes,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


class Shell:
    """``lessor`` with the address of a server, and a look at its tables."""

    def __init__(self, cluster: Cluster, pool: asyncpg.Pool) -> None:
        self._cluster = cluster
        self._pool = pool

    async def refused(self, *arguments: str, words: tuple[str, ...], code: int | None = None) -> None:
        """Asserts that a command is refused in one line and changes nothing."""
        before = await self.rows()
        ran = await asyncio.to_thread(run, *arguments, LESSOR_ADDRESS=self._cluster.address)
        ran.refused(*words, code=code)
        assert await self.rows() == before

    async def rows(self) -> dict[str, list[Any]]:
        """Returns what all tables of jobs hold."""
        tables = ("job", "ready", "delayed", "lease", "attempt", "request", "queue", "event")
        return {name: await self._pool.fetch(f"SELECT * FROM {name} ORDER BY 1") for name in tables}


@pytest.fixture
async def shell(cluster: Cluster, pool: asyncpg.Pool) -> Shell:
    return Shell(cluster, pool)


async def test_bad_flags_of_submit_and_run(shell: Shell) -> None:
    cases: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
        (("--gpus", "-1", *TRUE), ("--gpus", "-1", "0 or more")),
        (("--gpus", "two", *TRUE), ("--gpus", "two", "integer", "--help")),
        (("--gpus", "2000", *TRUE), ("gpu", "1024")),
        (("--memory", "4 apples", *TRUE), ("--memory", "4 apples", "GiB")),
        (("--selector", "zone ==== a", *TRUE), ("--selector", "zone ==== a", "key=value")),
        (("--label", "novalue", *TRUE), ("--label", "novalue", "=")),
        (("--ttl", "5s", *TRUE), ("ttl", "10")),
        (
            ("--ttl", "10s", "--grace", "9s", "--on-lease-lost", "stop", *TRUE),
            ("grace", "9 s", "ttl of 10 s", "use less than", "on_lost", "FREEZE"),
        ),
        (("--on-lease-lost", "melt", *TRUE), ("--on-lease-lost", "'melt'", "freeze, stop or continue")),
        (("--runtime", "other", "--on-lease-lost", "freeze", *TRUE), ("on_lost", "'other'", "cannot freeze", "STOP")),
        (("--workdir", "here", *TRUE), ("working_dir", "absolute")),
        (("--env", "LESSOR_JOB_ID=1", *TRUE), ("LESSOR_",)),
        (("--gpu-model", "H200", *TRUE), ("gpu_model", "gpu_count")),
        (("--no-such-flag", *TRUE), ("--no-such-flag", "--help")),
        ((), ("no command", "--")),
    ]
    for flags, words in cases:
        await shell.refused("submit", *flags, words=words, code=2)
    for flags, words in cases[0], cases[2], cases[-1]:
        await shell.refused("run", *flags, words=words, code=2)


async def test_an_unknown_queue(shell: Shell) -> None:
    await shell.refused("submit", "--queue", "nope", *TRUE, words=("nope", "create"), code=3)
    await shell.refused("run", "--queue", "nope", *TRUE, words=("nope", "create"), code=3)


async def test_bad_job_files(shell: Shell, tmp_path: Path) -> None:
    huge = "x" * HUGE
    files = {
        "indent.yaml": ("command: [true\nname: x", ("indent.yaml:2", "not valid YAML")),
        "tab.yaml": ("command: [a]\n\tname: x", ("tab.yaml:2", "not valid YAML")),
        "empty.yaml": ("", ("empty.yaml", "no job", "command")),
        "list.yaml": ("- 1\n- 2", ("list.yaml", "mapping")),
        "field.yaml": ("command: [a]\ngpu: 1", ("field.yaml:2", "gpu", "gpus")),
        "gpus.yaml": ("command: [a]\ngpus: -1", ("gpus.yaml:2", "-1")),
        "second.yaml": ("command: [a]\n---\ncommand: [b]\nqueue: nope", ("nope",)),
        "huge_env.yaml": (f"command: [a]\nenv:\n  A: {huge}", ("huge_env.yaml", "67108864", "split")),
        "long_env.json": (
            f'{{"command": ["a"], "env": {{"A": "{huge[:20_000_000]}"}}}}',
            ("the request", "20000064", "limit of 16777216", "file"),
        ),
        "argv.json": (f'{{"command": ["a", "{huge[:5_000_000]}"]}}', ("131072",)),
        "many.json": ('[{"command": ["a"]}, {"command": ["a"], "gpus": -1}]', ("many.json", "job 2", "-1")),
    }
    for name, (text, words) in files.items():
        path = tmp_path / name
        path.write_text(text)
        await shell.refused("submit", "-f", str(path), words=words)
    await shell.refused("submit", "-f", str(tmp_path / "missing.yaml"), words=("missing.yaml", "No such file"), code=2)
    await shell.refused("submit", "-f", str(tmp_path), words=("cannot be read",), code=2)


async def test_a_hundred_megabytes_through_the_sdk(shell: Shell, client: lessor.AsyncClient) -> None:
    before = await shell.rows()
    for spec in (
        lessor.JobSpec.of(["/bin/true"], env={"A": "x" * HUGE}),
        lessor.JobSpec.of(["/bin/true", *("x" * 100_000 for _ in range(HUGE // 100_000))]),
        lessor.JobSpec.of(["/bin/true", *("x" * 100_000 for _ in range(12))]),
    ):
        with pytest.raises(lessor.LessorError) as error:
            await client.submit(spec)
        text = str(error.value)
        assert len(text) < 700
        assert "\n" not in text
        assert any(word in text for word in ("limit", "larger", "at most")), text
    assert await shell.rows() == before
    # The connection is as good as before.
    assert (await client.get(await client.submit(["/bin/true"]))).state is JobState.QUEUED


async def test_unknown_jobs_and_agents(shell: Shell) -> None:
    unknown = "j0000000000001"
    for verb in ("show", "logs", "wait", "explain", "retry"):
        await shell.refused(verb, unknown, words=(unknown,), code=3)
        await shell.refused(verb, "not-an-id", words=("not-an-id",))
    await shell.refused("drain", "nobody-here", words=("nobody-here",), code=3)


def test_a_wrong_address() -> None:
    for verb in (("submit", *TRUE), ("run", *TRUE), ("ps",)):
        run(*verb, LESSOR_ADDRESS=NOBODY_LISTENS).refused(NOBODY_LISTENS, "LESSOR_ADDRESS", "--address", code=4)
    run("ps", "--address", "no-such-host.invalid:1").refused("no-such-host.invalid", "--address", code=4)
    run("ps", "--address", "127.0.0.1:port").refused("127.0.0.1:port", code=2)


def test_an_address_where_something_else_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        run("ps", "--address", f"127.0.0.1:{mute.getsockname()[1]}").refused("--address", code=4)


def server(database_url: str, *flags: str) -> Ran:
    """Runs ``lessor server``, which is expected to end by itself."""
    return run("server", "--listen", "127.0.0.1:0", *flags, LESSOR_SERVER_DATABASE_URL=database_url)


WORKERS = pytest.mark.parametrize("flags", [(), ("--workers", "2")], ids=["one process", "workers"])


@WORKERS
def test_a_server_without_a_database(flags: tuple[str, ...]) -> None:
    run("server", *flags).refused("--database-url", "lessor dev", code=2)
    server(f"postgresql://postgres@{NOBODY_LISTENS}/lessor", *flags).refused("database", "--database-url", code=1)
    run("server", "migrate", "--database-url", f"postgresql://postgres@{NOBODY_LISTENS}/lessor").refused(
        "database", "--database-url", code=1
    )
    server("mysql://root@127.0.0.1/lessor", *flags).refused("mysql://", "postgresql://", code=2)


def test_settings_of_a_server_that_are_out_of_range() -> None:
    url = "postgresql://postgres@127.0.0.1/lessor"
    server(url, "--workers", "0").refused("workers", "greater than or equal to 1", "got 0", code=2)
    server(url, "--workers", "65").refused("workers", "less than or equal to 64", "got 65", code=2)
    server(url, "--pool-size", "3").refused("pool_size", "greater than or equal to 4", "got 3", code=2)
    named = run("server", LESSOR_SERVER_DATABASE_URL=url, LESSOR_SERVER_WORKERS="many")
    named.refused("workers", "integer", "many", code=2)
    server(url, "--workers", "2", "--log-level", "loud").refused("log level", "loud", "warning", code=2)


@WORKERS
async def test_a_server_on_a_database_that_does_not_exist(empty_database_url: str, flags: tuple[str, ...]) -> None:
    ran = await asyncio.to_thread(server, f"{empty_database_url}_not", *flags)
    ran.refused("database", "does not exist", code=1)


@WORKERS
async def test_a_server_on_a_schema_that_is_not_its_own(
    empty_database_url: str, database_url: str, pool: asyncpg.Pool, flags: tuple[str, ...]
) -> None:
    empty = await asyncio.to_thread(server, empty_database_url, *flags)
    empty.refused("no Lessor schema", "lessor server migrate", code=1)
    await pool.execute("UPDATE alembic_version SET version_num = '9999_from_the_future'")
    # It serves none of today's servers any more.
    await pool.execute("UPDATE schema_floor SET revision = '9999_from_the_future'")
    for ran in (
        await asyncio.to_thread(server, database_url, *flags),
        await asyncio.to_thread(run, "server", "migrate", "--database-url", database_url),
    ):
        ran.refused("9999_from_the_future", "serves servers of schema", "a newer one", code=1)
    assert await pool.fetchval("SELECT version_num FROM alembic_version") == "9999_from_the_future"


@WORKERS
async def test_a_server_that_cannot_listen(database_url: str, tmp_path: Path, flags: tuple[str, ...]) -> None:
    for which, running in enumerate([(), ("--workers", "2")]):
        (directory := tmp_path / str(which)).mkdir()
        async with running_cluster(database_url, directory, *running) as cluster:
            busy = await asyncio.to_thread(server, database_url, "--listen", cluster.address, *flags)
            busy.refused(f"cannot listen on {cluster.address}: Address already in use", "--listen", code=2)
            # The one that has the port goes on.
            assert (await asyncio.to_thread(run, "ps", LESSOR_ADDRESS=cluster.address)).code == 0
    for listen, words in {"0.0.0.0:0": ("--insecure", "127.0.0.1"), "nowhere": ("--listen", "nowhere")}.items():
        (await asyncio.to_thread(server, database_url, "--listen", listen, *flags)).refused(*words, code=2)


async def test_bad_flags_of_an_agent(cluster: Cluster, tmp_path: Path, pool: asyncpg.Pool) -> None:
    state, address = str(tmp_path / "state"), ("--address", cluster.address)
    cases: list[tuple[tuple[str, ...], tuple[str, ...], int]] = [
        ((*address,), ("--state-dir",), 2),
        ((*address, "--state-dir", state, "--heartbeat", "1 parsec"), ("--heartbeat", "1 parsec"), 2),
        ((*address, "--state-dir", state, "--heartbeat", "1ms"), ("--heartbeat", "100ms"), 2),
        ((*address, "--state-dir", state, "--label", "novalue"), ("--label", "novalue", "key=value"), 2),
        (("--address", "192.0.2.1:7780", "--state-dir", state), ("192.0.2.1:7780", "--insecure"), 2),
        # Below a file there is no directory, not even for root.
        ((*address, "--state-dir", "/etc/hostname/state"), ("/etc/hostname/state", "--state-dir"), 1),
    ]
    for flags, words, code in cases:
        (await asyncio.to_thread(run, "agent", *flags)).refused(*words, code=code)
    assert not Path(state).exists()
    assert await pool.fetchval("SELECT count(*) FROM agent") == 0


async def test_an_agent_on_a_directory_it_cannot_write(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    ran = await asyncio.to_thread(run_as, bind_by_modes, "agent", "--state-dir", str(closed / "state"))
    ran.refused("--state-dir", code=1)


async def test_two_agents_on_one_state_directory(cluster: Cluster, client: lessor.AsyncClient) -> None:
    first = cluster.agent("one")
    await client.wait([await client.submit(["/bin/true"])], timeout=60)
    second = await asyncio.to_thread(run, "agent", "--address", cluster.address, "--state-dir", str(first.state_dir))
    second.refused("another agent", str(first.state_dir), "--state-dir", code=1)
    (done,) = await client.wait([await client.submit(["/bin/true"])], timeout=60)
    assert done.state is JobState.SUCCEEDED


async def test_jobs_that_cannot_start(cluster: Cluster, client: lessor.AsyncClient, tmp_path: Path) -> None:
    cluster.agent("one")
    cases: list[tuple[tuple[str, ...], str]] = [
        (("--", "/no/such/program"), "/no/such/program"),
        (("--", str(tmp_path)), str(tmp_path)),
        (("--workdir", str(tmp_path / "missing"), *TRUE), str(tmp_path / "missing")),
    ]
    for flags, named in cases:
        ran = await asyncio.to_thread(run, "run", *flags, LESSOR_ADDRESS=cluster.address)
        assert ran.code == 1, ran.err
        assert "Traceback" not in ran.err
        assert not ran.out
        assert named in ran.err.splitlines()[-1], ran.err
        (job,) = [job async for job in client.list(limit=1)]
        assert (job.state, job.attempt, job.exit_code) == (JobState.FAILED, 1, None)
        assert job.error is not None
        assert (job.error.type, job.error.retryable) == ("START_FAILED", False)
    # The place is free again and takes a good job.
    assert (await asyncio.to_thread(run, "run", *TRUE, LESSOR_ADDRESS=cluster.address)).code == 0
    assert not [lease async for lease in client.leases()]


async def test_a_user_that_this_host_does_not_have(cluster: Cluster, client: lessor.AsyncClient) -> None:
    cluster.agent("one")
    job = await client.submit(["/bin/true"], user="no-such-user-here", queue_timeout="60s")
    async for change in client.watch([job]):
        # Another host may have the user: the job waits for one, at no cost.
        if change.state is JobState.QUEUED and change.attempt:
            break
    assert (await client.attempts(job))[0].outcome is lessor.Outcome.REJECTED
    why = "no user 'no-such-user-here' on this host; create it here or name another"
    async with asyncio.timeout(60):
        # What the server knows of an agent may be a second old.
        while why not in (told := await asyncio.to_thread(run, "explain", job.id, LESSOR_ADDRESS=cluster.address)).out:
            assert (told.code, told.err, len(told.out.splitlines())) == (0, "", 1)
    assert (told.code, told.err, len(told.out.splitlines())) == (0, "", 1)
    waiting = await client.get(job)
    assert (waiting.failures, waiting.losses) == (0, 0)
    await client.cancel(job)
    assert (await client.wait([job], timeout=30))[0].state is JobState.CANCELLED
