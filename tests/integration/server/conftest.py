"""Fixtures of the server's reads."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest

from lessor_server.bells import Bells
from lessor_server.store.catalog import Catalog
from lessor_server.store.database import Database
from tests.support.rows import Rows


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """The server's own pools on a fresh database."""
    made = await Database.connect(database_url, pool_size=5)
    yield made
    await made.close()


@pytest.fixture
def catalog(database: Database) -> Catalog:
    return Catalog(database)


@pytest.fixture
def bells() -> Bells:
    return Bells()


@pytest.fixture
def rows(pool: asyncpg.Pool) -> Rows:
    """Writes rows into the database of the test."""
    return Rows(pool)
