"""GPUs from the management library to the job's environment, with the real pynvml and processes."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

import lessor
from lessor import JobState
from tests.support.cluster import LESSOR, Cluster
from tests.support.nvml import NvmlStub

pytestmark = pytest.mark.e2e

GPUS = 8
SHOW = ["/bin/sh", "-c", 'echo "$CUDA_VISIBLE_DEVICES"']


def lessor_agents(cluster: Cluster, *flags: str) -> str:
    """Returns what ``lessor agents --gpus`` prints."""
    return subprocess.run(
        [str(LESSOR), "agents", "--gpus", *flags],
        env={**os.environ, "LESSOR_ADDRESS": cluster.address, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout


async def output(client: lessor.AsyncClient, job: lessor.Submission) -> list[str]:
    """Returns the words that a job printed, once it has succeeded."""
    (done,) = await client.wait([job], timeout=60)
    assert done.state is JobState.SUCCEEDED, done.error
    return b"".join([chunk.data async for chunk in client.logs(job)]).decode().strip().split(",")


async def test_a_job_sees_the_gpus_it_was_leased_and_no_others(
    cluster: Cluster, client: lessor.AsyncClient, nvml_stub: NvmlStub
) -> None:
    nvml_stub.say({"3.memory_used": 7 << 30, "3.utilization": 93, "5.name": "NVIDIA Odd One"})
    cluster.agent("gpu-host", **nvml_stub.environment)
    two = await output(client, await client.submit(SHOW, gpus=2))
    known = {gpu.uuid: gpu for gpu in await client.gpus()}
    assert len(known) == GPUS
    assert len(set(two)) == 2
    assert set(two) <= set(known)
    assert set(await output(client, await client.submit(SHOW, gpus=GPUS))) == set(known)
    assert await output(client, await client.submit(SHOW)) == [""], "a job without GPUs sees none"
    (odd,) = await output(client, await client.submit(SHOW, gpus=1, gpu_model="odd one"))
    assert (known[odd].index, known[odd].model) == (5, "NVIDIA Odd One")


async def test_what_the_gpus_say_is_listed(cluster: Cluster, client: lessor.AsyncClient, nvml_stub: NvmlStub) -> None:
    nvml_stub.say({"3.memory_used": 7 << 30, "3.utilization": 93})
    cluster.agent("gpu-host", **nvml_stub.environment)
    holder = await client.submit(["/bin/sh", "-c", 'echo "$CUDA_VISIBLE_DEVICES"; exec sleep 3600'], gpus=1)
    async for chunk in client.logs(holder, follow=True):
        held = chunk.data.decode().strip()
        break
    gpus: list[dict[str, object]] = []
    while not any(gpu["utilization_percent"] == 93 for gpu in gpus):
        # Readings come with the heartbeats.
        gpus = json.loads(lessor_agents(cluster, "--json"))["gpus"]
    assert [gpu["index"] for gpu in gpus] == list(range(GPUS))
    assert [gpu["uuid"] for gpu in gpus if gpu["job_id"] == holder.id] == [held]
    assert gpus[3]["memory_used_bytes"] == 7 << 30
    lines = [line.split("\t") for line in lessor_agents(cluster).splitlines()]
    rows = [line for line in lines if line[-1].startswith("GPU-")]
    assert len(rows) == GPUS
    assert [(row[4], row[5]) for row in rows][3] == (str(7 << 30), "93")
    await client.cancel(holder)
    await client.wait([holder], timeout=60)
    assert all(gpu.job_id is None for gpu in await client.gpus())
