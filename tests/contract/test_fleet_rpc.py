"""FleetService, RPC by RPC, as a blocking client in any language sees it."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from lessor.v1 import fleet_service_pb2 as pb
from lessor.v1 import fleet_service_pb2_grpc
from lessor_server.rpc.fleet_service import FleetServicer
from tests.contract.conftest import ServerThread
from tests.support.rows import GPU_SHAPE

TIMEOUT_S = 30
AGENT = "agent-00001"


@pytest.fixture(scope="module")
def grpc_stub_cls(grpc_channel: grpc.Channel) -> type[fleet_service_pb2_grpc.FleetServiceStub]:
    return fleet_service_pb2_grpc.FleetServiceStub


@pytest.fixture(scope="module")
def lease_id(grpc_server: ServerThread) -> int:
    """A lease of one of the two GPUs of the only agent."""
    rows = grpc_server.rows

    async def add() -> int:
        session = await rows.agent(AGENT, name="host-a", gpus=["GPU-0", "GPU-1"])
        return await rows.lease(await rows.job(shape=GPU_SHAPE), session, AGENT, gpus=["GPU-0"])

    return grpc_server.run(add())


def test_every_rpc_of_the_contract_is_served() -> None:
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["FleetService"].methods}
    assert {name for name in methods if name in vars(FleetServicer)} == methods


def test_agents_gpus_and_leases_fit_together(grpc_stub: Any, lease_id: int) -> None:
    (agent,) = grpc_stub.ListAgents(pb.ListAgentsRequest(), timeout=TIMEOUT_S).agents
    assert grpc_stub.GetAgent(pb.GetAgentRequest(agent="host-a"), timeout=TIMEOUT_S).agent == agent
    assert (agent.id, agent.gpu_count, agent.gpu_count_used, agent.lease_count) == (AGENT, 2, 1, 1)
    first, second = grpc_stub.ListGpus(pb.ListGpusRequest(), timeout=TIMEOUT_S).gpus
    (lease,) = grpc_stub.ListLeases(pb.ListLeasesRequest(agent=AGENT), timeout=TIMEOUT_S).leases
    assert (first.lease_id, first.job_id, second.lease_id) == (lease_id, lease.job_id, 0)
    assert (lease.lease_id, lease.agent, list(lease.gpu_uuids), lease.ttl.seconds) == (
        lease_id,
        "host-a",
        ["GPU-0"],
        60,
    )


def test_drain_and_undrain(grpc_stub: Any, lease_id: int) -> None:
    drained = grpc_stub.DrainAgent(pb.DrainAgentRequest(agent="host-a"), timeout=TIMEOUT_S).agent
    assert (drained.state, drained.lease_count) == (pb.AGENT_STATE_DRAINING, 1)
    back = grpc_stub.UndrainAgent(pb.UndrainAgentRequest(agent=AGENT), timeout=TIMEOUT_S).agent
    assert back.state == pb.AGENT_STATE_ACTIVE


def test_queues(grpc_stub: Any) -> None:
    made = grpc_stub.CreateQueue(pb.CreateQueueRequest(queue=pb.Queue(name="gpu", max_gpus=4)), timeout=TIMEOUT_S).queue
    assert (made.name, made.max_gpus, made.HasField("max_running")) == ("gpu", 4, False)
    changed = grpc_stub.UpdateQueue(
        pb.UpdateQueueRequest(name="gpu", paused=True, max_gpus=-1), timeout=TIMEOUT_S
    ).queue
    assert (changed.paused, changed.HasField("max_gpus")) == (True, False)
    assert grpc_stub.GetQueue(pb.GetQueueRequest(name="gpu"), timeout=TIMEOUT_S).queue == changed
    listed = grpc_stub.ListQueues(pb.ListQueuesRequest(), timeout=TIMEOUT_S).queues
    assert [queue.name for queue in listed] == ["default", "gpu"]


def test_what_does_not_exist_is_not_found(grpc_stub: Any) -> None:
    for call, request in (
        (grpc_stub.GetAgent, pb.GetAgentRequest(agent="x")),
        (grpc_stub.ListGpus, pb.ListGpusRequest(agent="x")),
        (grpc_stub.ListLeases, pb.ListLeasesRequest(agent="x")),
        (grpc_stub.DrainAgent, pb.DrainAgentRequest(agent="x")),
        (grpc_stub.UndrainAgent, pb.UndrainAgentRequest(agent="x")),
        (grpc_stub.GetQueue, pb.GetQueueRequest(name="x")),
        (grpc_stub.UpdateQueue, pb.UpdateQueueRequest(name="x")),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            call(request, timeout=TIMEOUT_S)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.RpcError) as refused:
        grpc_stub.CreateQueue(pb.CreateQueueRequest(queue=pb.Queue(name="default")), timeout=TIMEOUT_S)
    assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS
