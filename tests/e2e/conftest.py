"""Fixtures of the end-to-end tests: installed programs, real processes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import lessor
from tests.support.cluster import Cluster, running_cluster


@pytest.fixture
async def cluster(database_url: str, tmp_path: Path) -> AsyncIterator[Cluster]:
    """A server; the test starts the agents."""
    async with running_cluster(database_url, tmp_path) as made:
        yield made


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[lessor.AsyncClient]:
    """A client of the cluster's server."""
    async with lessor.AsyncClient(cluster.address, timeout=60) as made:
        yield made
