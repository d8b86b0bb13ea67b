"""The whole agent, as a process, with real jobs."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from lessor.lifecycle import Outcome
from lessor.v1 import agent_service_pb2 as pb
from tests.support.agent_core import a_grant
from tests.support.fake_server import Connection, FakeAgentServer

pytestmark = pytest.mark.integration

TOLD = (["accepted", "running", "ended"], ["accepted", "ended"], ["ended"])
"""What the server hears of a job that ends at once: an end supersedes what was not sent before it."""


@asynccontextmanager
async def agent_process(
    server: FakeAgentServer, state_dir: Path, *flags: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Runs ``lessor agent``; kills the agent alone at the end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lessor_agent", "--address", server.address, "--state-dir", str(state_dir)),
        *("--heartbeat", "200ms", "--fake-gpus", "2", "--cpu", "4", "--memory", "1GiB", *flags),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if not name.startswith("LESSOR_")},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def shell(lease_id: int, script: str) -> pb.Grant:
    return a_grant(lease_id, argv=("/bin/sh", "-c", script), grace=timedelta(seconds=1))


async def finish(server: Connection, lease_id: int) -> pb.Ended:
    """Returns the end of a lease once the agent has forgotten it."""
    ended = (await server.event(lease_id, "ended")).ended
    await server.until(lambda: bool(server.heartbeats()) and lease_id not in server.heartbeats()[-1].lease_ids)
    return ended


async def test_a_real_job_from_grant_to_result(tmp_path: Path) -> None:
    script = (
        'echo "token $LESSOR_FENCING_TOKEN"; echo oops >&2; '
        """echo '{"type": "result", "value": 42}' >> "$LESSOR_EVENTS"; exit 0"""
    )
    async with FakeAgentServer() as fake, agent_process(fake, tmp_path) as process:
        server = await fake.connection()
        hello = await server.welcome()
        server.grant(shell(1, script))
        ended = await finish(server, 1)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 10) == 0
        assert server.received[-1].HasField("goodbye")
    assert [gpu.index for gpu in hello.inventory.gpus] == [0, 1]
    assert (hello.inventory.cpu_millis, hello.inventory.memory_bytes) == (4000, 1 << 30)
    assert Outcome(ended.outcome) is Outcome.SUCCEEDED
    assert ended.result_json == b"42"
    assert (server.log(1, 1), server.log(1, 2)) == (b"token 1\n", b"oops\n")
    assert server.events(1) in TOLD


async def test_failures_of_real_jobs(tmp_path: Path) -> None:
    async with FakeAgentServer() as fake, agent_process(fake, tmp_path):
        server = await fake.welcomed()
        server.grant(shell(1, "exit 3"), shell(2, "kill -9 $$"), a_grant(3, argv=("/no/such/program",)))
        exited, killed, missing = [await finish(server, lease_id) for lease_id in (1, 2, 3)]
    assert (exited.error.type, exited.exit_code) == ("EXIT_CODE", 3)
    assert (killed.error.type, killed.signal) == ("SIGNAL", 9)
    assert (missing.error.type, missing.error.retryable) == ("START_FAILED", False)
    assert server.events(1) in TOLD
    assert server.events(3) in TOLD[1:]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may start a job as another user")
async def test_another_user_works_out_of_the_box_and_the_agents_files_are_its_own() -> None:
    with tempfile.TemporaryDirectory(prefix="lessor-test-") as name:
        os.chmod(name, 0o711)
        state = Path(name) / "state"
        async with FakeAgentServer() as fake, agent_process(fake, state):
            server = await fake.welcomed()
            grant = shell(1, f"id -un; echo {{}} >> $LESSOR_EVENTS; umask; cat {state}/journal.db {state}/agent_id; :")
            grant.spec.command.user = "nobody"
            server.grant(grant)
            ended = await finish(server, 1)
        assert Outcome(ended.outcome) is Outcome.SUCCEEDED, ended
        assert server.log(1, 1) == b"nobody\n0022\n"
        assert {path.name: path.stat().st_mode & 0o077 for path in state.iterdir() if path.is_file()} == {
            path.name: 0 for path in state.iterdir() if path.is_file()
        }


async def test_a_job_has_the_limit_of_open_files_that_the_agent_was_started_with(tmp_path: Path) -> None:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    async with FakeAgentServer() as fake, agent_process(fake, tmp_path):
        server = await fake.welcomed()
        server.grant(shell(1, "ulimit -Sn"))
        await finish(server, 1)
    assert server.log(1, 1).decode().strip() == ("unlimited" if soft == resource.RLIM_INFINITY else str(soft))


async def test_a_job_goes_on_while_its_agent_is_killed_and_restarted(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    script = f"echo one; while [ ! -e {gate} ]; do sleep 0.02; done; echo two"
    async with FakeAgentServer() as fake:
        async with agent_process(fake, tmp_path / "state") as process:
            server = await fake.welcomed()
            server.grant(shell(1, script))
            await server.until(lambda: server.log(1, 1) == b"one\n")
            await server.event(1, "running")
            process.kill()
            await process.wait()
        async with agent_process(fake, tmp_path / "state"):
            again = await fake.connection()
            while again.ended:
                again = await fake.connection()
            again.restore_logs(server)
            hello = await again.welcome()
            gate.touch()
            ended = await finish(again, 1)
    assert [(lease.lease_id, lease.phase) for lease in hello.leases] == [(1, 3)]
    assert Outcome(ended.outcome) is Outcome.SUCCEEDED
    assert again.log(1, 1) == b"one\ntwo\n"


async def test_a_cancel_of_a_real_job(tmp_path: Path) -> None:
    async with FakeAgentServer() as fake, agent_process(fake, tmp_path):
        server = await fake.welcomed()
        server.grant(shell(1, "echo up; exec sleep 60"))
        await server.until(lambda: server.log(1, 1) == b"up\n")
        server.revoke(1, pb.REVOKE_REASON_CANCELLED)
        ended = await finish(server, 1)
    assert Outcome(ended.outcome) is Outcome.CANCELLED


async def test_a_second_agent_on_the_same_state_is_refused(tmp_path: Path) -> None:
    async with FakeAgentServer() as fake, agent_process(fake, tmp_path) as first:
        await fake.welcomed()
        async with agent_process(fake, tmp_path) as second:
            _, error = await asyncio.wait_for(second.communicate(), 20)
            assert second.returncode == 1
            assert f"pid {first.pid}" in error.decode()


async def test_an_unsupported_protocol_ends_the_agent_with_a_clear_line(tmp_path: Path) -> None:
    async with FakeAgentServer() as fake:
        fake.refusal = "PROTOCOL_UNSUPPORTED"
        async with agent_process(fake, tmp_path) as process:
            _, error = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 1
    assert "the server refuses this agent" in error.decode()
