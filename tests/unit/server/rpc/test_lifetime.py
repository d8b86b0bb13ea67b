"""How long calls live."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from lessor_server.domain.errors import Stopping
from lessor_server.rpc.handlers import Rpc
from lessor_server.rpc.lifetime import CallLifetime

WATCH = Rpc("/x/Watch", request_streaming=False, response_streaming=True)
GET = Rpc("/x/Get", request_streaming=False, response_streaming=False)
CONNECT = Rpc("/x/Connect", request_streaming=True, response_streaming=True)
NO_CONTEXT: Any = None


class Source:
    """Answers that the test hands out, one by one."""

    def __init__(self) -> None:
        self.answers: asyncio.Queue[int] = asyncio.Queue()
        self.waits = asyncio.Event()
        self.is_closed = False

    async def stream(self) -> AsyncGenerator[int, None]:
        try:
            while True:
                self.waits.set()
                answer = await self.answers.get()
                self.waits.clear()
                yield answer
        finally:
            self.is_closed = True

    async def write(self) -> None:
        """A call that writes its stream itself."""
        async for _ in self.stream():
            pass


async def read(lifetime: CallLifetime, source: Source, told: list[int]) -> None:
    async for answer in lifetime.stream(source.stream, NO_CONTEXT, WATCH):
        told.append(answer)


async def test_a_stream_hands_its_answers_on_and_ends() -> None:
    async def three() -> AsyncGenerator[int, None]:
        for number in range(3):
            yield number

    assert [answer async for answer in CallLifetime().stream(three, NO_CONTEXT, WATCH)] == [0, 1, 2]


async def test_a_stream_takes_no_task_of_its_own() -> None:
    lifetime, source, told = CallLifetime(), Source(), list[int]()
    before = len(asyncio.all_tasks())
    reading = asyncio.create_task(read(lifetime, source, told))
    await source.waits.wait()
    assert len(asyncio.all_tasks()) == before + 1
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)


async def test_a_stream_that_waits_ends_when_the_server_stops() -> None:
    lifetime, source, told = CallLifetime(), Source(), list[int]()
    reading = asyncio.create_task(read(lifetime, source, told))
    source.answers.put_nowait(7)
    await source.waits.wait()
    lifetime.stop()
    with pytest.raises(Stopping):
        await reading
    assert source.is_closed
    assert reading.cancelling() == 0


async def test_a_stream_that_is_sending_ends_when_it_asks_for_more() -> None:
    lifetime, source = CallLifetime(), Source()
    answers = lifetime.stream(source.stream, NO_CONTEXT, WATCH)
    source.answers.put_nowait(7)
    assert await anext(answers) == 7
    lifetime.stop()
    source.answers.put_nowait(8)
    with pytest.raises(Stopping):
        await anext(answers)
    assert source.is_closed


async def test_a_stream_that_begins_after_the_stop_is_refused() -> None:
    lifetime, source = CallLifetime(), Source()
    lifetime.stop()
    with pytest.raises(Stopping):
        await anext(lifetime.stream(source.stream, NO_CONTEXT, WATCH))


async def test_a_call_that_writes_its_stream_itself_ends_when_the_server_stops() -> None:
    lifetime, source = CallLifetime(), Source()
    call = asyncio.create_task(lifetime.answer(source.write, NO_CONTEXT, WATCH))
    await source.waits.wait()
    lifetime.stop()
    with pytest.raises(Stopping):
        await call


@pytest.mark.parametrize("also_stops", [False, True])
async def test_a_client_that_goes_away_is_no_stop(also_stops: bool) -> None:
    lifetime, source, told = CallLifetime(), Source(), list[int]()
    reading = asyncio.create_task(read(lifetime, source, told))
    await source.waits.wait()
    reading.cancel()
    if also_stops:
        lifetime.stop()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert source.is_closed
    lifetime.stop()


async def test_a_call_with_one_answer_runs_on_when_its_client_is_gone() -> None:
    begun, go_on, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def commit() -> str:
        begun.set()
        await go_on.wait()
        done.set()
        return "committed"

    call = asyncio.create_task(CallLifetime().answer(commit, NO_CONTEXT, GET))
    await begun.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    go_on.set()
    await done.wait()


async def test_a_call_with_one_answer_is_not_interrupted_by_the_stop() -> None:
    lifetime, begun, go_on = CallLifetime(), asyncio.Event(), asyncio.Event()

    async def commit() -> str:
        begun.set()
        await go_on.wait()
        return "committed"

    call = asyncio.create_task(lifetime.answer(commit, NO_CONTEXT, GET))
    await begun.wait()
    lifetime.stop()
    go_on.set()
    assert await call == "committed"


async def test_an_agents_stream_is_left_to_its_servicer() -> None:
    lifetime, begun, go_on = CallLifetime(), asyncio.Event(), asyncio.Event()

    async def serve() -> None:
        begun.set()
        await go_on.wait()

    call = asyncio.create_task(lifetime.answer(serve, NO_CONTEXT, CONNECT))
    await begun.wait()
    lifetime.stop()
    go_on.set()
    await call
