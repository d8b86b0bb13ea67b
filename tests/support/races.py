"""Two connections, stopped where it matters.

The first runs its statement and holds its transaction open; the second starts
and runs until it is done or waits for the first's locks; then the first commits.
No sleeping: a waiting connection shows in ``pg_locks``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import asyncpg

from lessor_server.store.database import Transaction
from tests.support.store import Store

A = TypeVar("A")
B = TypeVar("B")


async def wait_until_blocked(store: Store, task: asyncio.Task[Any], waiting: int = 1) -> bool:
    """Returns True once ``waiting`` connections of this database wait for a lock, False if ``task`` ends before."""
    while not task.done():
        count = await store.value(
            "SELECT count(DISTINCT l.pid) FROM pg_locks AS l JOIN pg_stat_activity AS a ON a.pid = l.pid "
            "WHERE NOT l.granted AND a.datname = current_database()"
        )
        if count >= waiting:
            return True
        await asyncio.sleep(0)
    return False


async def overtake(
    store: Store, first: Callable[[Transaction], Awaitable[A]], second: Callable[[], Awaitable[B]]
) -> tuple[A, B]:
    """Runs ``first``, then ``second`` into its open transaction, then commits ``first``. Returns both results."""
    connection = await asyncpg.connect(store.database.url)
    try:
        async with connection.transaction():
            result = await first(Transaction(connection))
            task = asyncio.ensure_future(second())
            await wait_until_blocked(store, task)
        return result, await task
    finally:
        await connection.close()


async def held_at_leader(
    store: Store, blocked: Callable[[], Awaitable[A]], meanwhile: Callable[[], Awaitable[Any]]
) -> A:
    """Starts ``blocked``, whose statement stops at the leader row, its snapshot taken; runs ``meanwhile``; lets go."""
    connection = await asyncpg.connect(store.database.url)
    try:
        async with connection.transaction():
            await connection.execute("SELECT FROM leader FOR UPDATE")
            task = asyncio.ensure_future(blocked())
            assert await wait_until_blocked(store, task), "it was to wait for the leader row"
            await meanwhile()
        return await task
    finally:
        await connection.close()
