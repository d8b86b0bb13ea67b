"""Logs: from an offset, from the last lines, followed over attempts; each byte once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from lessor_server.bells import Bells
from lessor_server.domain.errors import AttemptNotFound, JobNotFound
from lessor_server.services.log_reader import LogPiece, LogReader
from lessor_server.store import log_queries
from lessor_server.store.database import Database
from tests.support.rows import Rows
from tests.support.waiting import until

AGENT = "agent-00001"


@pytest.fixture
def logs(database: Database, bells: Bells) -> LogReader:
    # An hour: whatever a follower hears, it hears by a bell.
    return LogReader(database, bells, poll_s=3600)


async def everything(pieces: AsyncGenerator[LogPiece, None]) -> list[LogPiece]:
    async with asyncio.timeout(60):
        return [piece async for piece in pieces]


def text(pieces: list[LogPiece]) -> bytes:
    """The bytes told, which must follow each other within an attempt."""
    at: dict[int, int] = {}
    for piece in pieces:
        assert at.setdefault(piece.attempt, piece.offset) == piece.offset
        at[piece.attempt] += len(piece.data)
    return b"".join(piece.data for piece in pieces)


async def ended_job(rows: Rows, *chunks: bytes, streams: list[int] | None = None) -> int:
    number = await rows.job()
    lease_id = await rows.attempt(number, final_state=4)
    await rows.log(lease_id, *chunks, streams=streams or [])
    return number


async def test_a_log_is_told_from_any_offset(rows: Rows, logs: LogReader) -> None:
    number = await ended_job(rows, b"one\n", b"two\n", b"three\n", streams=[1, 2, 1])
    whole = b"one\ntwo\nthree\n"
    pieces = await everything(logs.stream(number))
    assert [(p.attempt, p.offset, p.stream, p.data) for p in pieces] == [
        (1, 0, 1, b"one\n"),
        (1, 4, 2, b"two\n"),
        (1, 8, 1, b"three\n"),
    ]
    for offset in range(len(whole) + 3):
        assert text(await everything(logs.stream(number, offset=offset))) == whole[offset:]


@pytest.mark.parametrize(
    "chunks",
    [
        (b"a\nb\nc\nd\n",),
        (b"a\n", b"b\n", b"c\n", b"d\n"),
        (b"a", b"\n", b"b\nc", b"\nd"),
        (b"a\nb\n", b"c\nd", b"\n"),
        (b"\n\n\n", b"x\n\n"),
        (b"no newline at all",),
        tuple(b"line %d\n" % n for n in range(30)),
    ],
)
async def test_the_tail_is_that_of_the_whole(rows: Rows, logs: LogReader, chunks: tuple[bytes, ...]) -> None:
    number = await ended_job(rows, *chunks)
    lines = b"".join(chunks).splitlines(keepends=True)
    for count in (1, 2, 3, 4, 5, 100):
        assert text(await everything(logs.stream(number, tail_lines=count))) == b"".join(lines[-count:])


async def test_an_empty_log_is_empty(rows: Rows, logs: LogReader) -> None:
    number = await rows.job()
    await rows.attempt(number, final_state=4)
    for arguments in ({}, {"tail_lines": 3}, {"follow": True}, {"attempt": 1}, {"offset": 9}):
        assert await everything(logs.stream(number, **arguments)) == []


async def test_a_long_log_comes_in_pages(rows: Rows, logs: LogReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_queries, "PAGE_BYTES", 100)
    log_queries._chunks_query.cache_clear()  # noqa: SLF001
    number = await ended_job(rows, *(bytes([65 + n % 26]) * 33 for n in range(50)))
    assert text(await everything(logs.stream(number))) == b"".join(bytes([65 + n % 26]) * 33 for n in range(50))
    log_queries._chunks_query.cache_clear()  # noqa: SLF001


async def test_one_attempt_can_be_asked_for(rows: Rows, logs: LogReader) -> None:
    number = await rows.job()
    for attempt in (1, 2):
        lease_id = await rows.attempt(number, attempt=attempt, final_state=5 if attempt == 2 else None, outcome=2)
        await rows.log(lease_id, b"attempt %d" % attempt)
    assert text(await everything(logs.stream(number, attempt=1))) == b"attempt 1"
    assert text(await everything(logs.stream(number, attempt=1, follow=True))) == b"attempt 1"
    assert text(await everything(logs.stream(number))) == b"attempt 2"
    for follow in (False, True):
        with pytest.raises(AttemptNotFound, match="1 to 2"):
            await everything(logs.stream(number, attempt=3, follow=follow))
        with pytest.raises(JobNotFound):
            await everything(logs.stream(5, follow=follow))


async def test_a_waiting_job_has_no_log_yet(rows: Rows, logs: LogReader) -> None:
    number = await rows.job()
    await rows.ready(number)
    assert await everything(logs.stream(number)) == []
    with pytest.raises(AttemptNotFound, match="none yet"):
        await everything(logs.stream(number, attempt=1))


async def test_a_job_cancelled_while_it_waits_ends_the_wait(rows: Rows, logs: LogReader, bells: Bells) -> None:
    number = await rows.job()
    await rows.ready(number)
    following = asyncio.create_task(everything(logs.stream(number, follow=True)))
    asked = asyncio.create_task(everything(logs.stream(number, attempt=1, follow=True)))
    await listening(bells, number, 2)
    await rows.pool.execute("DELETE FROM ready")
    await rows.attempt(number, lease_id=0, attempt=0, outcome=3, final_state=6)
    bells.logs.ring(number)
    assert await following == []
    with pytest.raises(AttemptNotFound):
        await asked


async def listening(bells: Bells, number: int, count: int = 1) -> None:
    """Waits until ``count`` followers of the job wait for its bell."""

    def waiting() -> bool:
        found = bells.logs._bells.get(number)  # noqa: SLF001
        return found is not None and len(found[0]._waiters) >= count  # noqa: SLF001

    await until(waiting)


async def test_following_goes_over_all_attempts_to_the_end(rows: Rows, logs: LogReader, bells: Bells) -> None:
    session = await rows.agent(AGENT)
    number = await rows.job()
    await rows.ready(number)
    async with aclosing(logs.stream(number, follow=True)) as pieces:
        told: list[LogPiece] = []

        async def read() -> None:
            async for piece in pieces:
                told.append(piece)

        reading = asyncio.create_task(read())
        await listening(bells, number)
        await rows.pool.execute("DELETE FROM ready")
        first = await rows.lease(number, session, AGENT)
        bells.logs.ring(number)
        await listening(bells, number)
        end = await rows.log(first, b"one ")
        bells.logs.ring(number)
        await listening(bells, number)
        await rows.log(first, b"two ", start=end)
        # The attempt is lost and tried again; bytes of it that come in late are told while it is the last one.
        await rows.pool.execute("DELETE FROM lease")
        await rows.attempt(number, lease_id=first, outcome=6, losses=1)
        await rows.ready(number, attempts=1, losses=1, last=first)
        bells.logs.ring(number)
        await listening(bells, number)
        await rows.log(first, b"late ", start=8)
        bells.logs.ring(number)
        await listening(bells, number)
        await rows.pool.execute("DELETE FROM ready")
        second = await rows.lease(number, session, AGENT, attempt=2)
        await rows.log(second, b"three ")
        bells.logs.ring(number)
        await listening(bells, number)
        await rows.log(second, b"four", start=6)
        await rows.pool.execute("DELETE FROM lease")
        await rows.attempt(number, lease_id=second, attempt=2, final_state=4)
        bells.logs.ring(number)
        async with asyncio.timeout(60):
            await reading
    assert text(told) == b"one two late three four"
    assert [p.attempt for p in told] == [1, 1, 1, 2, 2]
    assert not bells.logs._bells  # noqa: SLF001


async def test_a_follower_of_one_attempt_ends_with_it(rows: Rows, logs: LogReader, bells: Bells) -> None:
    session = await rows.agent(AGENT)
    number = await rows.job()
    lease_id = await rows.lease(number, session, AGENT)
    await rows.log(lease_id, b"a\nb\nc\n")
    following = asyncio.create_task(everything(logs.stream(number, attempt=1, follow=True, tail_lines=1)))
    await listening(bells, number)
    await rows.pool.execute("DELETE FROM lease")
    await rows.attempt(number, lease_id=lease_id, outcome=2)
    await rows.log(lease_id, b"d\n", start=6)
    await rows.ready(number, attempts=1, failures=1, last=lease_id)
    bells.logs.ring(number)
    assert text(await following) == b"c\nd\n"


async def test_bytes_stored_by_another_replica_are_found_by_looking(
    rows: Rows, database: Database, bells: Bells
) -> None:
    session = await rows.agent(AGENT)
    number = await rows.job()
    lease_id = await rows.lease(number, session, AGENT)
    async with aclosing(LogReader(database, bells, poll_s=0.01).stream(number, follow=True)) as pieces:
        reading = asyncio.ensure_future(anext(pieces))
        await listening(bells, number)
        await rows.log(lease_id, b"hello")
        async with asyncio.timeout(60):
            assert (await reading).data == b"hello"


async def test_a_log_that_retention_took_ends(rows: Rows, logs: LogReader) -> None:
    number = await ended_job(rows, b"gone")
    await rows.pool.execute("DELETE FROM log_chunk")
    assert await everything(logs.stream(number, follow=True)) == []
