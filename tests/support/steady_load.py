"""Everything that users and agents do, all the time, on one server: whatever fails, fails the test.

What is submitted next depends on what has ended, not on the time: a server that
stands still for a moment is asked less, and one that fails is found out.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import fleet_service_pb2 as fleet
from lessor.v1 import job_pb2
from lessor.v1 import job_service_pb2 as jobs
from tests.support.servers import EOF, Client, RawAgent, ended

TERMINAL = frozenset({job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED})
SUBMITTERS = 3
MAX_OPEN = 12
"""So many jobs of a submitter may be open."""
HEARTBEAT_S = 0.5
ANSWER_S = 20.0
"""No answer takes so long."""
LINE = b"a line of its log\n"


class BusyAgent:
    """An agent that runs what it is granted, with logs, progress and a checkpoint, in no time."""

    def __init__(self, client: Client, agent_id: str, **hello: Any) -> None:
        self.raw = RawAgent(client, agent_id, **hello)
        self._writing = asyncio.Lock()
        self._seqs = itertools.count(1)
        self._acks: dict[int, asyncio.Future[None]] = {}
        self._beat_seq = 0
        self._beat_acked = asyncio.Event()
        self._held: set[int] = set()
        self._asked_back: set[int] = set()

    async def serve(self, stopped: asyncio.Event) -> None:
        """Works until it is told to stop.

        Raises:
            AssertionError: The server ended the stream, asked for a new hello or refused a report.
            TimeoutError: It did not ack in time.
        """
        await self.raw.connect()
        async with asyncio.TaskGroup() as tasks:
            reader = tasks.create_task(self._read(tasks))
            beating = tasks.create_task(self._beat())
            await stopped.wait()
            reader.cancel()
            beating.cancel()
        await self.raw.leave()

    async def _read(self, tasks: asyncio.TaskGroup) -> None:
        while (message := await self.raw.call.read()) is not EOF:
            kind = message.WhichOneof("message")
            if kind == "grants":
                for grant in message.grants.grants:
                    # Said again until it is answered.
                    if grant.lease_id not in self._held:
                        self._held.add(grant.lease_id)
                        tasks.create_task(self._run(grant))
            elif kind == "revokes":
                for revoke in message.revokes.revokes:
                    if revoke.lease_id not in self._held | self._asked_back:
                        # Taken back before it was told of, or over already.
                        tasks.create_task(self._tell(revoke, released=pb.Released()))
                    self._asked_back.add(revoke.lease_id)
            elif kind == "ack":
                for seq in message.ack.event_seqs:
                    self._acks.pop(seq).set_result(None)
                if message.ack.heartbeat_seq == self._beat_seq:
                    self._beat_acked.set()
            else:
                raise AssertionError(f"{self.raw.agent_id} was told {message}")
        raise AssertionError(f"the stream ended: {await self.raw.call.code()} {await self.raw.call.details()}")

    async def _beat(self) -> None:
        while True:
            self._beat_acked.clear()
            self._beat_seq += 1
            await self._send(heartbeat=pb.Heartbeat(seq=self._beat_seq, lease_ids=self._held))
            async with asyncio.timeout(ANSWER_S):
                await self._beat_acked.wait()
            await asyncio.sleep(HEARTBEAT_S)  # The agent's own pace, not a wait for anything.

    async def _tell(self, grant: pb.Grant | pb.Revoke, **event: Any) -> None:
        seq = next(self._seqs)
        self._acks[seq] = acked = asyncio.get_running_loop().create_future()
        message = pb.LeaseEvent(seq=seq, job_id=grant.job_id, lease_id=grant.lease_id, **event)
        await self._send(lease_events=pb.LeaseEvents(events=[message]))
        async with asyncio.timeout(ANSWER_S):
            await acked

    async def _send(self, **message: Any) -> None:
        # A stream takes one message at a time.
        async with self._writing:
            await self.raw.send(**message)

    async def _run(self, grant: pb.Grant) -> None:
        await self._tell(grant, accepted=pb.Accepted())
        await self._tell(grant, running=pb.Running())
        job, lease = grant.job_id, grant.lease_id
        chunk = pb.LogChunk(job_id=job, lease_id=lease, offset=0, stream=job_pb2.LOG_STREAM_STDOUT, data=LINE)
        await self._send(log_chunks=pb.LogChunks(chunks=[chunk]))
        half = job_pb2.Progress(fraction=0.5, metrics={"loss": 0.5})
        update = pb.ProgressUpdate(job_id=job, lease_id=lease, progress=half)
        await self._send(progress=pb.ProgressUpdates(updates=[update]))
        await self._tell(grant, checkpoint_saved=pb.CheckpointSaved(cursor="half"))
        outcome = job_pb2.OUTCOME_SUCCEEDED
        if grant.lease_id in self._asked_back:
            outcome = job_pb2.OUTCOME_CANCELLED
        elif grant.spec.name == "fails once" and grant.attempt == 1:
            outcome = job_pb2.OUTCOME_FAILED
        error = job_pb2.JobError(retryable=True) if outcome == job_pb2.OUTCOME_FAILED else None
        await self._tell(grant, ended=ended(outcome, final_log_offset=len(LINE), error=error))
        self._held.discard(grant.lease_id)


class SteadyLoad:
    """Users and agents of one server."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.agents = [BusyAgent(client, f"busy-agent-{n}", inventory=_inventory(n)) for n in range(2)]
        self.submitted: list[str] = []
        self.terminal: Counter[str] = Counter()
        """How often each job's end was watched."""
        self.calls: Counter[str] = Counter()
        """Calls that were answered, by name."""
        self._news = asyncio.Event()
        self._watching = asyncio.Event()
        self._agents_leave = asyncio.Event()
        self._users_leave = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Runs everything beside the body; then lets users and agents finish what is open.

        Raises:
            BaseExceptionGroup: Something failed: a call, a stream, an ack that did not come.
        """
        async with asyncio.TaskGroup() as everyone:
            watching = everyone.create_task(self._watch())
            await self._until(self._watching.is_set)
            for agent in self.agents:
                everyone.create_task(agent.serve(self._agents_leave))
            async with asyncio.TaskGroup() as users:
                for number in range(SUBMITTERS):
                    users.create_task(self._submit(number))
                for look in (self._look_at_jobs, self._look_at_the_fleet, self._change_queues):
                    users.create_task(self._again(look))
                try:
                    yield
                finally:
                    self._users_leave.set()
            await self._until(lambda: all(self.terminal[job] for job in self.submitted))
            self._agents_leave.set()
            watching.cancel()

    async def progressed(self, ends: int = 20) -> None:
        """Waits until so many more jobs have ended, and each kind of call was answered once more."""
        goal = self.terminal.total() + ends
        calls = Counter(self.calls)
        await self._until(lambda: self.terminal.total() >= goal and all(self.calls[n] > calls[n] for n in calls))

    async def ended(self, job: str) -> None:
        """Waits until a job has ended."""
        await self._until(lambda: self.terminal[job])

    async def lose_a_job(self) -> str:
        """Has an agent take a job and vanish, before there are others; returns the job, which will be run again."""
        # It has room for this job alone: nobody offers it more while it seems to live.
        silent = RawAgent(self.client, "silent-agent", inventory=pb.Inventory(cpu_millis=100, memory_bytes=1 << 40))
        await silent.connect()
        spec = _spec(ttl_s=10)
        answer = await self._answer("SubmitJob", self.client.jobs.SubmitJob(jobs.SubmitJobRequest(spec=spec)))
        await silent.run(await silent.grant())
        await silent.leave()
        self.submitted.append(answer.job_id)
        return str(answer.job_id)

    async def _until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(2 * ANSWER_S):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def _answer(self, name: str, call: Awaitable[Any]) -> Any:
        async with asyncio.timeout(ANSWER_S):
            answer = await call
        self.calls[name] += 1
        self._news.set()
        return answer

    async def _watch(self) -> None:
        watched = self.client.jobs.WatchJobs(jobs.WatchJobsRequest(queue="default"))
        # Cancelled from here when all is done; whatever else ends it fails the test.
        # The first response says that it begins.
        async for response in watched:
            self._watching.set()
            for change in response.changes:
                if change.state in TERMINAL:
                    self.terminal[change.job_id] += 1
            self._news.set()
        raise AssertionError("the watch ended")

    async def _again(self, look: Callable[[int], Awaitable[None]]) -> None:
        for turn in itertools.count():
            if self._users_leave.is_set():
                return
            await look(turn)

    async def _submit(self, number: int) -> None:
        """Submits one kind of job after the other; waits when too many are open."""
        mine: list[str] = []

        def few_are_open() -> bool:
            return sum(not self.terminal[job] for job in mine) < MAX_OPEN

        for turn in itertools.count():
            if self._users_leave.is_set():
                return
            made = await self._submit_some(number, turn, mine[0] if mine else "")
            mine += made
            self.submitted += made
            if turn % 5 == 4:
                request = jobs.CancelJobsRequest(job_ids=made)
                await self._answer("CancelJobs", self.client.jobs.CancelJobs(request))
            await self._until(few_are_open)

    async def _submit_some(self, number: int, turn: int, ended: str) -> list[str]:
        stub = self.client.jobs
        if turn % 6 == 0:
            specs = [_spec("of three"), _spec("fails once"), _spec("with a GPU", gpus=1)]
            several = await self._answer("SubmitJobs", stub.SubmitJobs(jobs.SubmitJobsRequest(specs=specs)))
            return list(several.job_ids)
        if turn % 6 == 3:
            await self._until(lambda: self.terminal[ended])
            retried = await self._answer("RetryJob", stub.RetryJob(jobs.RetryJobRequest(job_id=ended)))
            return [retried.job_id]
        name = ("fails once", "with a key", "plain", "with a GPU", "plain")[turn % 5]
        spec = _spec(name, gpus=int("GPU" in name), dedupe_key=f"{number}-{turn}" if "key" in name else "")
        request = jobs.SubmitJobRequest(spec=spec, request_id=f"{number}-{turn}")
        first, again = await asyncio.gather(*(self._answer("SubmitJob", stub.SubmitJob(request)) for _ in "12"))
        assert first.job_id == again.job_id, "one request_id, two jobs"
        return [first.job_id]

    async def _look_at_jobs(self, turn: int) -> None:
        stub = self.client.jobs
        states = [job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_QUEUED]
        page = await self._answer("ListJobs", stub.ListJobs(jobs.ListJobsRequest(page_size=50)))
        request = jobs.ListJobsRequest(page_size=20, states=[states[turn % 3]])
        await self._answer("ListJobs by state", stub.ListJobs(request))
        job = page.jobs[turn % len(page.jobs)].id
        await self._answer("GetJob", stub.GetJob(jobs.GetJobRequest(job_id=job)))
        await self._answer("ListAttempts", stub.ListAttempts(jobs.ListAttemptsRequest(job_id=job)))
        await self._answer("ExplainJob", stub.ExplainJob(jobs.ExplainJobRequest(job_id=job)))
        await self._answer("StreamLogs", _read_all(stub.StreamLogs(jobs.StreamLogsRequest(job_id=job))))

    async def _look_at_the_fleet(self, turn: int) -> None:
        stub = self.client.fleet
        await self._answer("ListAgents", stub.ListAgents(fleet.ListAgentsRequest()))
        await self._answer("ListGpus", stub.ListGpus(fleet.ListGpusRequest()))
        await self._answer("ListLeases", stub.ListLeases(fleet.ListLeasesRequest()))
        await self._answer("ListQueues", stub.ListQueues(fleet.ListQueuesRequest()))
        await self._answer("GetAgent", stub.GetAgent(fleet.GetAgentRequest(agent="silent-agent")))

    async def _change_queues(self, turn: int) -> None:
        stub = self.client.fleet
        made = fleet.CreateQueueRequest(queue=fleet.Queue(name=f"queue-{turn}"))
        await self._answer("CreateQueue", stub.CreateQueue(made))
        change = fleet.UpdateQueueRequest(name="default", max_running=100 + turn % 7)
        await self._answer("UpdateQueue", stub.UpdateQueue(change))
        await self._answer("DrainAgent", stub.DrainAgent(fleet.DrainAgentRequest(agent="silent-agent")))
        await self._answer("UndrainAgent", stub.UndrainAgent(fleet.UndrainAgentRequest(agent="silent-agent")))
        # As slow as people are, or the list of queues grows by hundreds a second.
        await self._until_more(5)

    async def _until_more(self, ends: int) -> None:
        goal = self.terminal.total() + ends
        await self._until(lambda: self.terminal.total() >= goal or self._users_leave.is_set())


async def _read_all(stream: Any) -> list[jobs.StreamLogsResponse]:
    return [chunk async for chunk in stream]


def _spec(name: str = "plain", *, gpus: int = 0, ttl_s: int = 60, dedupe_key: str = "") -> job_pb2.JobSpec:
    spec = job_pb2.JobSpec(
        name=name,
        command=job_pb2.Command(argv=["/bin/true"]),
        resources=job_pb2.Resources(cpu_millis=100, gpu_count=gpus),
        retry=job_pb2.RetryPolicy(max_failures=3),
        dedupe_key=dedupe_key,
    )
    spec.lease.ttl.FromSeconds(ttl_s)
    spec.retry.backoff_initial.FromMilliseconds(100)
    return spec


def _inventory(number: int) -> pb.Inventory:
    gpus = [pb.Gpu(uuid=f"GPU-{number}-{n}", index=n, model="Fake", memory_bytes=1 << 34) for n in range(2)]
    return pb.Inventory(cpu_millis=100_000, memory_bytes=1 << 40, gpus=gpus)
