"""Fixtures that all tests share."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest
from hypothesis import HealthCheck, settings

from lessor_server.embedded import PostgresNotFound
from tests.support.nvml import CompilerMissing, NvmlStub, build_nvml_stub
from tests.support.postgres import DEFAULT_VERSION, VERSION_VARIABLE, PostgresServer, wanted_version


def pytest_configure() -> None:
    """Has tests depend neither on how they were started nor on how fast the host is."""
    # No example is too slow on a host that is busy with something else.
    settings.register_profile("untimed", parent=settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("untimed")
    # A shell that runs the tests in the background has Ctrl-C ignored, also in the programs that they start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_process_state() -> Iterator[None]:
    """What a test sets up of this process ends with it: the umask, and handlers that write into a closed stream."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    umask = os.umask(0o022)
    yield
    os.umask(umask)
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL server of this test process, of the version that LESSOR_TEST_POSTGRES names (default 18)."""
    version = wanted_version()
    try:
        server = PostgresServer(version)
    except PostgresNotFound as error:
        if version == DEFAULT_VERSION:
            raise
        pytest.skip(f"{VERSION_VARIABLE}={version}: {error}")
    with server:
        yield server


@pytest.fixture
def database_url(postgres_server: PostgresServer) -> Iterator[str]:
    """``postgresql://…`` of a fresh database with the current schema; dropped after the test."""
    url = postgres_server.create_migrated()
    yield url
    postgres_server.drop(url)


@pytest.fixture
def empty_database_url(postgres_server: PostgresServer) -> Iterator[str]:
    """``postgresql://…`` of a fresh database without any table; dropped after the test."""
    url = postgres_server.create_empty()
    yield url
    postgres_server.drop(url)


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[asyncpg.Pool]:
    """A pool on a fresh database with the current schema."""
    async with asyncio.timeout(30):
        made = await asyncpg.create_pool(database_url, min_size=1, max_size=10)
    yield made
    try:
        # A test that failed may have left a connection out.
        async with asyncio.timeout(5):
            await made.close()
    except TimeoutError:
        made.terminate()


@pytest.fixture(scope="session")
def nvml_stub_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a stand-in for libnvidia-ml.so.1."""
    library_dir = tmp_path_factory.mktemp("nvml")
    try:
        build_nvml_stub(library_dir)
    except CompilerMissing as error:
        pytest.skip(str(error))
    return library_dir


@pytest.fixture
def nvml_stub(nvml_stub_dir: Path, tmp_path: Path) -> NvmlStub:
    """Eight GPUs for processes started with ``nvml_stub.environment``; ``nvml_stub.say`` changes what they say."""
    return NvmlStub(nvml_stub_dir, tmp_path / "nvml_state")
