"""Watching: each change once, in an order that no commit can slip behind."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing
from typing import Any

import asyncpg
import pytest

from lessor.ids import decode_job_id
from lessor.v1 import job_pb2
from lessor.v1.job_service_pb2 import WatchJobsResponse
from lessor_server.bells import Bell, Bells
from lessor_server.domain.errors import CursorExpired, InvalidField, JobNotFound
from lessor_server.services.cursors import decode_cursor, encode_cursor
from lessor_server.services.watch import Watches, WatchRequest
from lessor_server.services.watch_filter import AttributeCache, WatchFilter
from lessor_server.services.watch_hub import WatchHub
from lessor_server.store.database import Database
from lessor_server.store.event_queries import DatabaseIdentity, Position, read_events, read_identity
from tests.support.rows import Rows
from tests.support.waiting import until

Told = tuple[int, int, int]


class Reader:
    """Reads one watch; what it was told is (job, state, attempt)."""

    def __init__(self, responses: AsyncGenerator[WatchJobsResponse, None]) -> None:
        self._responses = responses
        self.cursor = ""
        self.last = WatchJobsResponse()

    async def next(self) -> list[Told]:
        async with asyncio.timeout(60):
            self.last = await anext(self._responses)
        self.cursor = self.last.cursor
        return [(decode_job_id(c.job_id), c.state, c.attempt) for c in self.last.changes]

    async def take(self, count: int) -> list[Told]:
        """Reads on until ``count`` changes were told."""
        told: list[Told] = []
        while len(told) < count:
            told += await self.next()
        return told


@pytest.fixture
async def watches(database: Database, bells: Bells) -> AsyncIterator[Watches]:
    made = Watches(database, bells)
    yield made
    await made.close()


def follow(watches: Watches, request: WatchRequest | None = None) -> AsyncGenerator[WatchJobsResponse, None]:
    return watches.watch(request or WatchRequest())


async def test_changes_come_as_they_commit(rows: Rows, watches: Watches, bells: Bells) -> None:
    await rows.event((1, 1, 0))
    async with aclosing(follow(watches)) as responses:
        reader = Reader(responses)
        assert await reader.next() == []
        await rows.event((2, 1, 0), (3, 1, 0))
        bells.changed()
        assert await reader.take(2) == [(2, 1, 0), (3, 1, 0)]
        await rows.event((2, 2, 1))
        bells.changed()
        assert await reader.take(1) == [(2, 2, 1)]


async def test_a_change_without_a_bell_is_found_by_looking(rows: Rows, database: Database, bells: Bells) -> None:
    watches = Watches(database, bells, hub=WatchHub(database, bells, poll_s=0.01))
    async with aclosing(follow(watches)) as responses:
        reader = Reader(responses)
        await reader.next()
        await rows.event((2, 1, 0))
        assert await reader.take(1) == [(2, 1, 0)]
    await watches.close()


async def test_a_late_committer_is_not_skipped(
    rows: Rows, watches: Watches, bells: Bells, pool: asyncpg.Pool, database: Database
) -> None:
    """Two transactions, the first numbers to the one that commits last."""
    async with aclosing(follow(watches)) as responses:
        reader = Reader(responses)
        await reader.next()
        before = reader.cursor
        async with pool.acquire() as early, pool.acquire() as late:
            first, second = early.transaction(), late.transaction()
            await first.start()
            await rows.event((1, 1, 0), connection=early)
            await second.start()
            await rows.event((2, 1, 0), connection=late)
            await second.commit()
            bells.changed()
            # The second is committed, and must wait for the first: nothing can be told yet.
            identity = await read_identity(database)
            page = await read_events(database, decode_cursor(identity, before), 10)
            assert (page.events, page.above) == ([], True)
            await first.commit()
        # No bell rings for the first: the hub looks again by itself while something is above the horizon.
        assert await reader.take(2) == [(1, 1, 0), (2, 1, 0)]
    for cursor in (before, encode_cursor(identity, page.reached)):
        async with aclosing(follow(watches, WatchRequest(cursor=cursor))) as responses:
            assert await Reader(responses).take(2) == [(1, 1, 0), (2, 1, 0)]


async def test_the_position_of_a_reader_never_passes_an_open_transaction(
    rows: Rows, pool: asyncpg.Pool, database: Database
) -> None:
    async with pool.acquire() as early:
        first = early.transaction()
        await first.start()
        await rows.event((1, 1, 0), connection=early)
        await rows.event((2, 1, 0))
        reached = (await read_events(database, Position(0, 0), 10)).reached
        await first.commit()
    page = await read_events(database, reached, 10)
    assert [event.job_numbers for event in page.events] == [[1], [2]]


async def test_reconnecting_anywhere_loses_and_repeats_nothing(rows: Rows, watches: Watches, bells: Bells) -> None:
    """Hang up after every response, with changes before, between and after; go on by cursor."""
    wanted: list[Told] = [(number, 1, 0) for number in range(1, 41)]
    told: list[Told] = []
    cursor = ""
    pending = iter(wanted)
    for _ in range(200):
        async with aclosing(follow(watches, WatchRequest(cursor=cursor))) as responses:
            reader = Reader(responses)
            told += await reader.next()
            for change in [c for _, c in zip(range(3), pending, strict=False)]:
                await rows.event(change)
            bells.changed()
            if len(told) < len(wanted):
                told += await reader.next()
            cursor = reader.cursor
        if len(told) >= len(wanted):
            break
    assert told == wanted


async def test_given_jobs_are_told_as_they_stand_and_then_only_as_they_change(
    rows: Rows, watches: Watches, bells: Bells
) -> None:
    session = await rows.agent("agent-00001")
    waiting, running, ended = [await rows.job() for _ in range(3)]
    await rows.ready(waiting)
    await rows.lease(running, session, "agent-00001", attempt=2)
    await rows.attempt(ended, attempt=3, final_state=5)
    await rows.event((waiting, 1, 0), (running, 3, 2), (ended, 5, 3))
    request = WatchRequest(numbers=[ended, waiting, running, waiting])
    async with aclosing(follow(watches, request)) as responses:
        reader = Reader(responses)
        assert await reader.next() == [(ended, 5, 3), (waiting, 1, 0), (running, 3, 2)]
        await rows.event((running + 1000, 1, 0))
        await rows.event((running + 1000, 2, 0), (waiting, 2, 1))
        bells.changed()
        assert await reader.take(1) == [(waiting, 2, 1)]
        cursor = reader.cursor
        await rows.event((running, 4, 2))
    # Going on from a cursor the caller knows where they stood: only what changed is told.
    request = WatchRequest(numbers=[waiting, running], cursor=cursor)
    async with aclosing(follow(watches, request)) as responses:
        reader = Reader(responses)
        assert await reader.next() == []
        assert await reader.next() == [(running, 4, 2)]


async def test_what_the_first_response_knows_is_not_told_again(
    rows: Rows, watches: Watches, bells: Bells, pool: asyncpg.Pool
) -> None:
    """A change that is committed, but above the horizon, is part of the standing and told once."""
    number = await rows.job()
    await rows.ready(number)
    async with pool.acquire() as other:
        transaction = other.transaction()
        await transaction.start()
        await rows.event((999, 1, 0), connection=other)
        await rows.event((number, 1, 0))
        async with aclosing(follow(watches, WatchRequest(numbers=[number]))) as responses:
            reader = Reader(responses)
            assert await reader.next() == [(number, 1, 0)]
            await transaction.commit()
            await rows.event((number, 2, 1))
            bells.changed()
            assert await reader.take(1) == [(number, 2, 1)]


async def test_unknown_jobs_are_named(rows: Rows, watches: Watches) -> None:
    with pytest.raises(JobNotFound):
        await Reader(follow(watches, WatchRequest(numbers=[77]))).next()


async def test_queue_and_labels_are_matched(rows: Rows, watches: Watches, bells: Bells) -> None:
    queue_id = await rows.queue("other")
    mine = await rows.job(queue="other", labels={"team": "a", "x": "y"})
    other_label = await rows.job(queue="other", labels={"team": "b"})
    other_queue = await rows.job(labels={"team": "a"})
    request = WatchRequest(queue_id=queue_id, labels={"team": "a"})
    async with aclosing(follow(watches, request)) as responses:
        reader = Reader(responses)
        await reader.next()
        await rows.event((other_label, 1, 0), (mine, 1, 0), (other_queue, 1, 0), (12345, 1, 0))
        bells.changed()
        assert await reader.take(1) == [(mine, 1, 0)]


async def test_attributes_are_read_once_and_the_oldest_forgotten(rows: Rows, database: Database) -> None:
    numbers = [await rows.job(labels={"n": str(n)}) for n in range(4)]
    cache = AttributeCache(database, kept=2)
    found = await cache.of([*numbers, 5])
    assert {number: found[number].labels["n"] for number in numbers} == {n: str(i) for i, n in enumerate(numbers)}
    assert 5 not in found
    await rows.pool.execute("DELETE FROM job")
    assert len(await cache.of(numbers)) == 2


async def test_a_watcher_that_falls_behind_goes_on_from_the_database(
    rows: Rows, database: Database, bells: Bells
) -> None:
    hub = WatchHub(database, bells, poll_s=0.01, max_pending_changes=3)
    watches = Watches(database, bells, hub=hub)
    wanted = [(number, 1, 0) for number in range(1, 31)]
    async with aclosing(follow(watches)) as slow, aclosing(follow(watches)) as fast:
        behind, ahead = Reader(slow), Reader(fast)
        await behind.next()
        await ahead.next()
        # The first one reads nothing meanwhile; the second shows that the hub has handed out all.
        for change in wanted:
            await rows.event(change)
            bells.changed()
            assert await ahead.take(1) == [change]
        assert await behind.take(30) == wanted
        await rows.event((99, 1, 0))
        bells.changed()
        assert await behind.take(1) == [(99, 1, 0)]
    await watches.close()


async def test_a_cursor_ahead_of_this_replica_repeats_nothing(rows: Rows, database: Database, bells: Bells) -> None:
    """Another replica told more than this one's hub has read so far."""
    silent = Bells()
    hub = WatchHub(database, silent, poll_s=3600)
    watches = Watches(database, silent, hub=hub)
    async with aclosing(follow(watches)) as responses:
        reader = Reader(responses)
        await reader.next()
        lagging = hub.position
        await rows.event((1, 1, 0))
        elsewhere = Watches(database, bells)
        identity = await read_identity(database)
        page = await read_events(database, lagging, 10)
        assert [e.job_numbers for e in page.events] == [[1]]
        ahead = encode_cursor(identity, page.events[-1].position)
        async with aclosing(follow(watches, WatchRequest(cursor=ahead))) as second:
            other = Reader(second)
            assert await other.next() == []
            await rows.event((2, 1, 0))
            silent.changed()
            assert await other.take(1) == [(2, 1, 0)]
        assert await reader.take(2) == [(1, 1, 0), (2, 1, 0)]
        await elsewhere.close()
    await watches.close()


async def test_the_hub_rests_when_nobody_watches(rows: Rows, database: Database, bells: Bells) -> None:
    hub = WatchHub(database, bells, poll_s=0.01)
    async with hub.subscribe(WatchFilter(), Bell()) as subscription:
        await rows.event((1, 1, 0))
        await until(lambda: not subscription.empty)
    task = hub._task  # noqa: SLF001
    assert task is not None
    await asyncio.wait_for(task, 60)
    await rows.event((2, 1, 0))
    # What happened in between is not for a new subscription.
    async with hub.subscribe(WatchFilter(), Bell()) as subscription:
        await rows.event((3, 1, 0))
        await until(lambda: not subscription.empty)
        news = subscription.take()
        assert news is not None
        assert [decode_job_id(change.job_id) for change in news.changes] == [3]
    await hub.close()


async def test_silence_is_broken_by_keep_alives_with_a_fresh_cursor(
    rows: Rows, database: Database, bells: Bells
) -> None:
    watches = Watches(database, bells, keep_alive_s=0.01)
    async with aclosing(follow(watches, WatchRequest(queue_id=777))) as responses:
        reader = Reader(responses)
        await reader.next()
        first = reader.cursor
        await rows.event((1, 1, 0))
        bells.changed()
        identity = await read_identity(database)
        while decode_cursor(identity, reader.cursor) <= decode_cursor(identity, first):
            assert await reader.next() == []
    await watches.close()


async def test_cursors_that_cannot_be_resumed_say_why(rows: Rows, watches: Watches, database: Database) -> None:
    identity = await read_identity(database)
    await rows.event((1, 1, 0))
    (event,) = (await read_events(database, Position(0, 0), 10)).events
    old = encode_cursor(identity, Position(event.position.xid - 1, 0))
    await rows.pool.execute("UPDATE event_floor SET xid = (SELECT xid FROM event), id = (SELECT id FROM event)")
    with pytest.raises(CursorExpired, match="removed by retention"):
        await Reader(follow(watches, WatchRequest(cursor=old))).next()
    # At the floor nothing is missing.
    at_floor = encode_cursor(identity, event.position)
    assert await Reader(follow(watches, WatchRequest(cursor=at_floor))).next() == []
    foreign = encode_cursor(DatabaseIdentity(identity.system, identity.oid + 1), event.position)
    future = encode_cursor(identity, Position(event.position.xid + 10_000_000, 0))
    for cursor in (foreign, future):
        with pytest.raises(CursorExpired, match="another database"):
            await Reader(follow(watches, WatchRequest(cursor=cursor))).next()
    for cursor in ("nonsense", "!", base64.urlsafe_b64encode(b"\2" + bytes(28)).decode()):
        with pytest.raises(InvalidField, match="cursor"):
            await Reader(follow(watches, WatchRequest(cursor=cursor))).next()


async def test_progress_is_told_and_comes_before_the_end(rows: Rows, watches: Watches, bells: Bells) -> None:
    session = await rows.agent("agent-00001")
    number, other = await rows.job(), await rows.job()
    lease_id = await rows.lease(number, session, "agent-00001")
    await rows.ready(other)
    await rows.progress(number, lease_id, 0.1, "first")
    request = WatchRequest(numbers=[number, other], include_progress=True)
    async with aclosing(follow(watches, request)) as responses:
        reader = Reader(responses)
        assert await reader.next() == [(number, 3, 1), (other, 1, 0)]
        assert await reader.next() == [(number, 3, 1)]
        assert (reader.last.changes[0].progress.fraction, reader.last.changes[0].progress.message) == (0.1, "first")
        await rows.progress(number, lease_id, 0.5)
        bells.progress.ring(number)
        assert await reader.next() == [(number, 3, 1)]
        assert reader.last.changes[0].progress.fraction == 0.5
        # The last progress is stored, and the job ends, before anybody looks.
        await rows.progress(number, lease_id, 1.0)
        await rows.pool.execute("DELETE FROM lease")
        await rows.attempt(number, lease_id=lease_id, final_state=4)
        await rows.event((number, 4, 1))
        bells.changed()
        assert await reader.next() == [(number, 3, 1)]
        assert reader.last.changes[0].progress.fraction == 1.0
        assert await reader.next() == [(number, 4, 1)]
        assert not reader.last.changes[0].HasField("progress")
        assert reader.last.changes[0].state == job_pb2.JOB_STATE_SUCCEEDED


async def test_progress_stored_by_another_replica_is_found_by_looking(rows: Rows, watches: Watches) -> None:
    session = await rows.agent("agent-00001")
    number = await rows.job()
    lease_id = await rows.lease(number, session, "agent-00001")
    async with aclosing(follow(watches, WatchRequest(numbers=[number], include_progress=True))) as responses:
        reader = Reader(responses)
        await reader.next()
        await rows.progress(number, lease_id, 0.5)
        assert await reader.next() == [(number, 3, 1)]


async def test_listeners_are_gone_with_the_watch(rows: Rows, watches: Watches, bells: Bells) -> None:
    number = await rows.job()
    await rows.ready(number)
    async with aclosing(follow(watches, WatchRequest(numbers=[number], include_progress=True))) as responses:
        await Reader(responses).next()
        assert bells.progress._bells  # noqa: SLF001
    assert not bells.progress._bells  # noqa: SLF001


# ---------------------------------------------------------------- many watchers


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The statements that were read so far."""
    heard: list[str] = []
    look = Database.look

    async def noting(database: Database, text: str, *arguments: Any) -> Any:
        heard.append(text)
        return await look(database, text, *arguments)

    monkeypatch.setattr(Database, "look", noting)
    return heard


@pytest.mark.parametrize("wanted", [WatchRequest(), WatchRequest(queue_id=1), WatchRequest(labels={"k": "v"})])
async def test_a_change_is_read_once_for_all_watchers(
    rows: Rows, database: Database, bells: Bells, looks: list[str], wanted: WatchRequest
) -> None:
    watches = Watches(database, bells, hub=WatchHub(database, bells, poll_s=3600))
    numbers = [await rows.job(labels={"k": "v"}) for _ in range(3)]
    async with AsyncExitStack() as stack:
        readers = [Reader(await stack.enter_async_context(aclosing(follow(watches, wanted)))) for _ in range(60)]
        for reader in readers:
            await reader.next()
        await rows.event((numbers[0], 1, 0))
        bells.changed()
        for reader in readers:
            assert await reader.take(1) == [(numbers[0], 1, 0)]
        looks.clear()
        for number in numbers[1:]:
            await rows.event((number, 1, 0))
        bells.changed()
        for reader in readers:
            assert await reader.take(2) == [(number, 1, 0) for number in numbers[1:]]
        # One of the events, perhaps again while an older transaction runs, and one of what the jobs are.
        assert len(looks) < 10
    await watches.close()


async def test_progress_is_read_once_for_all_watchers(
    rows: Rows, database: Database, bells: Bells, looks: list[str]
) -> None:
    watches = Watches(database, bells, hub=WatchHub(database, bells, poll_s=3600))
    session = await rows.agent("agent-00001")
    numbers = [await rows.job() for _ in range(30)]
    leases = [await rows.lease(number, session, "agent-00001") for number in numbers]
    async with AsyncExitStack() as stack:
        readers = []
        for number in [*numbers, *numbers]:
            request = WatchRequest(numbers=[number], include_progress=True)
            readers.append(Reader(await stack.enter_async_context(aclosing(follow(watches, request)))))
            await readers[-1].next()
        looks.clear()
        for number, lease_id in zip(numbers, leases, strict=True):
            await rows.progress(number, lease_id, 0.5)
        for number in numbers:
            bells.progress.ring(number)
        for number, reader in zip([*numbers, *numbers], readers, strict=True):
            assert await reader.next() == [(number, 3, 1)]
            assert reader.last.changes[0].progress.fraction == 0.5
        assert len(looks) < 20
    await watches.close()


async def test_watchers_of_the_same_are_told_of_the_same_change(rows: Rows, watches: Watches, bells: Bells) -> None:
    """Watchers of a queue, of a label, of a job, of a job and a queue, of everything; and one that is not concerned."""
    queue = await rows.queue("other")
    number = await rows.job(queue="other", labels={"k": "v"})
    await rows.ready(number)
    wanted = [
        WatchRequest(queue_id=queue),
        WatchRequest(labels={"k": "v"}),
        WatchRequest(numbers=[number]),
        WatchRequest(numbers=[number], queue_id=queue),
        WatchRequest(),
    ]
    unconcerned = [
        WatchRequest(queue_id=1),
        WatchRequest(labels={"k": "w"}),
        WatchRequest(numbers=[number], labels={"k": "w"}),
        WatchRequest(numbers=[number], queue_id=1),
    ]
    bystander = await rows.job()
    async with AsyncExitStack() as stack:
        readers = [Reader(await stack.enter_async_context(aclosing(follow(watches, each)))) for each in wanted]
        others = [Reader(await stack.enter_async_context(aclosing(follow(watches, each)))) for each in unconcerned]
        for reader in (*readers, *others):
            await reader.next()
        await rows.event((bystander, 1, 0), (number, 6, 0))
        bells.changed()
        for reader in readers[:4]:
            assert await reader.take(1) == [(number, 6, 0)]
        assert await readers[4].take(2) == [(bystander, 1, 0), (number, 6, 0)]
        assert await others[0].take(1) == [(bystander, 1, 0)]
    await watches.close()
