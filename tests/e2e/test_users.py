"""Jobs of other users, under an agent that runs as root."""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.cluster import LESSOR, Cluster, running_cluster

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(os.geteuid() != 0, reason="only root may start jobs as another user")]


@pytest.fixture
async def open_cluster(database_url: str) -> AsyncIterator[Cluster]:
    """A cluster whose directory other users can pass through, as they can through /var/lib."""
    with tempfile.TemporaryDirectory(prefix="lessor-test-") as name:
        os.chmod(name, 0o711)
        async with running_cluster(database_url, Path(name)) as made:
            yield made


async def test_a_job_of_another_user_needs_no_preparation(open_cluster: Cluster) -> None:
    open_cluster.agent("root-agent")
    ran = await asyncio.to_thread(
        subprocess.run,
        [str(LESSOR), "run", "--user", "nobody", "--", "id", "-un"],
        env={**os.environ, "LESSOR_ADDRESS": open_cluster.address},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (0, "nobody\n"), ran.stderr
