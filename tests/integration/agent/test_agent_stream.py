"""Supervisor and stream against a server in the same process, with scripted jobs."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from lessor.lifecycle import LeasePhase, Outcome
from lessor.v1 import agent_service_pb2 as pb
from lessor_agent import adoption
from lessor_agent.adoption import adopt
from lessor_agent.journal import Contents, Done, Journal, JournalUnavailable
from lessor_agent.protocol.actions import Entry
from lessor_agent.protocol.core import AgentCore
from lessor_agent.runtimes.base import RuntimeContext, StopCause
from lessor_agent.stream import GrpcStreams
from lessor_agent.supervisor import Supervisor, start_request
from lessor_agent.testing import ScriptedHost, ScriptedRuntime
from tests.support.agent_core import a_grant, a_profile, its_end_is_known, stale
from tests.support.fake_server import FakeAgentServer

pytestmark = pytest.mark.integration

FAST = timedelta(milliseconds=100)


@dataclass
class Agent:
    """A running agent."""

    supervisor: Supervisor
    task: asyncio.Task[int]

    async def stop(self) -> int:
        """Stops it in order."""
        self.supervisor.stop("test")
        return await self.task


@dataclass
class Bench:
    """Where agents are started: one server, one host, one state directory."""

    server: FakeAgentServer
    host: ScriptedHost
    directory: Path

    @asynccontextmanager
    async def agent(
        self, *, boot_id: str = "boot-1", read_gpus: Callable[[], list[pb.GpuReading]] = lambda: []
    ) -> AsyncIterator[Agent]:
        """Runs an agent; leaving the context kills it without a Goodbye, if it still runs."""
        runtimes = {"process": ScriptedRuntime(RuntimeContext(self.directory, ()), self.host)}
        journal = Journal(self.directory / "journal.db")
        try:
            contents = journal.open(boot_id)
        except JournalUnavailable:
            contents = Contents()
        adopted = await adopt(contents, runtimes, boot_id)
        supervisor = Supervisor(
            AgentCore(a_profile(FAST), adopted.restored, lambda: 0.1),
            streams=GrpcStreams(self.server.address),
            journal=journal,
            runtimes=runtimes,
            adopted=adopted,
            read_gpus=read_gpus,
            gpu_interval_s=0.1,
        )
        agent = Agent(supervisor, asyncio.create_task(supervisor.run()))
        try:
            yield agent
        finally:
            agent.task.cancel()
            await asyncio.gather(agent.task, return_exceptions=True)
            await asyncio.to_thread(journal.close)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with FakeAgentServer() as server:
        yield Bench(server, ScriptedHost(tmp_path / "host"), tmp_path)


async def test_a_job_runs_from_grant_to_forgotten(bench: Bench) -> None:
    async with bench.agent():
        server = await bench.server.welcomed()
        server.grant_ids(1)
        job = await bench.host.running(1)
        await server.event(1, "running")
        job.write(stdout=b"hello\n", stderr=b"careful\n")
        job.tell(type="progress", fraction=0.5, message="half")
        job.tell(type="metrics", values={"loss": 0.25})
        job.tell(type="checkpoint", cursor="step-5")
        job.tell(type="result", value={"accuracy": 0.9})
        job.end(exit_code=0)
        ended = (await server.event(1, "ended")).ended
        await bench.host.until(lambda: job.forgotten)
    assert server.events(1) == ["accepted", "running", "checkpoint_saved", "ended"]
    assert Outcome(ended.outcome) is Outcome.SUCCEEDED
    assert ended.result_json == b'{"accuracy":0.9}'
    assert ended.final_log_offset == 14
    assert (server.log(1, 1), server.log(1, 2)) == (b"hello\n", b"careful\n")
    progress = [message.progress.updates[0].progress for message in server.received if message.HasField("progress")]
    assert (progress[-1].fraction, progress[-1].message, progress[-1].metrics["loss"]) == (0.5, "half", 0.25)


async def test_heartbeats_renew_and_carry_gpu_readings(bench: Bench) -> None:
    reading = pb.GpuReading(uuid="GPU-1", utilization_percent=42)
    async with bench.agent(read_gpus=lambda: [reading]):
        server = await bench.server.welcomed()
        server.grant_ids(1)
        job = await bench.host.running(1)
        before_ns = job.deadline_ns
        await bench.host.until(lambda: job.deadline_ns > before_ns)
        await server.until(lambda: any(beat.gpus and 1 in beat.lease_ids for beat in server.heartbeats()))
    assert server.heartbeats()[-1].gpus[0] == reading


async def test_what_ended_while_no_agent_was_there_is_said_with_the_first_hello(bench: Bench) -> None:
    async with bench.agent():
        server = await bench.server.welcomed()
        server.grant_ids(1, 2)
        ends, runs = await bench.host.running(1), await bench.host.running(2)
        await server.event(1, "running")
        await server.event(2, "running")
    ends.write(stdout=b"done\n")
    ends.end(exit_code=0)
    async with bench.agent():
        again = await bench.server.welcomed()
        (hello,) = [message.hello for message in again.received if message.HasField("hello")]
        phases = {lease.lease_id: LeasePhase(lease.phase) for lease in hello.leases}
        ended = (await again.event(1, "ended")).ended
    assert phases == {1: LeasePhase.DRAINING, 2: LeasePhase.RUNNING}
    assert (Outcome(ended.outcome), ended.final_log_offset) == (Outcome.SUCCEEDED, 5)
    assert not runs.forgotten


async def test_what_ended_while_the_agent_stood_still_is_said_with_the_next_hello(bench: Bench) -> None:
    async with bench.agent() as agent:
        server = await bench.server.welcomed()
        server.grant_ids(1)
        job = await bench.host.running(1)
        await server.event(1, "running")
        goes_on = threading.Event()
        agent.supervisor._disk.submit(goes_on.wait)  # noqa: SLF001 - no end can be read
        try:
            job.end(exit_code=0)
            server.drop()
            again = await bench.server.connection()
        finally:
            goes_on.set()
        hello = await again.welcome()
    assert [(lease.lease_id, LeasePhase(lease.phase)) for lease in hello.leases] == [(1, LeasePhase.DRAINING)]


async def test_without_acks_no_deadline_moves_and_the_agent_comes_back(bench: Bench) -> None:
    async with bench.agent():
        server = await bench.server.welcomed()
        server.acks_heartbeats = False
        server.grant_ids(1)
        job = await bench.host.running(1)
        before_ns = job.deadline_ns
        again = await bench.server.connection()
        assert job.deadline_ns == before_ns
        hello = await again.welcome()
        assert [lease.lease_id for lease in hello.leases] == [1]
        await bench.host.until(lambda: job.deadline_ns > before_ns)
    assert job.exit is None


async def test_a_dropped_stream_costs_the_job_nothing(bench: Bench) -> None:
    async with bench.agent():
        server = await bench.server.welcomed()
        server.grant_ids(1)
        job = await bench.host.running(1)
        job.write(stdout=b"one ")
        await server.until(lambda: server.log(1, 1) == b"one ")
        server.drop()
        job.write(stdout=b"two")
        again = await bench.server.welcomed(after=server)
        await again.until(lambda: again.log(1, 1) == b"one two")
        job.end(exit_code=0)
        await again.event(1, "ended")
    assert bench.host.begun == [1]


async def test_the_agent_survives_a_server_that_goes_away_and_comes_back(bench: Bench) -> None:
    async with bench.agent():
        server = await bench.server.welcomed()
        server.grant_ids(1)
        job = await bench.host.running(1)
        await bench.server.stop()
        job.write(stdout=b"meanwhile")
        job.end(exit_code=0)
        await bench.server.start()
        again = await bench.server.welcomed()
        ended = await again.event(1, "ended")
        await again.until(lambda: again.log(1, 1) == b"meanwhile")
    assert Outcome(ended.ended.outcome) is Outcome.SUCCEEDED


async def test_reconnect_is_obeyed(bench: Bench) -> None:
    async with bench.agent():
        server = await bench.server.welcomed()
        server.grant_ids(1)
        await server.event(1, "running")
        server.say(pb.ConnectResponse(reconnect=pb.Reconnect(reason="stopping")))
        again = await bench.server.connection()
        hello = await again.welcome()
    assert [(lease.lease_id, lease.phase) for lease in hello.leases] == [(1, 3)]
    assert hello.session_id == 1


async def test_a_cancel_stops_the_job(bench: Bench) -> None:
    async with bench.agent():
        server = await bench.server.welcomed()
        server.grant_ids(1)
        job = await bench.host.running(1)
        server.revoke(1, pb.REVOKE_REASON_CANCELLED)
        ended = (await server.event(1, "ended")).ended
    assert job.stops[0][0] is StopCause.CANCELLED
    assert Outcome(ended.outcome) is Outcome.CANCELLED


async def test_a_stale_lease_is_stopped_without_a_word(bench: Bench) -> None:
    async with bench.agent():
        server = await bench.server.welcomed()
        server.grant_ids(1)
        job = await bench.host.running(1)
        await server.event(1, "running")
        server.drop()
        again = await bench.server.connection()
        await again.welcome(stale(1))
        await bench.host.until(lambda: job.forgotten)
        await again.until(lambda: any(not beat.lease_ids for beat in again.heartbeats()))
    assert again.events(1) == []


async def test_refused_and_broken_starts_cost_no_slot(bench: Bench) -> None:
    async with bench.agent():
        server = await bench.server.welcomed()
        bench.host.refusal = "no such user"
        server.grant_ids(1)
        assert (await server.event(1, "rejected")).rejected.error.message == "no such user"
        bench.host.refusal, bench.host.failure = None, RuntimeError("out of pids")
        server.grant_ids(2)
        assert "out of pids" in (await server.event(2, "rejected")).rejected.error.message
        assert bench.host.executions == {}
        bench.host.failure = None
        server.grant_ids(3)
        await bench.host.running(3)
        await server.until(lambda: bool(server.heartbeats()) and list(server.heartbeats()[-1].lease_ids) == [3])
    assert bench.host.begun == [3]


async def test_a_killed_agent_finds_its_jobs_again(bench: Bench) -> None:
    async with bench.agent():
        server = await bench.server.welcomed()
        server.grant_ids(1, 2, 3)
        going, ended, gone = [await bench.host.running(lease_id) for lease_id in (1, 2, 3)]
        going.write(stdout=b"before ")
        for lease_id in (1, 2, 3):
            await server.event(lease_id, "running")
        await server.until(lambda: server.log(1, 1) == b"before ")
    ended.end(exit_code=7)
    gone.vanish()
    going.write(stdout=b"after")
    async with bench.agent():
        again = await bench.server.connection()
        again.restore_logs(server)
        hello = await again.welcome()
        assert hello.session_id == 0
        assert [lease.lease_id for lease in hello.leases] == [1, 2, 3]
        assert (await again.event(2, "ended")).ended.exit_code == 7
        assert (await again.event(3, "ended")).ended.error.type == "KEEPER_DIED"
        await again.until(lambda: again.log(1, 1) == b"before after")
    assert bench.host.begun == [1, 2, 3]


async def test_after_a_reboot_what_vanished_is_lost_to_it(bench: Bench) -> None:
    async with bench.agent():
        server = await bench.server.welcomed()
        server.grant_ids(1)
        job = await bench.host.running(1)
        await server.event(1, "running")
    job.vanish()
    async with bench.agent(boot_id="boot-2"):
        again = await bench.server.welcomed()
        ended = (await again.event(1, "ended")).ended
    assert ended.error.type == "HOST_REBOOTED"


async def test_killed_between_intent_and_handle_nothing_is_left_and_the_lease_is_released(bench: Bench) -> None:
    async with bench.agent():
        server = await bench.server.welcomed()
        bench.host.gate.clear()
        server.grant_ids(1)
        await server.until(lambda: bool(server.heartbeats()) and list(server.heartbeats()[-1].lease_ids) == [1])
    # The keeper was made, but the agent died before it knew.
    bench.host.gate.set()
    runtime = ScriptedRuntime(RuntimeContext(bench.directory, ()), bench.host)
    await runtime.prepare(start_request(a_grant(1), 0, can_freeze=False))
    async with bench.agent():
        assert bench.host.executions == {}
        again = await bench.server.connection()
        hello = await again.welcome()
        await again.event(1, "released")
        again.grant_ids(1)
        await again.until(lambda: again.events(1).count("released") == 2)
    assert list(hello.leases) == []
    assert bench.host.begun == []


async def test_unacked_events_outlive_the_agent(bench: Bench) -> None:
    async with bench.agent():
        server = await bench.server.welcomed()
        server.acks_events = False
        server.grant_ids(1)
        job = await bench.host.running(1)
        await server.event(1, "running")
        job.end(exit_code=3)
        first = await server.event(1, "ended")
    async with bench.agent():
        again = await bench.server.welcomed()
        second = await again.event(1, "ended")
        await bench.host.until(lambda: job.forgotten)
    assert first == second
    assert again.events(1) == ["accepted", "running", "ended"]


async def test_an_end_the_server_knows_is_not_told_again_but_its_log_is_finished(bench: Bench) -> None:
    async with bench.agent():
        server = await bench.server.welcomed()
        server.acks_logs = False
        server.grant_ids(1)
        job = await bench.host.running(1)
        job.write(stdout=b"0123456789")
        job.end(exit_code=0)
        await server.event(1, "ended")
        server.drop()
        again = await bench.server.connection()
        await again.welcome(its_end_is_known(1))
        await bench.host.until(lambda: job.forgotten)
    assert again.log(1, 1) == b"0123456789"
    assert again.events(1) == []


async def test_a_restart_amid_the_last_log_bytes_finishes_the_log(bench: Bench) -> None:
    async with bench.agent():
        server = await bench.server.welcomed()
        server.acks_logs = False
        server.grant_ids(1)
        job = await bench.host.running(1)
        job.write(stdout=b"0123456789")
        job.end(exit_code=0)
        await server.event(1, "ended")
        # The ack has been heard once a later heartbeat is answered.
        await server.until(lambda: len(server.heartbeats()) >= 3)
    async with bench.agent():
        again = await bench.server.connection()
        await again.welcome(its_end_is_known(1))
        await bench.host.until(lambda: job.forgotten)
    assert again.log(1, 1) == b"0123456789"


async def test_a_large_log_arrives_whole_through_a_small_window_beside_heartbeats(bench: Bench) -> None:
    data = os.urandom(3_000_000)
    async with bench.agent():
        connection = await bench.server.connection()
        await connection.welcome(window=128 * 1024)
        connection.grant_ids(1)
        job = await bench.host.running(1)
        job.write(stdout=data, stderr=b"x" * 1000)
        job.end(exit_code=0)
        await bench.host.until(lambda: job.forgotten)
    assert connection.log(1, 1) == data
    assert connection.log(1, 2) == b"x" * 1000


async def test_a_stop_says_goodbye_and_leaves_jobs_running(bench: Bench) -> None:
    async with bench.agent() as agent:
        server = await bench.server.welcomed()
        server.grant_ids(1)
        job = await bench.host.running(1)
        # Nothing else waits to be sent: the goodbye goes behind what does, and is given a bounded time.
        await server.event(1, "running")
        assert await agent.stop() == 0
        await server.until(lambda: server.ended)
        assert server.received[-1].HasField("goodbye")
    assert job.exit is None
    assert job.stops == []


async def test_an_agent_that_can_never_be_served_ends(bench: Bench) -> None:
    bench.server.refusal = "PROTOCOL_UNSUPPORTED"
    async with bench.agent() as agent:
        assert await asyncio.wait_for(agent.task, 60) == 1


async def test_without_a_journal_work_is_rejected_and_heartbeats_go_on(bench: Bench) -> None:
    (bench.directory / "journal.db").write_bytes(b"this is no database" * 100)
    async with bench.agent():
        server = await bench.server.welcomed()
        server.grant_ids(1)
        error = (await server.event(1, "rejected")).rejected.error
        await server.until(lambda: len(server.heartbeats()) >= 2)
    assert error.type == "JOURNAL_UNAVAILABLE"
    assert bench.host.begun == []


async def test_strays_are_ended_before_the_first_hello(bench: Bench) -> None:
    runtime = ScriptedRuntime(RuntimeContext(bench.directory, ()), bench.host)
    stray = await runtime.prepare(start_request(a_grant(99), 0, can_freeze=False))
    await stray.begin()
    async with bench.agent():
        assert bench.host.executions == {}
        await bench.server.welcomed()


async def test_a_stray_that_does_not_end_is_not_released_before_it_has(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adoption, "STRAY_WAIT_S", 0.01)
    runtime = ScriptedRuntime(RuntimeContext(bench.directory, ()), bench.host)
    stray = await runtime.prepare(start_request(a_grant(99), 0, can_freeze=False))
    await stray.begin()
    bench.host.stubborn = True
    async with bench.agent():
        server = await bench.server.welcomed()
        server.revoke(99, pb.REVOKE_REASON_NOT_LISTED)
        server.grant_ids(1)
        await server.event(1, "running")
        assert server.events(99) == []
        bench.host.executions[99].end(signal_number=9)
        await server.event(99, "released")
        assert 99 not in bench.host.executions


async def test_unreadable_output_of_one_job_costs_the_others_nothing(bench: Bench) -> None:
    async with bench.agent():
        server = await bench.server.welcomed()
        bench.host.gate.clear()
        server.grant_ids(1, 2)
        directory = bench.host.directory / "1"
        bench.host.gate.set()
        job, other = await bench.host.running(1), await bench.host.running(2)
        assert job.output.stdout.is_relative_to(directory)
        job.output.stdout.unlink()
        job.output.stdout.mkdir()
        other.write(stdout=b"fine")
        job.end(exit_code=0)
        other.end(exit_code=0)
        for lease_id in (1, 2):
            ended = (await server.event(lease_id, "ended")).ended
            assert Outcome(ended.outcome) is Outcome.SUCCEEDED
        await server.until(lambda: bool(server.heartbeats()) and not server.heartbeats()[-1].lease_ids)
        assert server.log(2, 1) == b"fine"


async def test_a_message_of_many_grants_costs_few_transactions_and_few_messages(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    transactions: list[int] = []
    submit = Journal.submit

    def counted(journal: Journal, ticket: int, entries: Sequence[Entry], done: Done) -> None:
        transactions.append(ticket)
        submit(journal, ticket, entries, done)

    monkeypatch.setattr(Journal, "submit", counted)
    leases = range(1, 101)
    async with bench.agent():
        server = await bench.server.welcomed()
        server.grant_ids(*leases)
        await server.until(lambda: all("running" in server.events(lease_id) for lease_id in leases))
    assert len(transactions) < 20
    assert len([message for message in server.received if message.HasField("lease_events")]) < 20


async def test_an_action_that_cannot_be_carried_out_ends_the_agent_loudly(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench.agent() as agent:
        server = await bench.server.welcomed()

        def broken(*_arguments: object, **_options: object) -> None:
            raise RuntimeError("broken invariant")

        monkeypatch.setattr(Journal, "submit", broken)
        server.grant_ids(1)
        with pytest.raises(RuntimeError, match="broken invariant"):
            await asyncio.wait_for(agent.task, 60)
