"""An event loop for one simulated process: production code runs on it unchanged, in virtual time.

There is one loop per process, with the process's own clock. Nothing waits in it:
callbacks run until none is ready, timers are events of the scheduler, and the
outside world (network, database, other processes) reaches it by :meth:`ProcessLoop.run`.
"""

from __future__ import annotations

import asyncio
import contextvars
from asyncio import _set_running_loop
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar, TypeVarTuple

from tests.simulation.scheduler import SECOND_NS, Event, Process, Scheduler, Violation

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

MAX_TURNS = 100_000
"""Callbacks that one step may lead to; a process that needs more spins."""


class _Turn(asyncio.TimerHandle):
    """A callback that waits for its turn."""

    def __init__(
        self,
        when_s: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        loop: ProcessLoop,
        context: contextvars.Context | None,
    ) -> None:
        super().__init__(when_s, callback, args, loop, context)
        self._simulated = (callback, args, context or contextvars.copy_context())
        self.event: Event | None = None

    def run(self) -> None:
        callback, args, context = self._simulated
        context.run(callback, *args)

    def cancel(self) -> None:
        if self.event is not None:
            self.event.cancelled = True
        super().cancel()


class ProcessLoop(asyncio.BaseEventLoop):
    """The event loop of one life of a process."""

    def __init__(self, scheduler: Scheduler, process: Process) -> None:
        # Asked for while the loop is being made.
        self._over = self._runs = False
        super().__init__()
        self._scheduler = scheduler
        self._process = process
        self._life = process.life
        self._turns: deque[_Turn] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()

    def run(self, act: Callable[[], None]) -> None:
        """Does ``act`` on this loop, and then all that becomes ready by it."""
        if self._runs:
            act()
            return
        self._runs = True
        _set_running_loop(self)
        try:
            act()
            turns = 0
            while self._turns:
                turn = self._turns.popleft()
                if not turn.cancelled():
                    turn.run()
                turns += 1
                if turns > MAX_TURNS:
                    raise Violation(f"{self._process.name} spins: {MAX_TURNS} callbacks without anything happening")
        finally:
            _set_running_loop(None)
            self._runs = False

    def wind_up(self) -> None:
        """Ends all tasks, after the run or long after the crash: nothing of them is heard any more."""

        def cancel() -> None:
            for task in list(self._tasks):
                task.cancel()

        for _ in range(20):
            if not self._tasks:
                break
            self.run(cancel)
        self._turns.clear()
        self._over = True

    # ── what asyncio asks of a loop ──────────────────────────────────────────

    def time(self) -> float:
        return self._process.clock.local_ns(self._scheduler.now_ns) / SECOND_NS

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        turn = _Turn(0.0, callback, args, self, context)
        self._turns.append(turn)
        return turn

    def call_later(
        self,
        delay: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        turn = _Turn(when, callback, args, self, context)
        if self._process.life == self._life:
            due_ns = self._process.clock.real_ns(int(when * SECOND_NS) + 1)
            turn.event = self._scheduler.at(due_ns, "", lambda: self.run(turn.run), self._process)
        return turn

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        *,
        name: Any = None,
        context: Any = None,
    ) -> asyncio.Task[T]:
        task: asyncio.Task[T] = asyncio.Task(coro, loop=self, name=name, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Told of errors that nobody has asked for, whenever garbage is collected; those of callbacks are raised."""

    def is_running(self) -> bool:
        return self._runs

    def is_closed(self) -> bool:
        return self._over

    def get_debug(self) -> bool:
        return False

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Told by asyncio's handles; the event was cancelled with it."""
