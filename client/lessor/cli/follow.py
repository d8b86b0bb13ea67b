"""Follows one job to its end for ``lessor run``."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lessor.cli.screen import View
from lessor.errors import LessorError
from lessor.sdk.aio import AsyncClient
from lessor.sdk.enums import JobState
from lessor.sdk.jobs import Job

if TYPE_CHECKING:
    from collections.abc import Iterator

INTERRUPTED = 130
"""Exit code of a command ended by Ctrl-C (128 + SIGINT)."""


@dataclass(frozen=True, slots=True)
class Pace:
    """When following says or does something by itself."""

    explain_after: timedelta = timedelta(seconds=2)
    """A job that waits so long is explained."""
    explain_every: timedelta = timedelta(seconds=10)
    drain: timedelta = timedelta(seconds=15)
    """How long the rest of the log may take after the job is terminal."""


class Interrupts:
    """Counts Ctrl-C: the first asks, the second leaves."""

    def __init__(self) -> None:
        """Nothing pressed yet."""
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def press(self) -> None:
        """One Ctrl-C."""
        (self.second if self.first.is_set() else self.first).set()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes SIGINT for as long as the block runs."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self.press)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGINT)


class Follower:
    """Shows what happens to one job until it ends, or its watcher leaves."""

    def __init__(
        self,
        client: AsyncClient,
        job_id: str,
        view: View,
        interrupts: Interrupts,
        *,
        can_ask: bool,
        pace: Pace = Pace(),
    ) -> None:
        """Prepares to follow.

        Args:
            client: Open.
            job_id: Whom to follow.
            view: Where to show it.
            interrupts: Being listened to.
            can_ask: Someone at a terminal can answer a question.
            pace: When to explain.
        """
        self._client = client
        self._job_id = job_id
        self._view = view
        self._interrupts = interrupts
        self._can_ask = can_ask
        self._pace = pace
        self._state: JobState | None = None
        self._moved = asyncio.Event()
        self._shown = asyncio.Event()
        self._shown.set()

    async def follow(self) -> int:
        """Returns the exit code: the job's own, or 130 when its watcher left or cancelled it.

        Raises:
            LessorError: The server stayed away too long.
        """
        ending = asyncio.create_task(self._to_the_end())
        first = asyncio.create_task(self._interrupts.first.wait())
        second = asyncio.create_task(self._interrupts.second.wait())
        try:
            await asyncio.wait({ending, first}, return_when=asyncio.FIRST_COMPLETED)
            if not ending.done() and not await self._handle_interrupt(ending, second):
                self._view.note(
                    f"the job goes on: `lessor logs -f {self._job_id}` follows it, "
                    f"`lessor cancel {self._job_id}` stops it"
                )
                return INTERRUPTED
            job = await ending
            self._view.ended(job)
            return job.exit_status
        finally:
            await _end_all(ending, first, second)

    async def _handle_interrupt(self, ending: asyncio.Task[Job], second: asyncio.Task[bool]) -> bool:
        """Asks what to do, and does it; returns whether the job is still followed to its end."""
        if not self._can_ask:
            return False
        self._shown.clear()
        asking = asyncio.create_task(self._ask())
        try:
            await asyncio.wait({asking, second, ending}, return_when=asyncio.FIRST_COMPLETED)
            if second.done():
                return False
            if not ending.done():
                if not asking.result():
                    return False
                await self._client.cancel(self._job_id)
                self._view.note("cancelling; Ctrl-C leaves at once")
        finally:
            self._shown.set()
            await _end_all(asking)
        await asyncio.wait({ending, second}, return_when=asyncio.FIRST_COMPLETED)
        return ending.done()

    async def _ask(self) -> bool:
        """Returns whether to cancel; anything but a "c" detaches."""
        self._view.note("Ctrl-C: [d]etach (the job goes on) or [c]ancel it?")
        line = await _line_of_stdin()
        return line.strip().lower().startswith("c")

    async def _to_the_end(self) -> Job:
        logs = asyncio.create_task(self._show_logs())
        watch = asyncio.create_task(self._show_changes())
        explain = asyncio.create_task(self._explain_while_waiting())
        try:
            await asyncio.wait({logs, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()
                await asyncio.wait({logs}, timeout=self._pace.drain.total_seconds())
                if not logs.done():
                    self._view.note("the end of the log did not come in time")
                else:
                    logs.result()
            else:
                logs.result()
                await watch
            return await self._client.get(self._job_id)
        finally:
            await _end_all(logs, watch, explain)

    async def _show_logs(self) -> None:
        async with aclosing(self._client.logs(self._job_id, follow=True)) as chunks:
            async for chunk in chunks:
                await self._shown.wait()
                self._view.log(chunk)

    async def _show_changes(self) -> None:
        """Shows changes until the job is terminal."""
        seen: tuple[JobState | None, int] | None = None
        shown: tuple[JobState, int] | None = None
        async with aclosing(self._client.watch([self._job_id], include_progress=True)) as changes:
            async for change in changes:
                await self._shown.wait()
                if change.progress is not None:
                    self._view.progressed(self._job_id, change.progress)
                if (change.state, change.attempt) == seen:
                    continue
                seen = (change.state, change.attempt)
                self._state = change.state
                self._moved.set()
                if change.state is not None and change.state.is_terminal:
                    return
                job = await self._client.get(self._job_id)
                # The job may have moved on since the change; its next change then tells nothing new.
                if (job.state, job.attempt) != shown and not job.state.is_terminal:
                    shown = (job.state, job.attempt)
                    self._view.changed(job)

    async def _explain_while_waiting(self) -> None:
        last = ""
        while True:
            self._moved.clear()
            patience = self._pace.explain_every if last else self._pace.explain_after
            with suppress(TimeoutError):
                # Not wait_for: on Python 3.11 it loses a cancel that comes with the event.
                async with asyncio.timeout(patience.total_seconds()):
                    await self._moved.wait()
                continue
            if self._state not in (JobState.QUEUED, JobState.LEASED):
                continue
            # A server that is away is told by the streams, which wait for it longer.
            with suppress(LessorError):
                explained = await self._client.explain(self._job_id)
                text = str(explained.explanations)
                if text != last:
                    await self._shown.wait()
                    self._view.explained(self._job_id, explained)
                last = text


async def _line_of_stdin() -> str:
    """Reads a line from the terminal without a thread, which a Ctrl-C could not end."""
    loop = asyncio.get_running_loop()
    descriptor = sys.stdin.fileno()
    ready: asyncio.Future[bytes] = loop.create_future()

    def read() -> None:
        if not ready.done():
            try:
                ready.set_result(os.read(descriptor, 4096))
            except OSError:
                ready.set_result(b"")

    loop.add_reader(descriptor, read)
    try:
        return (await ready).decode(errors="replace")
    finally:
        loop.remove_reader(descriptor)


async def _end_all(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
