"""Streams that outlive connections: watches, logs, and the wait for jobs to end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial

from grpc import aio

from lessor.errors import AttemptNotFound, CursorExpired, WaitTimeout
from lessor.sdk.connection import Connection, Outage
from lessor.sdk.jobs import Job, JobChange, LogChunk
from lessor.units import format_duration
from lessor.v1 import job_service_pb2 as pb

MAX_WATCHED = 10_000
"""Jobs one WatchJobs may name."""

_RECHECKED = 100
"""Jobs looked at again per recheck, so that a long list costs no more than a short one."""

_AT_ONCE = 16
"""Calls a wait makes at once."""


async def watch_batches(
    connection: Connection, request: pb.WatchJobsRequest
) -> AsyncGenerator[tuple[JobChange, ...], None]:
    """Yields the changes of each message, empty ones included; resumes after disconnects.

    Raises:
        CursorExpired: Changes were missed and no list of jobs was given whose
            standing the server could tell afresh.
        LessorError: The server refused, or stayed away for the client's timeout.
    """
    request = pb.WatchJobsRequest.FromString(request.SerializeToString())
    outage = Outage(connection, stream=True)
    while True:
        call = connection.jobs.WatchJobs(request)
        try:
            async for message in call:
                outage.over()
                before = request.cursor
                request.cursor = message.cursor or before
                last = len(message.changes) - 1
                # Only after the last change of a message may one resume at its cursor:
                # resuming there after an earlier one would skip the rest.
                yield tuple(
                    JobChange.from_proto(change, request.cursor if index == last else before)
                    for index, change in enumerate(message.changes)
                )
            await outage.failed(None)
        except aio.AioRpcError as error:
            try:
                await outage.failed(error)
            except CursorExpired:
                if not request.job_ids or not request.cursor:
                    raise
                request.cursor = ""
        finally:
            call.cancel()


async def watch_changes(connection: Connection, request: pb.WatchJobsRequest) -> AsyncGenerator[JobChange, None]:
    """Yields changes one by one; see :func:`watch_batches`."""
    async with aclosing(watch_batches(connection, request)) as batches:
        async for batch in batches:
            for change in batch:
                yield change


async def stream_logs(connection: Connection, request: pb.StreamLogsRequest) -> AsyncGenerator[LogChunk, None]:
    """Yields the log that ``request`` asks for, each byte once, across disconnects.

    Until the first chunk the request is repeated as it is. From then on it is
    known which attempt is read and how far: after a disconnect that attempt is
    read on from there and, when all attempts are followed, the later ones one by
    one from their beginning, so that none of them is skipped.
    """
    outage = Outage(connection, stream=True)
    position: LogChunk | None = None
    while True:
        call = connection.jobs.StreamLogs(request)
        try:
            async for message in call:
                outage.over()
                chunk = LogChunk.from_proto(message)
                if position is not None and chunk.attempt == position.attempt:
                    chunk = _after(chunk, position.offset)
                if chunk.data:
                    position = replace(chunk, offset=chunk.offset + len(chunk.data), data=b"")
                    yield chunk
            return
        except aio.AioRpcError as error:
            await outage.failed(error)
        finally:
            call.cancel()
        if position is not None:
            break
    # A fresh generator per attempt: each is asked for by its number from here on.
    attempt, offset = position.attempt, position.offset
    every_attempt = request.follow and not request.attempt
    while True:
        one = pb.StreamLogsRequest(job_id=request.job_id, attempt=attempt, offset=offset, follow=request.follow)
        try:
            async with aclosing(_stream_attempt(connection, one)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except AttemptNotFound:
            # An attempt that never began has no log.
            if not every_attempt:
                raise
        if not every_attempt or not await _later_attempt(connection, request.job_id, attempt):
            return
        attempt, offset = attempt + 1, 0


async def _stream_attempt(connection: Connection, request: pb.StreamLogsRequest) -> AsyncGenerator[LogChunk, None]:
    """Yields the log of one attempt from an offset on."""
    outage = Outage(connection, stream=True)
    request = pb.StreamLogsRequest.FromString(request.SerializeToString())
    while True:
        call = connection.jobs.StreamLogs(request)
        try:
            async for message in call:
                outage.over()
                chunk = LogChunk.from_proto(message)
                if chunk.attempt == request.attempt:
                    chunk = _after(chunk, request.offset)
                    request.offset = max(request.offset, chunk.offset + len(chunk.data))
                    if chunk.data:
                        yield chunk
            return
        except aio.AioRpcError as error:
            await outage.failed(error)
        finally:
            call.cancel()


async def _later_attempt(connection: Connection, job_id: str, attempt: int) -> bool:
    """Waits until the job has an attempt after ``attempt`` or is terminal; returns whether it has one."""
    request = pb.WatchJobsRequest(job_ids=[job_id])
    async with aclosing(watch_changes(connection, request)) as changes:
        async for change in changes:
            if change.attempt > attempt:
                return True
            if change.state is not None and change.state.is_terminal:
                return False
    raise AssertionError("a watch ends only by an error")


def _after(chunk: LogChunk, offset: int) -> LogChunk:
    """Returns ``chunk`` without the bytes before ``offset``, which were yielded already."""
    seen = offset - chunk.offset
    return (
        replace(chunk, offset=chunk.offset + min(seen, len(chunk.data)), data=chunk.data[seen:]) if seen > 0 else chunk
    )


async def wait_for_end(
    connection: Connection,
    job_ids: Sequence[str],
    get: Callable[[str], Awaitable[Job]],
    *,
    give_up_after: timedelta | None,
    recheck: timedelta,
) -> list[Job]:
    """Returns the jobs, in the order asked for, once all are terminal.

    It watches: the first message of a watch tells where each job stands, so no
    end falls between. Every ``recheck`` without an end it also looks at some of
    the jobs itself. Each job is looked at once before ``give_up_after`` counts;
    that look may take as long as a call.

    Raises:
        JobNotFound: One of them does not exist.
        WaitTimeout: ``give_up_after`` passed; says which are still going.
    """
    ended: dict[str, Job] = {}
    unique = list(dict.fromkeys(job_ids))
    loop = asyncio.get_running_loop()
    deadline = None if give_up_after is None else loop.time() + give_up_after.total_seconds()
    for start in range(0, len(unique), MAX_WATCHED):
        some = unique[start : start + MAX_WATCHED]
        if deadline is None:
            await _wait_for_some(connection, some, get, ended, recheck)
            continue
        limit = asyncio.timeout_at(max(deadline, loop.time() + connection.budget().total_seconds()))
        with suppress(TimeoutError):
            async with limit:
                await _wait_for_some(connection, some, get, ended, recheck, partial(limit.reschedule, deadline))
    pending = [job_id for job_id in unique if job_id not in ended]
    if pending:
        patience = format_duration(give_up_after or timedelta(0))
        raise WaitTimeout(
            f"{len(pending)} of {len(unique)} jobs had not ended within {patience}: {some_of(pending)}",
            pending=pending,
            ended=[ended[job_id] for job_id in unique if job_id in ended],
        )
    return [ended[job_id] for job_id in job_ids]


def some_of(job_ids: Sequence[str]) -> str:
    """Returns the first few of ``job_ids`` for a message, and how many more there are."""
    return ", ".join(job_ids[:5]) + (f" and {len(job_ids) - 5} more" if len(job_ids) > 5 else "")


async def _wait_for_some(
    connection: Connection,
    job_ids: Sequence[str],
    get: Callable[[str], Awaitable[Job]],
    ended: dict[str, Job],
    recheck: timedelta,
    looked: Callable[[], None] | None = None,
) -> None:
    """Adds the jobs to ``ended`` as they end; calls ``looked`` once it has seen where each of them stands."""
    pending = dict.fromkeys(job_ids)
    slots = asyncio.Semaphore(_AT_ONCE)

    async def look_at(job_id: str) -> None:
        async with slots:
            job = await get(job_id)
        if job.state.is_terminal:
            ended[job_id] = job
            pending.pop(job_id, None)

    async def look_at_all(some: Iterable[str]) -> None:
        tasks = [asyncio.create_task(look_at(job_id)) for job_id in some]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    batches = watch_batches(connection, pb.WatchJobsRequest(job_ids=job_ids))
    upcoming: asyncio.Task[tuple[JobChange, ...]] | None = None
    first = True
    try:
        while pending:
            if upcoming is None:
                upcoming = asyncio.ensure_future(anext(batches))
            await asyncio.wait({upcoming}, timeout=recheck.total_seconds())
            if upcoming.done():
                batch = upcoming.result()
                upcoming = None
                over = {change.job_id for change in batch if change.state is not None and change.state.is_terminal}
                await look_at_all(over & pending.keys())
                if first:
                    # Whom the server does not mention it may not know: get says so.
                    told = {change.job_id for change in batch}
                    await look_at_all([job_id for job_id in pending if job_id not in told])
                    first = False
                    if pending and looked is not None:
                        looked()
            else:
                some = list(pending)[:_RECHECKED]
                for job_id in some:
                    pending[job_id] = pending.pop(job_id)
                await look_at_all(some)
    finally:
        if upcoming is not None:
            upcoming.cancel()
            await asyncio.wait({upcoming})
        await batches.aclose()
