"""Waiting until nothing is live on an agent that gets no more jobs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta

from lessor.errors import FailedPrecondition, WaitTimeout
from lessor.sdk.connection import Connection
from lessor.sdk.fleet import Agent, Lease
from lessor.sdk.following import some_of
from lessor.units import format_duration

_LOOK_EVERY_S = 1.0


async def wait_until_idle(
    connection: Connection,
    agent: Agent,
    get: Callable[[str], Awaitable[Agent]],
    leases: Callable[[str], AsyncIterator[Lease]],
    *,
    give_up_after: timedelta | None,
) -> Agent:
    """Returns ``agent`` as it is when no lease is live there.

    What that says of the host depends on its ``state``: of an agent that is
    DISCONNECTED the leases have run out, but nobody can say what became of the
    processes. They may stand frozen there, or run on.

    Args:
        connection: Whose clock and sleep are gone by.
        agent: A drained agent as it was just now.
        get: Reads an agent by its id.
        leases: Reads the live leases of an agent, by its id.
        give_up_after: None: never.

    Raises:
        FailedPrecondition: Somebody put it back (undrained it) meanwhile: jobs may come again.
        WaitTimeout: ``give_up_after`` passed; names the jobs that still run there.
    """
    began = connection.clock()
    while agent.lease_count:
        wait_s = _LOOK_EVERY_S
        if give_up_after is not None:
            wait_s = min(wait_s, began + give_up_after.total_seconds() - connection.clock())
            if wait_s <= 0:
                pending = list(dict.fromkeys([lease.job_id async for lease in leases(agent.id)]))
                if not pending:
                    return _still_drained(await get(agent.id))
                raise WaitTimeout(
                    f"jobs had not ended on {agent.name} within {format_duration(give_up_after)}, "
                    f"{len(pending)} in all: {some_of(pending)}; it stays drained",
                    pending=pending,
                    ended=(),
                )
        await connection.sleep(wait_s)
        agent = _still_drained(await get(agent.id))
    return agent


def _still_drained(agent: Agent) -> Agent:
    if not agent.drained:
        raise FailedPrecondition(f"{agent.name} was put back (undrained) meanwhile", remedy="drain it again")
    return agent
