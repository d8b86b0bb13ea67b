"""FleetService: from requests to the fleet and back. Nothing is decided here."""

from __future__ import annotations

from lessor.v1 import fleet_service_pb2 as pb
from lessor.v1 import fleet_service_pb2_grpc
from lessor_server.rpc.handlers import Context
from lessor_server.services.fleet import Fleet


class FleetServicer(fleet_service_pb2_grpc.FleetServiceServicer):
    """Serves FleetService."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def ListAgents(self, request: pb.ListAgentsRequest, context: Context) -> pb.ListAgentsResponse:
        """Returns all agents."""
        return pb.ListAgentsResponse(agents=await self._fleet.agents())

    async def GetAgent(self, request: pb.GetAgentRequest, context: Context) -> pb.GetAgentResponse:
        """Returns one agent."""
        return pb.GetAgentResponse(agent=await self._fleet.agent(request.agent))

    async def ListGpus(self, request: pb.ListGpusRequest, context: Context) -> pb.ListGpusResponse:
        """Returns GPUs and who holds them."""
        return pb.ListGpusResponse(gpus=await self._fleet.gpus(request.agent))

    async def ListLeases(self, request: pb.ListLeasesRequest, context: Context) -> pb.ListLeasesResponse:
        """Returns one page of live leases."""
        return await self._fleet.leases(request)

    async def DrainAgent(self, request: pb.DrainAgentRequest, context: Context) -> pb.DrainAgentResponse:
        """Stops placing jobs on an agent."""
        return pb.DrainAgentResponse(agent=await self._fleet.drain(request.agent, True))

    async def UndrainAgent(self, request: pb.UndrainAgentRequest, context: Context) -> pb.UndrainAgentResponse:
        """Takes a drain back."""
        return pb.UndrainAgentResponse(agent=await self._fleet.drain(request.agent, False))

    async def CreateQueue(self, request: pb.CreateQueueRequest, context: Context) -> pb.CreateQueueResponse:
        """Makes a queue."""
        return pb.CreateQueueResponse(queue=await self._fleet.create_queue(request.queue))

    async def UpdateQueue(self, request: pb.UpdateQueueRequest, context: Context) -> pb.UpdateQueueResponse:
        """Changes a queue."""
        return pb.UpdateQueueResponse(queue=await self._fleet.update_queue(request))

    async def GetQueue(self, request: pb.GetQueueRequest, context: Context) -> pb.GetQueueResponse:
        """Returns one queue."""
        return pb.GetQueueResponse(queue=await self._fleet.queue(request.name))

    async def ListQueues(self, request: pb.ListQueuesRequest, context: Context) -> pb.ListQueuesResponse:
        """Returns all queues."""
        return pb.ListQueuesResponse(queues=await self._fleet.queues())
