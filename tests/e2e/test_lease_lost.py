"""What becomes of a running job whose lease is lost: installed programs, real processes, a network that is cut."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

import lessor
from lessor import JobState, timing
from lessor_agent.boottime import boottime_ns
from lessor_agent.keeper.directory import peer
from lessor_agent.runtimes.process_execution import connect_keeper
from tests.support.cluster import TICKER, Agent, Cluster, assert_no_overlap, lives, submit_ticker, until
from tests.support.proxy import Proxy

NOWHERE = "127.0.0.1:9"
TERM_NS = round((timing.MIN_TTL - timing.margin(timing.MIN_TTL)).total_seconds() * 1e9)
"""How long a job may run after the last heartbeat that was acked."""


def ticking(ticks: Path, attempts: int = 1) -> bool:
    """Returns whether the newest of so many attempts has ticked."""
    return ticks.is_dir() and len(list(ticks.iterdir())) >= attempts and len(list(lives(ticks).values())[-1]) > 1


def first(ticks: Path) -> list[int]:
    """Returns when the first attempt ran, CLOCK_BOOTTIME nanoseconds."""
    return [at_ns for _, at_ns in next(iter(lives(ticks).values()))]


def newest(ticks: Path) -> int:
    """Returns when the newest attempt ran last."""
    return list(lives(ticks).values())[-1][-1][1]


def holds_nothing(agent: Agent) -> bool:
    """Returns whether the agent has forgotten all its leases."""
    return not any((agent.state_dir / "leases").iterdir())


def lease_directory(agent: Agent) -> Path:
    """Returns the directory of the one lease that the agent holds."""
    (directory,) = (agent.state_dir / "leases").iterdir()
    return directory


def connect(agent: Agent) -> socket.socket:
    """Connects to the keeper of the one lease that the agent holds."""
    directory = lease_directory(agent)
    connection = connect_keeper(directory, int(directory.name))
    assert connection is not None
    connection.settimeout(60)
    return connection


def keeper_word(agent: Agent) -> dict[str, object]:
    """Returns what that keeper says of its lease."""
    with connect(agent) as connection, connection.makefile("rb") as lines:
        word: dict[str, object] = json.loads(lines.readline())
    return word


def agent_behind(cluster: Cluster, proxy: Proxy, name: str, *flags: str) -> Agent:
    agent = Agent(cluster, name, flags, {})
    agent.address = proxy.address
    cluster.agents.append(agent)
    agent.start()
    return agent


async def cut_off(proxy: Proxy) -> None:
    """Takes the network away, until it is led to the server again."""
    proxy.retarget(NOWHERE)
    await proxy.cut()


FROZEN = "the job is frozen until the server answers"


def says(agent: Agent, text: str) -> bool:
    """Returns whether the agent's log has ``text``."""
    return text in agent.state_dir.with_name(f"{agent.name}.log").read_text()


async def test_a_frozen_job_goes_on_after_an_outage_of_the_server(
    cluster: Cluster, client: lessor.AsyncClient, tmp_path: Path
) -> None:
    agent, ticks = cluster.agent("one"), tmp_path / "ticks"
    job = await submit_ticker(client, ticks, 22)
    await until(lambda: ticking(ticks))
    assert (await client.get(job)).spec.on_lease_lost == "freeze"
    await cluster.kill_server()
    killed_ns = first(ticks)[-1]
    await until(lambda: says(agent, FROZEN))
    still_ns = first(ticks)[-1]
    assert still_ns - killed_ns < TERM_NS
    await cluster.start_server(cluster.address)
    await until(lambda: first(ticks)[-1] > still_ns)
    (ended,) = await client.wait([job], timeout=60)
    assert (ended.state, ended.attempt, ended.losses) == (JobState.SUCCEEDED, 1, 0)
    assert len(lives(ticks)) == 1
    assert b"".join([chunk.data async for chunk in client.logs(job)]) == b"ticking\n"


async def test_a_frozen_job_whose_agent_is_killed_is_adopted_and_goes_on(
    cluster: Cluster, client: lessor.AsyncClient, tmp_path: Path
) -> None:
    agent, ticks = cluster.agent("one"), tmp_path / "ticks"
    job = await submit_ticker(client, ticks, 15)
    await until(lambda: ticking(ticks))
    await cluster.kill_server()
    agent.kill()
    killed_ns = first(ticks)[-1]
    # Nothing but its keeper sees that it stands still.
    await until(lambda: keeper_word(agent)["frozen"] is True)
    still_ns = first(ticks)[-1]
    assert still_ns - killed_ns < TERM_NS
    agent.start()
    await cluster.start_server(cluster.address)
    (ended,) = await client.wait([job], timeout=60)
    assert (ended.state, ended.attempt, ended.losses) == (JobState.SUCCEEDED, 1, 0)
    assert first(ticks)[-1] > still_ns
    assert len(lives(ticks)) == 1


@pytest.mark.parametrize("stalled", [False, True], ids=["cut-off", "stopped"])
async def test_a_frozen_job_whose_lease_has_expired_never_runs_again(
    cluster: Cluster, client: lessor.AsyncClient, tmp_path: Path, stalled: bool
) -> None:
    async with Proxy(cluster.address) as proxy:
        agent, ticks = agent_behind(cluster, proxy, "one"), tmp_path / "ticks"
        job = await submit_ticker(client, ticks, 3600)
        await until(lambda: ticking(ticks))
        assert agent.process is not None
        if stalled:
            agent.process.send_signal(signal.SIGSTOP)
        else:
            await cut_off(proxy)
        cluster.agent("two")
        await until(lambda: ticking(ticks, attempts=2))
        last_ns = first(ticks)[-1]
        if stalled:
            agent.process.send_signal(signal.SIGCONT)
        else:
            proxy.retarget(cluster.address)
        await until(lambda: holds_nothing(agent))
        gone_ns = newest(ticks)
        await until(lambda: newest(ticks) > gone_ns)
        await client.cancel(job)
        (ended,) = await client.wait([job], timeout=60)
        assert (ended.state, ended.attempt, ended.losses) == (JobState.CANCELLED, 2, 1)
        assert first(ticks)[-1] == last_ns
        assert_no_overlap(ticks)
        lost, _ = await client.attempts(job)
        assert lost.outcome is lessor.Outcome.LOST
        assert lost.error is not None
        assert lost.error.type == "LEASE_EXPIRED"


# Notes its own process and, of each attempt before it, whether that one's process is still there; then runs the rest.
_NOTING = """
for pid in $(cat "$1"/pid-* 2>/dev/null); do
    if kill -0 "$pid" 2>/dev/null; then echo "$pid" >> "$1/met"; fi
done
echo $$ > "$1/pid-$LESSOR_FENCING_TOKEN"
shift
exec "$@"
"""


async def test_gpus_of_a_frozen_job_are_used_again_only_when_it_is_gone(
    cluster: Cluster, client: lessor.AsyncClient, tmp_path: Path
) -> None:
    async with Proxy(cluster.address) as proxy:
        agent = agent_behind(cluster, proxy, "one", "--fake-gpus", "1")
        ticks, notes = tmp_path / "ticks", tmp_path / "notes"
        ticks.mkdir()
        notes.mkdir()
        ticker = [sys.executable, str(TICKER), str(ticks), "3600"]
        argv = ["/bin/sh", "-c", _NOTING, "sh", str(notes), *ticker]
        job = (await client.submit(argv, ttl="10s", gpus=1)).id
        await until(lambda: ticking(ticks))
        with connect(agent) as connection:
            keeper, _ = peer(connection)
        await cut_off(proxy)
        await until(lambda: says(agent, FROZEN))
        await in_state(client, job, JobState.QUEUED)
        # What is to be killed first takes a while: with its keeper it stands still until a new grant has come.
        os.kill(keeper, signal.SIGSTOP)
        try:
            proxy.retarget(cluster.address)
            await in_state(client, job, JobState.LEASED, JobState.RUNNING)
            granted_ns = boottime_ns()
            # Long enough for an agent that would not wait to start it.
            await until(lambda: boottime_ns() > granted_ns + 2_000_000_000 or len(list(notes.glob("pid-*"))) > 1)
        finally:
            os.kill(keeper, signal.SIGCONT)
        await until(lambda: ticking(ticks, attempts=2))
        assert not (notes / "met").exists()
        await client.cancel(job)
        (ended,) = await client.wait([job], timeout=60)
        assert (ended.state, ended.attempt, ended.losses) == (JobState.CANCELLED, 2, 1)
        assert_no_overlap(ticks)


async def in_state(client: lessor.AsyncClient, job: str, *states: JobState) -> None:
    """Returns once a job is in one of ``states``."""
    async with asyncio.timeout(60):
        while (await client.get(job)).state not in states:  # noqa: ASYNC110 - rings no event
            await asyncio.sleep(0.05)


async def test_a_job_that_is_to_stop_hears_of_it_and_is_gone(
    cluster: Cluster, client: lessor.AsyncClient, tmp_path: Path
) -> None:
    async with Proxy(cluster.address) as proxy:
        agent, ticks = agent_behind(cluster, proxy, "one"), tmp_path / "ticks"
        job = await submit_ticker(client, ticks, 3600, on_lease_lost="stop", grace="1s")
        await until(lambda: ticking(ticks))
        cut_ns = first(ticks)[-1]
        await cut_off(proxy)
        cluster.agent("two")
        await until(lambda: ticking(ticks, attempts=2))
        assert first(ticks)[-1] - cut_ns < TERM_NS - 1_000_000_000
        assert_no_overlap(ticks)
        assert not says(agent, FROZEN)
        await client.cancel(job)
        (ended,) = await client.wait([job], timeout=60)
        assert (ended.state, ended.attempt, ended.losses) == (JobState.CANCELLED, 2, 1)


async def test_a_job_that_is_to_continue_does_until_the_server_says_otherwise(
    cluster: Cluster, client: lessor.AsyncClient, tmp_path: Path
) -> None:
    async with Proxy(cluster.address) as proxy:
        agent, ticks = agent_behind(cluster, proxy, "one"), tmp_path / "ticks"
        job = await submit_ticker(client, ticks, 3600, on_lease_lost="continue")
        await until(lambda: ticking(ticks))
        await cut_off(proxy)
        cluster.agent("two")
        await until(lambda: ticking(ticks, attempts=2))
        second_ns = list(lives(ticks).values())[1][0][1]
        await until(lambda: first(ticks)[-1] > second_ns)
        proxy.retarget(cluster.address)
        await until(lambda: holds_nothing(agent))
        last_ns = first(ticks)[-1]
        await until(lambda: newest(ticks) > last_ns + 500_000_000)
        assert first(ticks)[-1] == last_ns
        await client.cancel(job)
        (ended,) = await client.wait([job], timeout=60)
        assert (ended.state, ended.attempt) == (JobState.CANCELLED, 2)
