"""Two replicas on one database: the one that leads is killed, the other goes on."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from pathlib import Path

import asyncpg
import grpc
import pytest

import lessor
from lessor import JobState, timing
from lessor.sdk.wire import duration_message
from lessor.v1 import job_pb2
from lessor_server.server import Server
from tests.support.cluster import Agent, Cluster, running_cluster, until
from tests.support.proxy import Proxy
from tests.support.servers import RawAgent, connected, ended, held, running_server

pytestmark = pytest.mark.integration

TAKEOVER_BOUND = timedelta(seconds=5)
"""Far above what a take-over needs, far below any lease: it shows that no lease had to run out first."""


async def kill_leader(cluster: Cluster, pool: asyncpg.Pool, follower: Server) -> timedelta:
    """Kills the leading process and returns how long nobody led."""
    term = await pool.fetchrow("SELECT epoch, holder FROM leader")
    assert term is not None
    assert term["holder"] != follower.replica, "the replica that started first leads"
    killed_at = time.monotonic()
    await cluster.kill_server()
    async with asyncio.timeout(60):
        while await pool.fetchval("SELECT epoch FROM leader") == term["epoch"]:
            continue
    vacant = timedelta(seconds=time.monotonic() - killed_at)
    assert await pool.fetchval("SELECT holder FROM leader") == follower.replica
    print(f"nobody led for {vacant.total_seconds():.2f} s")
    return vacant


async def test_the_other_replica_leads_and_grants(database_url: str, pool: asyncpg.Pool, tmp_path: Path) -> None:
    async with (
        running_cluster(database_url, tmp_path) as cluster,
        running_server(database_url) as follower,
        connected(follower) as client,
    ):
        # Nothing here may depend on when this machine finds the time for the next heartbeat.
        agent = RawAgent(client, heartbeat_interval=duration_message(timedelta(seconds=10)))
        await agent.connect()
        first = await client.submit()
        before = await agent.grant()
        await agent.run(before)
        clock = await pool.fetchval("SELECT clock FROM leader")
        vacant = await kill_leader(cluster, pool, follower)
        second = await client.submit()
        await agent.heartbeat(before.lease_id)
        after = await agent.grant()
        assert (before.job_id, after.job_id) == (first, second)
        assert after.lease_id > before.lease_id
        # Lease time went on and did not jump: what the old leader had granted stands.
        passed = await pool.fetchval("SELECT clock FROM leader") - clock
        assert 0 <= passed < timing.DEFAULT_TTL // timedelta(milliseconds=1)
        await agent.tell(before, ended=ended())
        assert (await client.until(first, job_pb2.JOB_STATE_SUCCEEDED)).attempt == 1
        await agent.leave()
    assert vacant < TAKEOVER_BOUND


async def test_an_agent_of_the_killed_replica_resumes_its_session_on_the_other(
    database_url: str, pool: asyncpg.Pool, tmp_path: Path
) -> None:
    async with (
        running_cluster(database_url, tmp_path) as cluster,
        running_server(database_url) as follower,
        connected(follower) as client,
        grpc.aio.insecure_channel(cluster.address) as channel,
    ):
        agent = RawAgent(type(client)(channel))
        await agent.connect()
        session = agent.session_id
        job_id = await client.submit()
        lease = await agent.grant()
        await agent.run(lease)
        await kill_leader(cluster, pool, follower)
        await agent.leave()
        moved = RawAgent(client)
        moved.session_id = session
        welcome = await moved.connect(leases=[held(lease)])
        assert welcome.session_id == session
        assert [answer.lease_id for answer in welcome.leases] == [lease.lease_id]
        await moved.tell(lease, ended=ended())
        job = await client.until(job_id, job_pb2.JOB_STATE_SUCCEEDED)
        assert (job.attempt, job.losses, job.failures) == (1, 0, 0)
        await moved.leave()


async def test_no_job_is_lost_or_run_twice(database_url: str, pool: asyncpg.Pool, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    script = f"echo $LESSOR_FENCING_TOKEN >> {marks}/$LESSOR_JOB_ID; sleep 0.05"
    async with (
        running_cluster(database_url, tmp_path) as cluster,
        running_server(database_url) as follower,
        Proxy(cluster.address) as proxy,
        lessor.AsyncClient(f"127.0.0.1:{follower.port}", timeout=60) as client,
    ):
        # One agent stays on the replica that survives, the other must move.
        for name, address in (("staying", f"127.0.0.1:{follower.port}"), ("moving", proxy.address)):
            agent = Agent(cluster, name, ("--cpu", "2"), {})
            agent.address = address
            agent.start()
        specs = [lessor.JobSpec.of(["/bin/sh", "-c", script], cpu="1") for _ in range(60)]
        jobs = await client.submit_many(specs)
        await until(lambda: len(list(marks.iterdir())) > 10)
        proxy.retarget(f"127.0.0.1:{follower.port}")
        vacant = await kill_leader(cluster, pool, follower)
        done = await client.wait(jobs, timeout=90)
        assert {job.state for job in done} == {JobState.SUCCEEDED}
        assert {(job.attempt, job.losses, job.failures) for job in done} == {(1, 0, 0)}
        runs = [(marks / job.id).read_text().split() for job in done]
        assert all(len(tokens) == 1 for tokens in runs), "a job ran twice"
        assert len({token for (token,) in runs}) == len(jobs), "two jobs had one fencing token"
        agents = {job.agent for job in [await client.get(job) for job in jobs]}
        assert agents <= {"staying", "moving"}
        await until(lambda: proxy.connections >= 2)
        assert await pool.fetchval("SELECT count(*) FROM lease") == 0
    assert vacant < TAKEOVER_BOUND
