"""``agents``, ``drain``, ``undrain``."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer

from lessor.cli import streams
from lessor.cli.output import Output, bytes_text, span_text, time_text
from lessor.cli.session import Address, Json, Session
from lessor.errors import InvalidArgument
from lessor.sdk.aio import AsyncClient
from lessor.sdk.enums import AgentState, word
from lessor.sdk.fleet import Agent, Gpu, Lease
from lessor.units import format_cpu, parse_duration

AgentRef = Annotated[str, typer.Argument(metavar="AGENT", help="Its id or name.", show_default=False)]


def agents(
    context: typer.Context,
    gpus: Annotated[bool, typer.Option("--gpus", help="Also their GPUs.")] = False,
    leases: Annotated[bool, typer.Option("--leases", help="Also the live leases.")] = False,
    address: Address = None,
    json: Json = False,
) -> None:
    """List agents, and on request their GPUs and the live leases.

    Example: lessor agents --gpus --leases
    """
    session = Session.of(context, address, json)
    output = session.output

    async def work(client: AsyncClient) -> tuple[list[Agent], list[Gpu], list[Lease]]:
        return (
            await client.agents(),
            await client.gpus() if gpus else [],
            [lease async for lease in client.leases()] if leases else [],
        )

    found, found_gpus, found_leases = session.call(work)
    if output.json:
        document: dict[str, object] = {"agents": found}
        if gpus:
            document["gpus"] = found_gpus
        if leases:
            document["leases"] = found_leases
        output.document(document)
        return
    tables: list[tuple[tuple[str, ...], list[tuple[object, ...]], str]] = [
        (
            ("NAME", "STATE", "CPU", "MEMORY", "GPUS", "LEASES", "RUNTIMES", "LABELS", "CONNECTED", "VERSION", "ID"),
            [_agent_row(agent, output) for agent in found],
            "No agents. `lessor agent` on a host starts one.",
        )
    ]
    if gpus:
        tables.append(
            (
                ("AGENT", "INDEX", "MODEL", "MEMORY", "USED", "BUSY", "JOB", "UUID"),
                [_gpu_row(gpu, output) for gpu in found_gpus],
                "No GPUs.",
            )
        )
    if leases:
        tables.append(
            (
                ("LEASE", "JOB", "ATTEMPT", "PHASE", "AGENT", "GPUS", "GRANTED", "TTL", "LEFT"),
                [_lease_row(lease, output) for lease in found_leases],
                "No live leases.",
            )
        )
    for number, (columns, rows, empty) in enumerate(tables):
        if number:
            print()
        output.table(columns, rows, empty=empty)


def drain(
    context: typer.Context,
    agent: AgentRef,
    wait: Annotated[bool, typer.Option("--wait", help="Return only when no lease is live there.")] = False,
    timeout: Annotated[
        str | None, typer.Option("--timeout", metavar="DURATION", help="With --wait: wait no longer than this: 2h.")
    ] = None,
    address: Address = None,
    json: Json = False,
) -> None:
    """Stop placing jobs on an agent. What runs there goes on.

    Exit code 124 if jobs were still running there at the timeout; it stays
    drained. 1 if somebody put it back while you waited. On the host itself,
    `lessor agent drain` does it without a name.

    Example: lessor drain gpu-host-7 --wait --timeout 2h
    """
    session = Session.of(context, address, json)
    if timeout is not None and not wait:
        raise InvalidArgument(violations={"--timeout": "is for --wait"}, remedy="give --wait too")
    limit = None if timeout is None else parse_duration(timeout, field="--timeout")
    drained = session.call(lambda client: client.drain(agent, wait=wait, timeout=limit))
    _say(session, drained)
    if wait and drained.state is AgentState.DISCONNECTED:
        streams.complain(f"warning: {drained.name} is disconnected: what it ran may still be there")


def undrain(context: typer.Context, agent: AgentRef, address: Address = None, json: Json = False) -> None:
    """Take a drain back: the agent gets jobs again.

    Example: lessor undrain gpu-host-7
    """
    session = Session.of(context, address, json)
    _say(session, session.call(lambda client: client.undrain(agent)))


def _say(session: Session, agent: Agent) -> None:
    state = word(agent.state) if agent.state else None
    if session.output.json:
        session.output.document(agent)
    elif session.output.terminal:
        print(f"{agent.name} is {state}, with {agent.lease_count} live leases")
    else:
        session.output.table((), [(agent.name, state, agent.lease_count)])


def _agent_row(agent: Agent, output: Output) -> tuple[object, ...]:
    labels = ",".join(f"{key}={value}" for key, value in sorted(agent.labels.items()))
    if output.terminal:
        cpu = f"{format_cpu(agent.cpu_millis_used)}/{format_cpu(agent.cpu_millis)}"
        memory = f"{bytes_text(agent.memory_bytes_used)}/{bytes_text(agent.memory_bytes)}"
    else:
        cpu = f"{agent.cpu_millis_used}/{agent.cpu_millis}"
        memory = f"{agent.memory_bytes_used}/{agent.memory_bytes}"
    return (
        agent.name,
        word(agent.state) if agent.state else None,
        cpu,
        memory,
        f"{agent.gpu_count_used}/{agent.gpu_count}",
        agent.lease_count,
        ",".join(agent.runtimes),
        labels,
        time_text(agent.connect_time, terminal=output.terminal),
        agent.version,
        agent.id,
    )


def _gpu_row(gpu: Gpu, output: Output) -> tuple[object, ...]:
    return (
        gpu.agent,
        gpu.index,
        gpu.model,
        bytes_text(gpu.memory_bytes) if output.terminal else gpu.memory_bytes,
        bytes_text(gpu.memory_used_bytes) if output.terminal else gpu.memory_used_bytes,
        f"{gpu.utilization_percent}%" if output.terminal else gpu.utilization_percent,
        gpu.job_id,
        gpu.uuid,
    )


def _lease_row(lease: Lease, output: Output) -> tuple[object, ...]:
    def span(value: timedelta | None) -> object:
        if value is None:
            return None
        return span_text(value) if output.terminal else value.total_seconds()

    return (
        lease.lease_id,
        lease.job_id,
        lease.attempt,
        word(lease.phase) if lease.phase else None,
        lease.agent,
        len(lease.gpu_uuids),
        time_text(lease.grant_time, terminal=output.terminal),
        span(lease.ttl),
        span(lease.time_left),
    )
