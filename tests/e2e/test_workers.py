"""``lessor server --workers``: several processes on one address, and nothing of them left behind."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import asyncpg
import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import lessor
from lessor import JobState
from tests.support.cluster import Cluster, assert_no_overlap, lives, running_cluster, submit_ticker, until
from tests.support.processes import wait_gone

pytestmark = pytest.mark.e2e

CONNECTIONS = 40
"""Two workers get none of so many once in 2**39 times."""


@pytest.fixture
async def cluster(database_url: str, tmp_path: Path) -> AsyncIterator[Cluster]:
    """A server with two workers."""
    async with running_cluster(database_url, tmp_path, "--workers", "2") as made:
        yield made


def workers(cluster: Cluster) -> dict[int, int]:
    """Returns worker's number → process id."""
    assert cluster.server is not None
    found = {}
    for child in psutil.Process(cluster.server.pid).children():
        command = child.cmdline()
        if "lessor_server.worker" in command:
            found[int(command[-1])] = child.pid
    return found


def starts(cluster: Cluster) -> int:
    """Returns how many times a worker came up."""
    return log(cluster).count("the server is up")


def log(cluster: Cluster) -> str:
    return (cluster.directory / "server.log").read_text()


async def leader(pool: asyncpg.Pool) -> int:
    """Returns the process id of the replica that leads."""
    return int((await pool.fetchval("SELECT holder FROM leader")).split("-")[-2])


def held_by(pid: int, address: str) -> int:
    """Returns how many connections to the address a process holds."""
    port = int(address.rpartition(":")[2])
    return sum(
        connection.status == psutil.CONN_ESTABLISHED and connection.laddr.port == port
        for connection in psutil.Process(pid).net_connections("tcp")
    )


async def test_connections_are_spread_over_the_workers(cluster: Cluster) -> None:
    pids = workers(cluster)
    assert set(pids) == {1, 2}
    async with AsyncExitStack() as stack:
        stubs = []
        for _ in range(CONNECTIONS):
            # Else channels of one process share their connections.
            options = [("grpc.use_local_subchannel_pool", 1)]
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(cluster.address, options=options))
            stubs.append(health_pb2_grpc.HealthStub(channel))
        answers = await asyncio.gather(*(stub.Check(health_pb2.HealthCheckRequest()) for stub in stubs))
        assert {answer.status for answer in answers} == {health_pb2.HealthCheckResponse.SERVING}
        shares = Counter({number: held_by(pid, cluster.address) for number, pid in pids.items()})
        assert cluster.server is not None
        assert held_by(cluster.server.pid, cluster.address) == 0
    print(dict(shares))
    assert shares.total() == CONNECTIONS
    assert min(shares.values()) > 0
    for number in pids:
        assert any("the server is up" in line and f"worker={number}" in line for line in log(cluster).splitlines())


async def test_a_job_goes_on_while_each_worker_is_killed_and_comes_back(
    cluster: Cluster, pool: asyncpg.Pool, tmp_path: Path
) -> None:
    cluster.agent("one")
    before = workers(cluster)
    ticks = tmp_path / "ticks"
    async with lessor.AsyncClient(cluster.address, timeout=60) as client:
        job = await submit_ticker(client, ticks, 3600, ttl="60s")
        await until(lambda: ticks.is_dir() and bool(list(ticks.iterdir())))
        # The one that leads, then the other: whichever holds the agent's stream is among them.
        leading = await leader(pool)
        for count, pid in enumerate(sorted(before.values(), key=lambda pid: pid != leading), start=1):
            os.kill(pid, signal.SIGKILL)
            await until(lambda count=count: starts(cluster) == 2 + count)  # type: ignore[misc]
            done = await client.wait([await client.submit(["/bin/true"])], timeout=60)
            assert done[0].state is JobState.SUCCEEDED
        after = workers(cluster)
        assert set(after) == set(before)
        assert not set(after.values()) & set(before.values())
        assert await leader(pool) in after.values()
        await client.cancel(job)
        (ended,) = await client.wait([job], timeout=60)
        assert (ended.state, ended.attempt, ended.losses) == (JobState.CANCELLED, 1, 0)
    assert len(lives(ticks)) == 1
    assert_no_overlap(ticks)
    told = [line for line in log(cluster).splitlines() if "a worker ended and is started again" in line]
    assert len(told) == 2
    assert all("code=-9" in line for line in told)


async def test_the_leader_grants_to_agents_of_every_worker(
    cluster: Cluster, pool: asyncpg.Pool, tmp_path: Path
) -> None:
    for number in range(6):
        cluster.agent(f"agent-{number}", "--cpu", "1")
    async with lessor.AsyncClient(cluster.address, timeout=60) as client:
        for meeting in (tmp_path / "first", tmp_path / "second"):
            meeting.mkdir()
            # One place each, and each job waits for the others: every agent must be granted one.
            script = f"touch {meeting}/$LESSOR_JOB_ID; until [ $(ls {meeting} | wc -l) = 6 ]; do sleep 0.05; done"
            specs = [lessor.JobSpec.of(["/bin/sh", "-c", script], cpu="1") for _ in range(6)]
            done = await client.wait(await client.submit_many(specs), timeout=90)
            assert {job.state for job in done} == {JobState.SUCCEEDED}
            assert len({job.agent for job in done}) == 6
            if meeting.name == "first":
                os.kill(await leader(pool), signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_all_of_it(cluster: Cluster, pool: asyncpg.Pool, number: signal.Signals) -> None:
    cluster.agent("one")
    async with lessor.AsyncClient(cluster.address, timeout=60) as client:
        await client.wait([await client.submit(["/bin/true"])], timeout=60)
    pids = workers(cluster)
    assert cluster.server is not None
    cluster.server.send_signal(number)
    assert await asyncio.to_thread(cluster.server.wait, 40) == 0
    assert not [pid for pid in pids.values() if psutil.pid_exists(pid)]
    assert log(cluster).count("the server stops") == len(pids)
    assert "killed" not in log(cluster)
    assert "Traceback" not in log(cluster)
    assert await pool.fetchval("SELECT holder FROM leader") == "", "the leader has resigned"
    # The port is free again, and one line was printed in all.
    assert cluster.server.stdout is not None
    assert cluster.server.stdout.read() == b""
    await cluster.start_server(cluster.address)


@asynccontextmanager
async def starting(database_url: str, directory: Path, pool: asyncpg.Pool) -> AsyncIterator[Cluster]:
    """A server with three workers, none of which comes up: what they read first is locked."""
    cluster = Cluster(database_url, directory)
    try:
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute("LOCK alembic_version")
            flags = ["server", "--listen", "127.0.0.1:0", "--workers", "3"]
            environment = {"LESSOR_SERVER_DATABASE_URL": database_url, "TMPDIR": str(directory)}
            cluster.server = cluster.spawn("server", flags, environment)
            await until(lambda: len(workers(cluster)) == 3)
            yield cluster
    finally:
        await cluster.stop()


async def test_a_signal_while_they_start_stops_all_of_it(database_url: str, tmp_path: Path, pool: asyncpg.Pool) -> None:
    async with starting(database_url, tmp_path, pool) as cluster:
        pids = workers(cluster)
        assert cluster.server is not None
        cluster.server.terminate()
        assert await asyncio.to_thread(cluster.server.wait, 40) == 0
        assert not [pid for pid in pids.values() if psutil.pid_exists(pid)]
        assert log(cluster) == ""


async def test_a_worker_that_dies_while_they_start_ends_all_of_it(
    database_url: str, tmp_path: Path, pool: asyncpg.Pool
) -> None:
    async with starting(database_url, tmp_path, pool) as cluster:
        pids = workers(cluster)
        os.kill(pids[2], signal.SIGKILL)
        assert cluster.server is not None
        assert await asyncio.to_thread(cluster.server.wait, 40) == 1
        assert not [pid for pid in pids.values() if psutil.pid_exists(pid)]
        assert log(cluster) == "error: worker 2 ended with code -9 before it listened\n"


async def test_a_worker_that_cannot_come_back_is_tried_again(cluster: Cluster, pool: asyncpg.Pool) -> None:
    version = await pool.fetchval("SELECT version_num FROM alembic_version")
    await pool.execute("UPDATE alembic_version SET version_num = '9999_from_the_future'")
    before = workers(cluster)
    os.kill(before[1], signal.SIGKILL)
    await until(lambda: "9999_from_the_future" in log(cluster))
    # The other has been told nothing and serves on.
    async with lessor.AsyncClient(cluster.address, timeout=60) as client:
        await client.submit(["/bin/true"])
    await pool.execute("UPDATE alembic_version SET version_num = $1", version)
    await until(lambda: starts(cluster) == 3)
    assert workers(cluster)[2] == before[2]
    assert "Traceback" not in log(cluster)


async def test_workers_do_not_outlive_a_killed_parent(cluster: Cluster) -> None:
    pids = workers(cluster)
    assert len(pids) == 2
    await cluster.kill_server()
    for pid in pids.values():
        await asyncio.to_thread(wait_gone, pid)
    assert "Traceback" not in log(cluster)
    await cluster.start_server(cluster.address, "--workers", "2")
