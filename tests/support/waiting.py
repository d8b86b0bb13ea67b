"""Waiting for what another task of the same loop does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Lets other tasks run until ``condition`` holds.

    Raises:
        TimeoutError: It does not after ``timeout_s``.
    """
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for rings no event
            await asyncio.sleep(0)
