"""Faults on real processes: what is killed, cut or lost never runs a job twice and never loses one."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from pathlib import Path

import asyncpg

import lessor
from lessor import JobState
from tests.support.cluster import Cluster, assert_no_overlap, lives, submit_ticker, until
from tests.support.proxy import Proxy


def ticking(ticks: Path, attempts: int = 1) -> bool:
    """Returns whether the newest of so many attempts has ticked."""
    return ticks.is_dir() and len(list(ticks.iterdir())) >= attempts and len(list(lives(ticks).values())[-1]) > 1


async def test_the_agent_alone_is_killed(
    cluster: Cluster, client: lessor.AsyncClient, pool: asyncpg.Pool, tmp_path: Path
) -> None:
    agent = cluster.agent("one")
    ticks = tmp_path / "ticks"
    job = await submit_ticker(client, ticks, 3600)
    await until(lambda: ticking(ticks))
    agent.kill()
    cluster.agent("two")
    await until(lambda: ticking(ticks, attempts=2))
    renewed_at = await pool.fetchval("SELECT min(renewed_at) FROM session")
    offered_at = await pool.fetchval("SELECT offered_at FROM lease")
    # In lease time. Not before ttl + margin; how soon after it (within half a second, unless
    # this machine is too busy to tick) the demo prints.
    assert 11_200 <= offered_at - renewed_at <= 14_000
    await client.cancel(job)
    (ended,) = await client.wait([job], timeout=60)
    assert (ended.state, ended.attempt, ended.losses, ended.failures) == (JobState.CANCELLED, 2, 1, 0)
    assert_no_overlap(ticks)


async def test_the_agent_and_the_job_are_killed(cluster: Cluster, client: lessor.AsyncClient, tmp_path: Path) -> None:
    agent = cluster.agent("one")
    ticks = tmp_path / "ticks"
    job = await submit_ticker(client, ticks, 2)
    await until(lambda: ticking(ticks))
    agent.kill()
    for pid in _pids_of(ticks):
        os.kill(pid, signal.SIGKILL)
    cluster.agent("two")
    (ended,) = await client.wait([job], timeout=60)
    assert (ended.state, ended.attempt) == (JobState.SUCCEEDED, 2)
    assert_no_overlap(ticks)
    assert [life[-1][0] for life in lives(ticks).values()] == ["tick", "end"]


async def test_a_restarted_agent_keeps_its_job(cluster: Cluster, client: lessor.AsyncClient, tmp_path: Path) -> None:
    agent = cluster.agent("one")
    ticks = tmp_path / "ticks"
    job = await submit_ticker(client, ticks, 3, ttl="60s")
    await until(lambda: ticking(ticks))
    agent.kill()
    agent.start()
    (ended,) = await client.wait([job], timeout=60)
    assert (ended.state, ended.attempt, ended.losses) == (JobState.SUCCEEDED, 1, 0)
    assert len(lives(ticks)) == 1


async def test_a_job_that_ended_while_the_agent_was_away_is_not_run_again(
    cluster: Cluster, client: lessor.AsyncClient, tmp_path: Path
) -> None:
    agent = cluster.agent("one")
    ticks = tmp_path / "ticks"
    job = await submit_ticker(client, ticks, 0.5, ttl="60s")
    await until(lambda: ticking(ticks))
    agent.kill()
    await until(lambda: next(iter(lives(ticks).values()))[-1][0] == "end")
    agent.start()
    (ended,) = await client.wait([job], timeout=60)
    assert (ended.state, ended.attempt) == (JobState.SUCCEEDED, 1)
    assert b"".join([chunk.data async for chunk in client.logs(job)]) == b"ticking\n"


async def test_the_stream_is_cut_and_comes_back(cluster: Cluster, client: lessor.AsyncClient, tmp_path: Path) -> None:
    async with Proxy(cluster.address) as proxy:
        agent = cluster.agent("one")
        agent.kill()
        agent.address = proxy.address
        agent.start()
        ticks = tmp_path / "ticks"
        job = await submit_ticker(client, ticks, 3)
        await until(lambda: ticking(ticks))
        await proxy.cut()
        (ended,) = await client.wait([job], timeout=60)
        assert (ended.state, ended.attempt, ended.losses) == (JobState.SUCCEEDED, 1, 0)
        assert proxy.connections >= 2


async def test_the_state_directory_is_deleted_while_its_job_runs(
    cluster: Cluster, client: lessor.AsyncClient, tmp_path: Path
) -> None:
    agent = cluster.agent("one")
    ticks = tmp_path / "ticks"
    job = await submit_ticker(client, ticks, 3600)
    await until(lambda: ticking(ticks))
    agent.kill()
    shutil.rmtree(agent.state_dir)
    agent.start()
    await until(lambda: ticking(ticks, attempts=2))
    await client.cancel(job)
    await client.wait([job], timeout=60)
    assert_no_overlap(ticks)


async def test_the_server_is_killed_amid_200_jobs(cluster: Cluster, client: lessor.AsyncClient, tmp_path: Path) -> None:
    for number in range(2):
        cluster.agent(f"agent-{number}", "--cpu", "8")
    marks = tmp_path / "marks"
    marks.mkdir()
    script = f"echo run >> {marks}/$LESSOR_JOB_ID; sleep 0.05; echo out"
    specs = [lessor.JobSpec.of(["/bin/sh", "-c", script], max_failures=1, cpu="1") for _ in range(200)]
    jobs = await client.submit_many(specs)
    await until(lambda: len(list(marks.iterdir())) > 20)
    await cluster.kill_server()
    await cluster.start_server(cluster.address)
    ended = await client.wait(jobs, timeout=100)
    assert {job.state for job in ended} == {JobState.SUCCEEDED}
    assert {(job.failures, job.losses) for job in ended} == {(0, 0)}
    assert [(marks / job.id).read_text() for job in ended] == ["run\n"] * 200


async def test_a_submit_answered_ok_is_never_lost(cluster: Cluster, client: lessor.AsyncClient) -> None:
    accepted: list[str] = []

    async def submit() -> None:
        while len(accepted) < 300:
            accepted.append((await client.submit(["/bin/true"])).id)

    submitting = asyncio.gather(*(submit() for _ in range(8)))
    for threshold in (50, 150):
        await until(lambda threshold=threshold: len(accepted) >= threshold)  # type: ignore[misc]
        await cluster.kill_server()
        await cluster.start_server(cluster.address)
    await submitting
    known = {job.id async for job in client.list()}
    assert set(accepted) <= known
    assert len(known) == len(accepted), "a repeated submit made a second job"


async def test_cancel_before_during_and_after(cluster: Cluster, client: lessor.AsyncClient, tmp_path: Path) -> None:
    before = await client.submit(["/bin/sleep", "60"])
    assert list((await client.cancel(before)).values()) == [lessor.CancelResult.CANCELLED]
    cluster.agent("one")
    polite = await client.submit(
        ["/bin/sh", "-c", "trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.05; done"], grace="5s"
    )
    stubborn = await client.submit(
        ["/bin/sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.05; done"], grace="300ms"
    )
    for job in (polite, stubborn):
        async for _ in client.logs(job, follow=True):
            break
    assert set((await client.cancel([polite, stubborn])).values()) == {lessor.CancelResult.REQUESTED}
    ended = await client.wait([polite, stubborn], timeout=30)
    assert {job.state for job in ended} == {JobState.CANCELLED}
    assert [job.signal for job in ended] == [None, signal.SIGKILL]
    # On standard error the shell may say that its sleep was terminated.
    stdout = [chunk.data async for chunk in client.logs(polite) if chunk.stream is lessor.LogStream.STDOUT]
    assert b"".join(stdout) == b"up\nbye\n"
    assert list((await client.cancel(polite)).values()) == [lessor.CancelResult.ALREADY_TERMINAL]


async def test_exhausted_budgets_name_themselves(cluster: Cluster, client: lessor.AsyncClient, tmp_path: Path) -> None:
    agent = cluster.agent("one")
    failing = await client.submit(["/bin/false"], max_failures=2, backoff="10ms")
    (job,) = await client.wait([failing], timeout=30)
    assert (job.state, job.failures) == (JobState.FAILED, 2)
    assert job.error is not None
    assert "max_failures" in job.error.message
    ticks = tmp_path / "ticks"
    lost = await submit_ticker(client, ticks, 3600, max_losses=1)
    await until(lambda: ticking(ticks))
    agent.kill()
    (job,) = await client.wait([lost], timeout=60)
    assert (job.state, job.losses, job.failures) == (JobState.FAILED, 1, 0)
    assert job.error is not None
    assert "max_losses" in job.error.message


async def test_eight_gpus_are_never_held_twice_by_a_hundred_jobs(
    cluster: Cluster, client: lessor.AsyncClient, tmp_path: Path
) -> None:
    cluster.agent("one", "--fake-gpus", "8", "--cpu", "100")
    holders = tmp_path / "gpus"
    holders.mkdir()
    # mkdir is atomic: a GPU that somebody holds makes the job fail.
    script = (
        f"IFS=,; for g in $CUDA_VISIBLE_DEVICES; do mkdir {holders}/$g || exit 9; done; sleep 0.02; "
        f"for g in $CUDA_VISIBLE_DEVICES; do rmdir {holders}/$g; done"
    )
    specs = [lessor.JobSpec.of(["/bin/sh", "-c", script], gpus=1 + n % 3, cpu="0.1") for n in range(100)]
    ended = await client.wait(await client.submit_many(specs), timeout=100)
    assert {job.state for job in ended} == {JobState.SUCCEEDED}
    assert {len(job.gpu_uuids) for job in ended} == {1, 2, 3}
    assert all(gpu.lease_id in (0, None) for gpu in await client.gpus())


async def test_a_python_workload_reports_and_resumes(cluster: Cluster, client: lessor.AsyncClient) -> None:
    cluster.agent("one")
    code = (
        "from lessor import job\n"
        "if job.last_checkpoint() is None:\n"
        "    job.progress(0.5, 'half'); job.checkpoint('step-5'); raise SystemExit(1)\n"
        "job.result({'resumed_from': job.last_checkpoint(), 'attempt': job.attempt()})\n"
    )
    submitted = await client.submit([sys.executable, "-c", code], max_failures=2, backoff="0s")
    (job,) = await client.wait([submitted], timeout=30)
    assert job.state == JobState.SUCCEEDED
    assert job.result == {"resumed_from": "step-5", "attempt": 2}


def _pids_of(ticks: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(ticks).encode() in command and b"ticker.py" in command[1]:
                found.append(int(entry.name))
    return found
