"""Records the conversations that ``test_recordings.py`` replays: ``python -m tests.contract.record``.

A real server on a real database and a real agent talk; only the workloads are
scripted. Run it once when a protocol version is made; the recordings of a
version that was released are never made again.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
from google.protobuf import json_format

from lessor import timing
from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import job_pb2, job_service_pb2
from lessor_agent.adoption import adopt
from lessor_agent.journal import Journal
from lessor_agent.protocol.core import AgentCore, Loss, Profile
from lessor_agent.runtimes.base import RuntimeContext
from lessor_agent.stream import GrpcStreams, StreamListener
from lessor_agent.supervisor import Supervisor
from lessor_agent.testing.scripted import ScriptedExecution, ScriptedHost, ScriptedRuntime
from lessor_server.server import Server
from tests.support.conversation import Conversation, Line, Names, normalised
from tests.support.postgres import PostgresServer, wanted_version
from tests.support.proxy import Proxy
from tests.support.servers import Client, connected, running_server

RECORDINGS = Path(__file__).parent / "recordings"
HEARTBEAT = timedelta(seconds=1)
NOBODY = "127.0.0.1:9"
"""Where nothing listens."""

PROFILE = Profile(
    agent_id="agent-00000001",
    agent_name="recorder",
    version="recorded",
    host=pb.HostIdentity(boot_id="boot-1", hardware_id="dmi-uuid:recorder", hostname="host"),
    inventory=pb.Inventory(
        cpu_millis=4000,
        memory_bytes=1 << 34,
        gpus=[pb.Gpu(uuid=f"GPU-{n}", index=n, model="NVIDIA H200", memory_bytes=141 << 30) for n in range(2)],
        labels={"zone": "a"},
    ),
    runtimes=(pb.RuntimeInfo(name="process", can_set_user=True),),
    heartbeat_interval=HEARTBEAT,
)


class RecordingStreams(GrpcStreams):
    """The agent's streams; what goes over them is written down in the order the agent says and hears it."""

    def __init__(self, address: str, recorder: Recorder) -> None:
        super().__init__(address)
        self._recorder = recorder

    def open(self, stream_id: int, listener: StreamListener) -> None:
        """See :class:`lessor_agent.stream.Streams`."""
        super().open(stream_id, _Listener(listener, self._recorder))

    def send(self, stream_id: int, message: pb.ConnectRequest, *, urgent: bool = False) -> None:
        """See :class:`lessor_agent.stream.Streams`."""
        self._recorder.note(agent=message)
        super().send(stream_id, message, urgent=urgent)


class _Listener:
    def __init__(self, listener: StreamListener, recorder: Recorder) -> None:
        self._listener = listener
        self._recorder = recorder

    def stream_opened(self, stream_id: int) -> None:
        self._recorder.happens(connect=True)
        self._listener.stream_opened(stream_id)

    def stream_message(self, stream_id: int, message: pb.ConnectResponse) -> None:
        self._recorder.note(server=message)
        self._listener.stream_message(stream_id, message)

    def stream_lost(self, stream_id: int, loss: Loss) -> None:
        self._listener.stream_lost(stream_id, loss)


class Recorder:
    """One conversation in the making, and what steers it."""

    def __init__(self, name: str, about: str, server: Server, client: Client, pool: asyncpg.Pool,
                 directory: Path) -> None:  # fmt: skip
        self.conversation = Conversation(name, about, timing.PROTOCOL_VERSION)
        self.client = client
        self.pool = pool
        self.directory = directory
        self.names = Names()
        self.host = ScriptedHost(directory / "host")
        self.address = f"127.0.0.1:{server.port}"
        self.proxy: Proxy
        self._news = asyncio.Event()

    def note(self, *, agent: pb.ConnectRequest | None = None, server: pb.ConnectResponse | None = None) -> None:
        """Writes a message down."""
        self.conversation.lines.append(
            Line(
                agent=normalised(agent, self.names) if agent is not None else None,
                server=normalised(server, self.names) if server is not None else None,
            )
        )
        self._news.set()

    def happens(self, **what: Any) -> None:
        """Writes down what neither side says."""
        self.conversation.lines.append(Line(happens=what))

    async def heard(self, condition: Callable[[Line], bool], count: int = 1) -> None:
        """Waits until so many lines meet a condition."""
        async with asyncio.timeout(60):
            while sum(condition(line) for line in self.conversation.lines) < count:
                self._news.clear()
                await self._news.wait()

    async def acked(self, event: str, count: int = 1) -> None:
        """Waits until so many events of a kind, all leases together, are acked."""

        def seqs() -> list[int]:
            return [
                e.seq
                for line in self.conversation.lines
                if line.agent is not None
                for e in line.agent.lease_events.events
                if e.WhichOneof("event") == event
            ]

        def acked() -> set[int]:
            return {
                seq for line in self.conversation.lines if line.server is not None for seq in line.server.ack.event_seqs
            }

        await self.heard(lambda line: line.server is not None and len(acked() & set(seqs())) >= count)

    async def submit(self, **fields: Any) -> str:
        """Submits a job; returns its live id."""
        spec = job_pb2.JobSpec(command=job_pb2.Command(argv=["train"]), **fields)
        answer = await self.client.jobs.SubmitJob(job_service_pb2.SubmitJobRequest(spec=spec))
        name = self.names.recorded("job", answer.job_id)
        self.happens(submit=json_format.MessageToDict(spec), job=name)
        return str(answer.job_id)

    async def running(self, number: int = 1) -> ScriptedExecution:
        """Returns the execution of the recording's lease ``number``, once the server knows that it runs."""
        await self.heard(lambda _: self.names.knows("lease", number))
        execution = await self.host.running(self.names.live("lease", number))
        await self.acked("running", number)
        return execution

    def works(self, execution: ScriptedExecution, **does: Any) -> None:
        """Has the workload write (``stdout``, ``stderr``, ``event``) or end (``exit_code``)."""
        self.happens(workload=does, lease_id=self.names.recorded("lease", execution.lease_id))
        execution.write(does.get("stdout", "").encode(), does.get("stderr", "").encode())
        if "event" in does:
            execution.tell(**does["event"])
        if "exit_code" in does:
            execution.end(does["exit_code"])

    async def logged(self, end_offset: int) -> None:
        """Waits until a log position is acked."""
        await self.heard(
            lambda line: line.server is not None and any(p.end_offset == end_offset for p in line.server.ack.logs)
        )

    async def cut(self, *, closed: bool = False) -> None:
        """Cuts the stream; ``closed``: the agent cannot come back before the proxy is given its address again."""
        self.happens(cut=True)
        if closed:
            self.proxy.retarget(NOBODY)
        await self.proxy.cut()

    async def state(self, job_id: str, state: job_pb2.JobState.ValueType) -> None:
        """Waits until a job is in a state."""
        await self.client.until(job_id, state)
        self.happens(until=job_pb2.JobState.Name(state), job=self.names.recorded("job", job_id))

    @asynccontextmanager
    async def agent(self, state: str = "state", *, says_goodbye: bool = True) -> AsyncIterator[Supervisor]:
        """Runs an agent on a state directory."""
        path = self.directory / state
        path.mkdir(exist_ok=True)
        journal = Journal(path / "journal.db")
        runtime = ScriptedRuntime(RuntimeContext(path, ()), self.host)
        adopted = await adopt(journal.open("boot-1"), {"process": runtime}, "boot-1")
        supervisor = Supervisor(
            AgentCore(PROFILE, adopted.restored, lambda: 0.5),
            streams=RecordingStreams(self.proxy.address, self),
            journal=journal,
            runtimes={"process": runtime},
            adopted=adopted,
            read_gpus=lambda: [pb.GpuReading(uuid="GPU-0", utilization_percent=50, memory_used_bytes=1 << 30)],
            gpu_interval_s=60,
        )
        welcomes = sum(map(is_welcome, self.conversation.lines))
        task = asyncio.create_task(supervisor.run())
        try:
            await self.heard(is_welcome, welcomes + 1)
            yield supervisor
            if says_goodbye:
                supervisor.stop("recorded")
                await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.to_thread(journal.close)


def is_welcome(line: Line) -> bool:
    """Returns whether the server welcomes the agent here."""
    return line.server is not None and line.server.HasField("welcome")


def without_vain_streams(lines: list[Line]) -> list[Line]:
    """Returns the lines but for the streams that reached nobody: how many there are is chance."""
    kept: list[Line] = []
    stream: list[Line] = []
    for line in [*lines, Line(happens={"connect": True})]:
        if line.happens is not None and "connect" in line.happens:
            reached = not stream or any(each.server is not None for each in stream)
            kept += [each for each in stream if reached or (each.happens is not None and "connect" not in each.happens)]
            stream = []
        stream.append(line)
    return kept


async def run_to_end(record: Recorder) -> None:
    """A job from its grant to the last ack."""
    async with record.agent():
        job = await record.submit(name="train", labels={"team": "vision"}, resources=job_pb2.Resources(gpu_count=2))
        work = await record.running()
        record.works(work, event={"type": "progress", "fraction": 0.5, "message": "half"})
        await record.heard(lambda line: line.agent is not None and line.agent.HasField("progress"))
        record.works(work, event={"type": "checkpoint", "cursor": "step-5"})
        await record.acked("checkpoint_saved")
        record.works(work, stdout="epoch 1\n")
        await record.logged(8)
        record.works(work, stderr="warning\n")
        await record.logged(16)
        await record.heard(lambda line: line.server is not None and line.server.ack.heartbeat_seq > 0)
        record.works(work, event={"type": "result", "value": {"loss": 0.25}})
        record.works(work, exit_code=0)
        await record.state(job, job_pb2.JOB_STATE_SUCCEEDED)
        await record.acked("ended")


async def reconnect_and_keep(record: Recorder) -> None:
    """The stream is cut while a job runs; it goes on, and its log continues where it stood."""
    async with record.agent():
        job = await record.submit()
        work = await record.running()
        record.works(work, stdout="before\n")
        await record.logged(7)
        await record.cut()
        record.works(work, stdout="meanwhile\n")
        await record.heard(is_welcome, 2)
        await record.logged(17)
        record.works(work, exit_code=3)
        await record.state(job, job_pb2.JOB_STATE_FAILED)
        await record.acked("ended")


async def stale_lease(record: Recorder) -> None:
    """The lease expires while the agent is away; it comes back, is told so, and stops the work."""
    async with record.agent():
        job = await record.submit(retry=job_pb2.RetryPolicy(max_losses=1))
        work = await record.running()
        await record.cut(closed=True)
        record.happens(lease_time_s=120)
        await record.pool.execute("UPDATE leader SET clock = clock + 120000")
        await record.state(job, job_pb2.JOB_STATE_FAILED)
        record.proxy.retarget(record.address)
        await record.host.until(lambda: work.forgotten, timeout_s=60)


async def cancel(record: Recorder) -> None:
    """A user cancels a running job."""
    async with record.agent():
        job = await record.submit()
        await record.running()
        record.happens(cancel=record.names.recorded("job", job))
        await record.client.jobs.CancelJobs(job_service_pb2.CancelJobsRequest(job_ids=[job]))
        await record.state(job, job_pb2.JOB_STATE_CANCELLED)
        await record.acked("ended")


async def not_listed(record: Recorder) -> None:
    """An agent that has lost its state gives back what it does not know; the job runs again."""
    async with record.agent(says_goodbye=False):
        job = await record.submit()
        await record.running()
    record.happens(cut=True)
    record.happens(forget_state=True)
    record.host = ScriptedHost(record.directory / "host-2")
    async with record.agent("state-2"):
        await record.acked("released")
        again = await record.running(2)
        record.works(again, exit_code=0)
        await record.state(job, job_pb2.JOB_STATE_SUCCEEDED)
        await record.acked("ended")


CONVERSATIONS: tuple[Callable[[Recorder], Awaitable[None]], ...] = (
    run_to_end,
    reconnect_and_keep,
    stale_lease,
    cancel,
    not_listed,
)


async def record_one(postgres: PostgresServer, play: Callable[[Recorder], Awaitable[None]]) -> Conversation:
    """Plays a conversation on a database of its own and returns what was said."""
    url = postgres.create_migrated()
    pool = await asyncpg.create_pool(url, min_size=1, max_size=2)
    try:
        with tempfile.TemporaryDirectory() as folder:
            async with (
                running_server(url) as server,
                connected(server) as client,
                Proxy(f"127.0.0.1:{server.port}") as proxy,
            ):
                about = (play.__doc__ or "").strip()
                recorder = Recorder(play.__name__, about, server, client, pool, Path(folder))
                recorder.proxy = proxy
                await play(recorder)
            recorder.conversation.lines = without_vain_streams(recorder.conversation.lines)
            return recorder.conversation
    finally:
        await pool.close()
        postgres.drop(url)


def main() -> None:
    """Records all conversations of today's protocol version."""
    directory = RECORDINGS / f"v{timing.PROTOCOL_VERSION}"
    directory.mkdir(parents=True, exist_ok=True)
    with PostgresServer(wanted_version()) as postgres:
        for play in CONVERSATIONS:
            conversation = asyncio.run(record_one(postgres, play))
            conversation.write(directory)
            print(f"{conversation.name}: {len(conversation.lines)} lines")


if __name__ == "__main__":
    main()
