"""A server in the test's own loop, and an agent that does only what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import grpc

from lessor import timing
from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import agent_service_pb2_grpc, fleet_service_pb2_grpc, job_pb2, job_service_pb2, job_service_pb2_grpc
from lessor_server.config import ServerSettings
from lessor_server.server import Server

WAIT_S = 60.0
EOF = cast("Any", grpc.aio).EOF
"""What a stream reads at its end; the type stubs do not know it."""


class Client:
    """Stubs of all services of one server."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.jobs = job_service_pb2_grpc.JobServiceStub(channel)
        self.fleet = fleet_service_pb2_grpc.FleetServiceStub(channel)
        # The type stubs know no stream-stream call that is written to later.
        self.agents: Any = agent_service_pb2_grpc.AgentServiceStub(channel)

    async def submit(self, **overrides: Any) -> str:
        """Submits ``/bin/true``; keyword arguments set fields of the spec. Returns the job's id."""
        spec = job_pb2.JobSpec(command=job_pb2.Command(argv=["/bin/true"]), **overrides)
        answer = await self.jobs.SubmitJob(job_service_pb2.SubmitJobRequest(spec=spec))
        return str(answer.job_id)

    async def job(self, job_id: str) -> job_pb2.Job:
        """Returns the job."""
        answer = await self.jobs.GetJob(job_service_pb2.GetJobRequest(job_id=job_id))
        return answer.job

    async def until(self, job_id: str, *states: job_pb2.JobState.ValueType) -> job_pb2.Job:
        """Waits until the job is in one of the states, and returns it."""
        async with asyncio.timeout(WAIT_S):
            watch = self.jobs.WatchJobs(job_service_pb2.WatchJobsRequest(job_ids=[job_id]))
            async for response in watch:
                if any(change.state in states for change in response.changes):
                    watch.cancel()
                    break
        return await self.job(job_id)


class RawAgent:
    """An agent stream in the test's hands. It heartbeats and accepts only when told."""

    def __init__(self, client: Client, agent_id: str = "raw-agent-1", **hello: Any) -> None:
        self._client = client
        self.agent_id = agent_id
        self.session_id = 0
        self.epoch = 0
        self._hello = hello
        self._seq = 0
        self._event_seq = 0
        self._messages: list[pb.ConnectResponse] = []
        self.call: Any = None

    async def connect(self, leases: Sequence[pb.HeldLease] = (), **hello: Any) -> pb.Welcome:
        """Opens a stream, says hello, and returns the welcome."""
        self.call = self._client.agents.Connect()
        return await self.say_hello(leases, **hello)

    async def say_hello(self, leases: Sequence[pb.HeldLease] = (), **hello: Any) -> pb.Welcome:
        """Says hello on the stream there is, and returns the welcome."""
        message = pb.Hello(
            protocol_version=timing.PROTOCOL_VERSION,
            version="test",
            agent_id=self.agent_id,
            agent_name=self.agent_id,
            session_id=self.session_id,
            host=pb.HostIdentity(boot_id="boot-1", hardware_id=f"dmi-uuid:{self.agent_id}", hostname="host"),
            inventory=pb.Inventory(cpu_millis=1_000_000, memory_bytes=1 << 40),
            runtimes=[pb.RuntimeInfo(name="process", can_set_user=True)],
            leases=leases,
        )
        message.heartbeat_interval.FromMilliseconds(1000)
        for name, value in {**self._hello, **hello}.items():
            field = getattr(message, name)
            if hasattr(field, "CopyFrom"):
                field.CopyFrom(value)
            else:
                setattr(message, name, value)
        await self.send(hello=message)
        welcome = (await self.next("welcome")).welcome
        self.session_id, self.epoch = welcome.session_id, welcome.epoch
        return welcome

    async def send(self, **message: Any) -> None:
        """Sends one message."""
        await self.call.write(pb.ConnectRequest(**message))

    async def next(self, kind: str) -> pb.ConnectResponse:
        """Returns the next message of this kind; others are kept for later."""
        for index, message in enumerate(self._messages):
            if message.WhichOneof("message") == kind:
                return self._messages.pop(index)
        async with asyncio.timeout(WAIT_S):
            while True:
                message = await self.call.read()
                if message is EOF:
                    raise ConnectionError(f"the stream ended: {await self.call.code()} {await self.call.details()}")
                if message.WhichOneof("message") == kind:
                    return message
                self._messages.append(message)

    def waiting(self, kind: str) -> bool:
        """Returns whether a message of this kind has come in while another was waited for."""
        return any(message.WhichOneof("message") == kind for message in self._messages)

    async def grant(self) -> pb.Grant:
        """Returns the next single grant."""
        grants = (await self.next("grants")).grants
        assert grants.epoch == self.epoch
        (grant,) = grants.grants
        return grant

    async def revoke(self) -> pb.Revoke:
        """Returns the next single revoke."""
        (revoke,) = (await self.next("revokes")).revokes.revokes
        return revoke

    async def heartbeat(self, *lease_ids: int) -> int:
        """Sends a heartbeat; returns its number."""
        self._seq += 1
        await self.send(heartbeat=pb.Heartbeat(seq=self._seq, lease_ids=lease_ids))
        return self._seq

    async def event(self, lease: pb.Grant, **event: Any) -> int:
        """Sends a durable event of a lease; returns its number."""
        self._event_seq += 1
        message = pb.LeaseEvent(seq=self._event_seq, job_id=lease.job_id, lease_id=lease.lease_id, **event)
        await self.send(lease_events=pb.LeaseEvents(events=[message]))
        return self._event_seq

    async def tell(self, lease: pb.Grant, **event: Any) -> None:
        """Sends a durable event and waits for its ack."""
        seq = await self.event(lease, **event)
        while seq not in (await self.next("ack")).ack.event_seqs:
            pass

    async def run(self, lease: pb.Grant) -> None:
        """Accepts a lease and says that it runs."""
        await self.tell(lease, accepted=pb.Accepted())
        await self.tell(lease, running=pb.Running())

    async def leave(self) -> None:
        """Drops the stream without a word."""
        self.call.cancel()
        self._messages.clear()


def held(lease: pb.Grant, phase: job_pb2.LeasePhase.ValueType = job_pb2.LEASE_PHASE_RUNNING) -> pb.HeldLease:
    """A lease as a Hello lists it."""
    return pb.HeldLease(job_id=lease.job_id, lease_id=lease.lease_id, phase=phase)


def ended(outcome: job_pb2.Outcome.ValueType = job_pb2.OUTCOME_SUCCEEDED, **fields: Any) -> pb.Ended:
    """An end."""
    return pb.Ended(outcome=outcome, **fields)


@asynccontextmanager
async def running_server(database_url: str) -> AsyncIterator[Server]:
    """A server on a migrated database, in this loop, on a free port."""
    server = Server(ServerSettings(database_url=database_url, listen="127.0.0.1:0"))
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def connected(server: Server) -> AsyncIterator[Client]:
    """Stubs of a server."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield Client(channel)
