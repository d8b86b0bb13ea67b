"""Bells: no ring is missed, and no cancellation."""

from __future__ import annotations

import asyncio

import pytest

from lessor_server.bells import Bell

_LONG_S = 3600.0


async def waiting(bell: Bell, timeout_s: float = _LONG_S) -> asyncio.Task[int]:
    """A task that waits for the bell already."""
    task = asyncio.create_task(bell.wait(bell.count, timeout_s))
    await asyncio.sleep(0)
    return task


async def test_a_ring_wakes_all_who_wait() -> None:
    bell = Bell()
    first, second = await waiting(bell), await waiting(bell)
    bell.ring()
    assert (await first, await second) == (1, 1)


async def test_a_ring_between_look_and_wait_is_not_missed() -> None:
    bell = Bell()
    seen = bell.count
    bell.ring()
    assert await bell.wait(seen, _LONG_S) == 1


async def test_without_a_ring_the_wait_ends_with_its_time() -> None:
    bell = Bell()
    assert await bell.wait(bell.count, 0.0) == 0


async def test_a_cancellation_that_comes_together_with_a_ring_is_heard() -> None:
    bell = Bell()
    task = await waiting(bell)
    bell.ring()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_whoever_gave_up_is_not_rung_any_more() -> None:
    bell = Bell()
    task = await waiting(bell)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    bell.ring()
    assert bell.count == 1
