"""The agent protocol, seen from an agent that does only what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import asyncpg
import grpc
import pytest

from lessor import timing
from lessor.sdk.wire import duration_message
from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import job_pb2, job_service_pb2
from lessor_server.server import Server
from lessor_server.sessions import servicer
from tests.support.servers import EOF, Client, RawAgent, connected, ended, held, running_server


@pytest.fixture
async def server(database_url: str) -> AsyncIterator[Server]:
    async with running_server(database_url) as made:
        yield made


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Client]:
    async with connected(server) as made:
        yield made


@pytest.fixture
async def agent(client: Client) -> AsyncIterator[RawAgent]:
    made = RawAgent(client)
    await made.connect()
    yield made
    await made.leave()


async def advance_lease_time(pool: asyncpg.Pool, by: timedelta) -> None:
    await pool.execute("UPDATE leader SET clock = clock + $1", by // timedelta(milliseconds=1))


async def test_a_job_runs_to_its_end(client: Client, agent: RawAgent) -> None:
    job_id = await client.submit()
    grant = await agent.grant()
    assert (grant.job_id, grant.attempt) == (job_id, 1)
    assert grant.ttl.ToTimedelta() == timing.DEFAULT_TTL
    assert grant.margin.ToTimedelta() == timing.margin(timing.DEFAULT_TTL)
    await agent.run(grant)
    assert (await client.job(job_id)).state == job_pb2.JOB_STATE_RUNNING
    await agent.tell(grant, ended=ended(exit_code=0, result_json=b'{"a":1}'))
    job = await client.job(job_id)
    assert (job.state, job.result_json, job.exit_code) == (job_pb2.JOB_STATE_SUCCEEDED, b'{"a":1}', 0)


async def test_a_heartbeat_is_acked_after_its_renewal(client: Client, agent: RawAgent, pool: asyncpg.Pool) -> None:
    await advance_lease_time(pool, timedelta(seconds=5))
    seq = await agent.heartbeat()
    assert (await agent.next("ack")).ack.heartbeat_seq == seq
    assert await pool.fetchval("SELECT renewed_at FROM session") >= 5000


async def test_a_heartbeat_of_a_superseded_epoch_is_not_acked(agent: RawAgent, pool: asyncpg.Pool) -> None:
    await pool.execute("UPDATE session SET epoch = epoch + 1")
    await agent.heartbeat()
    assert "epoch" in (await agent.next("hello_requested")).hello_requested.reason
    welcome = await agent.say_hello()
    assert welcome.epoch == 3
    seq = await agent.heartbeat()
    assert (await agent.next("ack")).ack.heartbeat_seq == seq


async def test_the_first_message_is_hello(client: Client) -> None:
    call = client.agents.Connect()
    await call.write(pb.ConnectRequest(heartbeat=pb.Heartbeat(seq=1)))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call.read()
    assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "before hello" in str(error.value.details())


async def test_a_stream_that_brings_no_hello_is_ended_without_an_error(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(servicer, "_HELLO_TIMEOUT_S", 0.01)
    assert await client.agents.Connect().read() is EOF
    assert [record.getMessage() for record in caplog.records if record.levelname != "INFO"] == [
        "a stream brought no hello"
    ]


@pytest.mark.parametrize(("version", "whose"), [(0, "the agent"), (99, "the server")])
async def test_an_agent_too_old_or_too_new_is_told_so(client: Client, version: int, whose: str) -> None:
    agent = RawAgent(client)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await agent.connect(protocol_version=version)
    assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert f"upgrade {whose}" in str(error.value.details())


async def test_a_grant_lost_on_the_way_is_sent_again(client: Client, agent: RawAgent) -> None:
    await client.submit()
    first = await agent.grant()
    await agent.leave()
    await agent.connect()
    assert (await agent.grant()).lease_id == first.lease_id
    assert (await agent.grant()).lease_id == first.lease_id, "until it is answered"


async def test_an_offer_never_accepted_returns_only_on_the_agents_word(
    client: Client, agent: RawAgent, pool: asyncpg.Pool
) -> None:
    job_id = await client.submit()
    grant = await agent.grant()
    await advance_lease_time(pool, timing.OFFER_TTL + timedelta(seconds=1))
    revoke = await agent.revoke()
    assert (revoke.lease_id, revoke.reason) == (grant.lease_id, pb.REVOKE_REASON_OFFER_EXPIRED)
    assert (await client.job(job_id)).state == job_pb2.JOB_STATE_LEASED, "asking ends nothing"
    await agent.tell(grant, released=pb.Released(reason="not started"))
    await agent.heartbeat()
    again = await agent.grant()
    assert (again.job_id, again.attempt) == (job_id, 2)
    assert again.lease_id > grant.lease_id
    job = await client.job(job_id)
    assert (job.failures, job.losses) == (0, 0)


async def test_a_lease_the_agent_does_not_hold_is_reassigned_at_once(client: Client, agent: RawAgent) -> None:
    job_id = await client.submit()
    grant = await agent.grant()
    await agent.run(grant)
    await agent.leave()
    agent.session_id = 0
    await agent.connect(leases=[])
    revoke = await agent.revoke()
    assert (revoke.lease_id, revoke.reason) == (grant.lease_id, pb.REVOKE_REASON_NOT_LISTED)
    await agent.tell(grant, released=pb.Released())
    again = await agent.grant()
    assert (again.job_id, again.attempt) == (job_id, 2)


async def test_a_lease_missing_from_heartbeats_is_asked_for(client: Client, agent: RawAgent) -> None:
    await client.submit()
    grant = await agent.grant()
    await agent.run(grant)

    async with asyncio.timeout(60):
        while not agent.waiting("revokes"):
            await agent.heartbeat()
            await agent.next("ack")
    revoke = await agent.revoke()
    assert (revoke.lease_id, revoke.reason) == (grant.lease_id, pb.REVOKE_REASON_NOT_LISTED)


async def test_the_same_attempt_goes_on_after_a_dropped_stream(client: Client, agent: RawAgent) -> None:
    job_id = await client.submit()
    grant = await agent.grant()
    await agent.run(grant)
    await agent.leave()
    welcome = await agent.connect(leases=[held(grant)])
    assert [(a.lease_id, a.decision) for a in welcome.leases] == [(grant.lease_id, pb.LEASE_DECISION_KEEP)]
    await agent.tell(grant, ended=ended())
    job = await client.job(job_id)
    assert (job.state, job.attempt) == (job_pb2.JOB_STATE_SUCCEEDED, 1)


async def test_a_zombies_late_report_changes_nothing(client: Client, agent: RawAgent, pool: asyncpg.Pool) -> None:
    job_id = await client.submit()
    grant = await agent.grant()
    await agent.run(grant)
    await agent.leave()
    await advance_lease_time(pool, timedelta(minutes=2))
    await client.until(job_id, job_pb2.JOB_STATE_QUEUED)
    # It is not asked for a heartbeat while the planner waits for the one that was there before.
    other = RawAgent(client, "raw-agent-2", heartbeat_interval=duration_message(2 * timing.FLEET_SETTLES))
    await other.connect()
    newer = await other.grant()
    await other.run(newer)
    welcome = await agent.connect(leases=[held(grant)])
    assert welcome.leases[0].decision == pb.LEASE_DECISION_STALE
    await agent.event(grant, ended=ended(job_pb2.OUTCOME_FAILED))
    revoke = await agent.revoke()
    assert (revoke.lease_id, revoke.reason) == (grant.lease_id, pb.REVOKE_REASON_STALE)
    assert (await client.job(job_id)).state == job_pb2.JOB_STATE_RUNNING
    await other.tell(newer, ended=ended())
    job = await client.job(job_id)
    assert (job.state, job.failures, job.losses, job.attempt) == (job_pb2.JOB_STATE_SUCCEEDED, 0, 1, 2)


async def test_finished_work_is_not_run_again_when_its_end_comes_late(
    client: Client, agent: RawAgent, pool: asyncpg.Pool
) -> None:
    job_id = await client.submit()
    grant = await agent.grant()
    await agent.run(grant)
    await agent.leave()
    await advance_lease_time(pool, timedelta(minutes=2))
    await client.until(job_id, job_pb2.JOB_STATE_QUEUED)
    welcome = await agent.connect(leases=[held(grant, job_pb2.LEASE_PHASE_DRAINING)], session_id=0)
    decision = welcome.leases[0].decision
    await agent.event(grant, ended=ended(exit_code=0))
    job = await client.job(job_id)
    if decision == pb.LEASE_DECISION_KEEP:
        # Nobody had the job meanwhile, unless this very agent was offered it again first.
        job = await client.until(job_id, job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_LEASED)
    assert job.failures == 0


async def test_a_cancel_reaches_the_agent_and_its_word_ends_the_job(client: Client, agent: RawAgent) -> None:
    job_id = await client.submit()
    grant = await agent.grant()
    await agent.run(grant)
    answer = await client.jobs.CancelJobs(job_service_pb2.CancelJobsRequest(job_ids=[job_id]))
    assert list(answer.results) == [job_service_pb2.CANCEL_RESULT_REQUESTED]
    revoke = await agent.revoke()
    assert (revoke.lease_id, revoke.reason) == (grant.lease_id, pb.REVOKE_REASON_CANCELLED)
    await agent.tell(grant, ended=ended(job_pb2.OUTCOME_CANCELLED, signal=15))
    assert (await client.job(job_id)).state == job_pb2.JOB_STATE_CANCELLED


async def test_terminal_is_visible_only_after_the_last_log_byte(client: Client, agent: RawAgent) -> None:
    job_id = await client.submit()
    grant = await agent.grant()
    await agent.run(grant)
    await agent.tell(grant, ended=ended(final_log_offset=6))
    assert (await client.job(job_id)).state == job_pb2.JOB_STATE_RUNNING
    chunk = pb.LogChunk(
        job_id=job_id, lease_id=grant.lease_id, offset=0, stream=job_pb2.LOG_STREAM_STDOUT, data=b"hello\n"
    )
    await agent.send(log_chunks=pb.LogChunks(chunks=[chunk]))
    (position,) = (await agent.next("ack")).ack.logs
    assert position.end_offset == 6
    assert (await client.until(job_id, job_pb2.JOB_STATE_SUCCEEDED)).state == job_pb2.JOB_STATE_SUCCEEDED


async def test_a_rebooted_hosts_jobs_move_at_once_on_its_proof(
    client: Client, agent: RawAgent, pool: asyncpg.Pool
) -> None:
    job_id = await client.submit()
    grant = await agent.grant()
    await agent.run(grant)
    await agent.leave()
    # The host was away for longer than two heartbeat intervals, far less than the ttl.
    await advance_lease_time(pool, timedelta(seconds=3))
    agent.session_id = 0
    host = pb.HostIdentity(boot_id="boot-2", hardware_id=f"dmi-uuid:{agent.agent_id}", hostname="host")
    await agent.connect(host=host)
    proven = await pool.fetchval("SELECT clock FROM leader")
    again = await agent.grant()
    assert (again.job_id, again.attempt) == (job_id, 2)
    # In lease time: two ticks of it, or a late one that counts up to a second; not a ttl of sixty.
    assert await pool.fetchval("SELECT offered_at FROM lease") - proven <= 3_000


async def test_one_agent_id_on_two_hosts_is_refused(client: Client, agent: RawAgent) -> None:
    await client.submit()
    await agent.run(await agent.grant())
    thief = RawAgent(client, agent.agent_id)
    host = pb.HostIdentity(boot_id="boot-9", hardware_id="dmi-uuid:other", hostname="thief")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await thief.connect(host=host)
    assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    await agent.heartbeat()
    await agent.next("ack")


async def test_a_server_that_stops_sends_its_agents_elsewhere(database_url: str) -> None:
    async with running_server(database_url) as server, connected(server) as client:
        agent = RawAgent(client)
        await agent.connect()
        stopping = asyncio.create_task(server.stop())
        assert "stopping" in (await agent.next("reconnect")).reconnect.reason
        await agent.leave()
        await stopping
        server.stop = _nothing  # type: ignore[method-assign]


async def _nothing() -> None:
    return None


async def test_two_replicas_grant_to_agents_of_either(database_url: str) -> None:
    async with (
        running_server(database_url) as leader,
        running_server(database_url) as follower,
        connected(leader) as here,
        connected(follower) as there,
    ):
        agent = RawAgent(there)
        await agent.connect()
        job_id = await here.submit()
        grant = await agent.grant()
        assert grant.job_id == job_id
        await agent.run(grant)
        await agent.tell(grant, ended=ended())
        assert (await here.until(job_id, job_pb2.JOB_STATE_SUCCEEDED)).state == job_pb2.JOB_STATE_SUCCEEDED
        await agent.leave()
