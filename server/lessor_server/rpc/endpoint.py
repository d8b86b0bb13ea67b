"""The gRPC server of one replica: its services, options, health and reflection."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any

from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from lessor.v1 import (
    agent_service_pb2,
    agent_service_pb2_grpc,
    fleet_service_pb2,
    fleet_service_pb2_grpc,
    job_service_pb2,
    job_service_pb2_grpc,
)
from lessor_server.bells import Bells
from lessor_server.rpc.errors import MapErrors
from lessor_server.rpc.fleet_service import FleetServicer
from lessor_server.rpc.handlers import Handlers
from lessor_server.rpc.job_service import JobServicer, JobWrites
from lessor_server.rpc.lifetime import CallLifetime
from lessor_server.rpc.validation import CheckRequests
from lessor_server.services.explanation import Explainer
from lessor_server.services.fleet import Fleet
from lessor_server.services.job_reader import JobReader
from lessor_server.services.log_reader import LogReader
from lessor_server.services.watch import Watches
from lessor_server.store.catalog import Catalog
from lessor_server.store.database import Database

MAX_MESSAGE_BYTES = 16 << 20
"""The largest message the server takes."""

WINDOW_BYTES = 4 << 20
"""What a client may send on a stream before the server has read it; as much as an agent may send of a log unacked."""

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A window of its own size, not one found by probing: a probe is a ping for nearly every message that
    # comes alone, which made a heartbeat cost half as much again. The price: a stream over 50 ms gets at
    # most 50 MB/s. (With neither probe nor window it would get 1 MB/s.)
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
    # Agents and watchers ping idle connections; more often than this the server hangs up.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # The server pings as well: a client that vanished must not keep its streams.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
)

SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (job_service_pb2, "JobService"),
        (fleet_service_pb2, "FleetService"),
        (agent_service_pb2, "AgentService"),
    )
)


class Endpoint:
    """Serves the contract on one address. :meth:`start` it once, :meth:`stop` it once."""

    def __init__(
        self,
        database: Database,
        catalog: Catalog,
        bells: Bells,
        jobs: JobWrites,
        agents: agent_service_pb2_grpc.AgentServiceServicer,
        *,
        shared_port: bool = False,
    ) -> None:
        """
        Args:
            database: The store.
            catalog: Queues and shapes of it.
            bells: Those of this replica.
            jobs: The write side of JobService.
            agents: Serves AgentService; it ends its streams itself.
            shared_port: Other processes of this server listen on the port, too. Else two servers on one
                port would each get half of the agents, and the second is to fail.
        """
        self._shared_port = shared_port
        self._lifetime = CallLifetime()
        self._watches = Watches(database, bells)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._health_change: asyncio.Task[None] | None = None
        self._server = aio.server(options=(*_OPTIONS, ("grpc.so_reuseport", int(shared_port))))
        # The servicers are added to this in the server's place. The type stubs ask for the server itself.
        handlers: Any = Handlers(self._server, [MapErrors(), self._lifetime, CheckRequests()])
        job_service_pb2_grpc.add_JobServiceServicer_to_server(
            JobServicer(
                jobs,
                JobReader(database, catalog),
                self._watches,
                LogReader(database, bells),
                Explainer(database, catalog),
                catalog,
            ),
            handlers,
        )
        fleet_service_pb2_grpc.add_FleetServiceServicer_to_server(FleetServicer(Fleet(database, bells)), handlers)
        agent_service_pb2_grpc.add_AgentServiceServicer_to_server(agents, handlers)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, handlers)
        reflecting = reflection.aio.ReflectionServicer(  # type: ignore[attr-defined]
            (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        )
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflecting, handlers)

    async def start(self, host: str, port: int) -> int:
        """Listens on ``host``:``port`` (0: a free port) and serves. Returns the port.

        Raises:
            OSError: The address cannot be used.
        """
        refusal = _why_not(host, port, self._shared_port)
        if refusal is not None and refusal.errno == errno.EADDRINUSE:
            # Asked first: grpc would say so on standard error, in a format of its own.
            raise refusal
        try:
            bound = self._server.add_insecure_port(_address(host, port))
        except RuntimeError as error:
            raise _why_not(host, port, self._shared_port) or OSError(errno.EADDRNOTAVAIL, str(error)) from None
        await self._server.start()
        for service in ("", *SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        return bound

    def stop_serving(self) -> None:
        """Says NOT_SERVING to health checks, so that new callers go elsewhere. Calls are served on."""
        if self._health_change is None:
            self._health_change = asyncio.create_task(self._health.enter_graceful_shutdown())

    async def stop(self, grace_s: float) -> None:
        """Takes no more calls, ends watches and followed logs, and gives the other calls ``grace_s`` seconds."""
        self.stop_serving()
        assert self._health_change is not None
        await self._health_change
        stopped = asyncio.create_task(self._server.stop(grace_s))
        self._lifetime.stop()
        await stopped
        await self._watches.close()


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _why_not(host: str, port: int, shared: bool) -> OSError | None:
    """Returns why nothing can listen there, which grpc keeps to itself; None: now it could."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))
                probe.bind(address)
    except OSError as error:
        return error
    return None
