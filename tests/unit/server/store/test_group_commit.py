"""Group commit: batches, order, and errors that hit only whom they concern."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import asyncpg
import pytest

from lessor_server.domain.errors import DatabaseUnavailable, Stopping
from lessor_server.store.group_commit import GroupCommit


class Sink:
    """Commits numbers; each commit waits for ``gate``. -1 cannot be stored."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.begun = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def flush(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.begun.set()
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        if -1 in items:
            raise asyncpg.DataError("cannot be stored")
        return [item * 2 for item in items]


async def test_what_comes_in_during_a_commit_rides_the_next() -> None:
    sink = Sink()
    commit: GroupCommit[int, int] = GroupCommit("test", sink.flush, max_items=100)
    commit.start()
    sink.gate.clear()
    futures = [commit.submit(0)]
    await sink.begun.wait()
    futures += [commit.submit(n) for n in range(1, 10)]
    sink.gate.set()
    assert await asyncio.gather(*futures) == [n * 2 for n in range(10)]
    assert sink.batches == [[0], list(range(1, 10))]
    await commit.close()


class Pauses:
    """Pauses that end at once; in each, as many callers come as is said."""

    def __init__(self, *coming: int) -> None:
        self.coming = list(coming)
        self.commit: GroupCommit[int, int]
        self.waited_s: list[float] = []
        self.futures: list[asyncio.Future[int]] = []

    async def __call__(self, seconds: float) -> None:
        await asyncio.sleep(0)
        if seconds:
            self.waited_s.append(seconds)
            self.futures += [self.commit.submit(0) for _ in range(self.coming.pop(0) if self.coming else 0)]


def gathering(sink: Sink, pauses: Pauses) -> GroupCommit[int, int]:
    pauses.commit = GroupCommit("test", sink.flush, max_items=100, gather_s=0.004, pause=pauses)
    return pauses.commit


async def test_after_a_batch_of_many_callers_those_on_their_way_are_waited_for() -> None:
    sink, pauses = Sink(), Pauses(3, 2, 0, 9)
    commit = gathering(sink, pauses)
    first = [commit.submit(n) for n in range(4)]
    commit.start()
    await asyncio.gather(*first)
    assert pauses.waited_s == []
    assert await commit.submit(1) == 2
    # It took the five that came, and stopped waiting when none came.
    assert [len(batch) for batch in sink.batches] == [4, 6]
    assert pauses.waited_s == [0.001] * 3
    await asyncio.gather(*pauses.futures)
    await commit.close()


async def test_callers_who_keep_coming_are_not_waited_for_without_end() -> None:
    sink, pauses = Sink(), Pauses(*[1] * 100)
    commit = gathering(sink, pauses)
    first = [commit.submit(n) for n in range(4)]
    commit.start()
    await asyncio.gather(*first)
    await commit.submit(1)
    assert len(sink.batches[1]) == 5
    assert sum(pauses.waited_s) == pytest.approx(0.004)
    pauses.coming.clear()
    await commit.close()


async def test_few_callers_never_wait_for_others() -> None:
    sink, pauses = Sink(), Pauses(*[1] * 100)
    commit = gathering(sink, pauses)
    commit.start()
    for _ in range(3):
        await asyncio.gather(*(commit.submit(n) for n in range(3)))
    assert pauses.waited_s == []
    await commit.close()


async def test_a_bad_item_fails_alone() -> None:
    sink = Sink()
    commit: GroupCommit[int, int] = GroupCommit("test", sink.flush, max_items=100)
    futures = [commit.submit(n) for n in (1, 2, -1, 3, 4)]
    commit.start()
    results = await asyncio.gather(*futures, return_exceptions=True)
    assert [r for r in results if isinstance(r, int)] == [2, 4, 6, 8]
    assert isinstance(results[2], asyncpg.DataError)
    await commit.close()


async def test_an_outage_is_told_to_all_of_the_batch_and_the_next_goes_on() -> None:
    sink = Sink()
    commit: GroupCommit[int, int] = GroupCommit("test", sink.flush, max_items=100)
    commit.start()
    sink.error = DatabaseUnavailable("gone")
    results = await asyncio.gather(commit.submit(1), commit.submit(2), return_exceptions=True)
    assert [type(r) for r in results] == [DatabaseUnavailable] * 2
    sink.error = None
    assert await commit.submit(3) == 6
    await commit.close()


async def test_a_caller_that_goes_away_cancels_nothing() -> None:
    sink = Sink()
    commit: GroupCommit[int, int] = GroupCommit("test", sink.flush, max_items=100)
    commit.start()
    sink.gate.clear()
    caller = asyncio.create_task(commit.commit(1))
    await sink.begun.wait()
    caller.cancel()
    other = commit.submit(2)
    sink.gate.set()
    assert await other == 4
    assert sink.batches == [[1], [2]]
    await commit.close()


async def test_batches_keep_within_items_and_weight() -> None:
    sink = Sink()
    commit: GroupCommit[int, int] = GroupCommit("test", sink.flush, max_items=3, weight=lambda n: n, max_weight=10)
    futures = [commit.submit(n) for n in (1, 1, 1, 1, 20, 6, 6)]
    commit.start()
    await asyncio.gather(*futures)
    assert sink.batches == [[1, 1, 1], [1], [20], [6], [6]]
    await commit.close()


async def test_closing_commits_what_was_accepted_and_refuses_the_rest() -> None:
    sink = Sink()
    commit: GroupCommit[int, int] = GroupCommit("test", sink.flush, max_items=100)
    commit.start()
    accepted = commit.submit(1)
    await commit.close()
    assert await accepted == 2
    with pytest.raises(Stopping):
        await commit.submit(2)
