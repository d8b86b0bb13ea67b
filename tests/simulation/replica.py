"""A server process: the production services on a simulated database, network and clock."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, cast

from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import job_pb2
from lessor_agent.protocol.core import Loss
from lessor_server.bells import Bells
from lessor_server.domain.errors import LessorServerError
from lessor_server.maintenance.leadership import Leadership
from lessor_server.maintenance.reaper import Reaper
from lessor_server.planner.model import Policy
from lessor_server.services.jobs import Jobs
from lessor_server.services.lines import Lines
from lessor_server.services.picture import Picture
from lessor_server.services.planning import Planning
from lessor_server.sessions.commits import AgentCommits
from lessor_server.sessions.delivery import Delivery
from lessor_server.sessions.readings import GpuReadings
from lessor_server.sessions.servicer import AgentServicer
from lessor_server.sessions.stream import Streams
from lessor_server.store.catalog import Catalog
from lessor_server.store.database import Database
from tests.simulation.network import ServerEnd, Stream
from tests.simulation.pools import SimulatedPool
from tests.simulation.postgres import SimulatedPostgres
from tests.simulation.process_loop import ProcessLoop
from tests.simulation.scheduler import Process, Scheduler, Violation

_WAKE_UP_LOST = 0.1
"""A replica's word to the others that something has changed is lost this often; they poll."""


class Replica:
    """A server process that can crash and start again. What it knows is gone then."""

    def __init__(self, name: str, scheduler: Scheduler, postgres: SimulatedPostgres) -> None:
        self.process = Process(name, scheduler.a_clock())
        self._scheduler = scheduler
        self._postgres = postgres
        self.others: Sequence[Replica] = ()
        self.loops: list[ProcessLoop] = []
        """Of all its lives, to be wound up."""
        self.quick = False
        """It ticks as often as the shipped server does; else seldomer, which saves steps."""
        self.urgent: Callable[[], bool] = lambda: False
        """A lease may run out soon: the reaper looks as often as the shipped one."""
        self._wakes = False
        self._ends: dict[_Handler, None] = {}

    @property
    def loop(self) -> ProcessLoop:
        """The loop of its present life."""
        return self.loops[-1]

    def start(self) -> None:
        """Starts it."""
        process = self.process
        process.begin_life()
        self._scheduler.note(f"{process.name} starts")
        loop = ProcessLoop(self._scheduler, process)
        self.loops.append(loop)
        self._ends.clear()
        self._wakes = False
        loop.run(self._build)

    def crash(self) -> None:
        """Ends it with SIGKILL."""
        self._scheduler.note(f"{self.process.name} crashes")
        self.process.end_life()
        for end in list(self._ends):
            end.stream.replica_is_gone()
        self._postgres.forget(self.process)

    def _build(self) -> None:
        process, scheduler = self.process, self._scheduler
        pool = cast("Any", SimulatedPool(self._postgres, process, self.loop))
        database = Database("postgresql://simulated", pool, pool, pool, cast("Any", None))
        bells = Bells()
        bells.on_changed = self._wake_others
        catalog = Catalog(database)
        streams = Streams()
        delivery = Delivery(database, streams, bells)
        policy = Policy()
        lines = Lines(database, catalog, bells)
        picture = Picture(database, bells, policy)
        clock = process.clock
        name = f"{process.name}-{process.life}"
        leadership = Leadership(database, name, lambda: clock.local_ns(scheduler.now_ns) / 1e9)
        self._bells = bells
        self.leadership = leadership
        self.jobs = Jobs(database, catalog, bells, lines)
        commits = AgentCommits(database, bells, picture)
        self.servicer = AgentServicer(database, streams, commits, delivery, GpuReadings(database), bells, process.name)
        planning = Planning(database, leadership, picture, lines, delivery, bells, policy=policy)
        reaper = Reaper(database, leadership, bells)
        self.jobs.start()
        commits.start()
        for name, work in {
            "leadership": self._repeat(leadership.step),
            "reaper": self._while_leading(reaper),
            "planning": planning.run(),
            "delivery": delivery.run(),
        }.items():
            self.spawn(name, work)

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Runs work that is not to fail: as in the server, a part that breaks is a broken invariant."""
        life = self.process.life

        def over(task: asyncio.Task[None]) -> None:
            if self.process.life == life and not task.cancelled() and task.exception() is not None:
                raise Violation(f"{self.process.name}: {name} has failed: {task.exception()!r}") from task.exception()

        self.loop.create_task(work, name=name).add_done_callback(over)

    async def _repeat(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            await step()
            span_s = (0.5, 1.0) if self.leadership.epoch is not None else (0.7, 1.4)
            await asyncio.sleep(0.25 if self.quick else self._scheduler.random.uniform(*span_s))

    async def _while_leading(self, reaper: Reaper) -> None:
        while True:
            await self.leadership.gained.wait()
            try:
                await reaper.step()
            except LessorServerError:
                self._scheduler.note(f"{self.process.name}: the reaper waits for the database")
            often = self.quick or self.urgent()
            await asyncio.sleep(0.25 if often else self._scheduler.random.uniform(0.3, 3.0))

    def _wake_others(self) -> None:
        """As the wake-ups do: coalesced, and lost now and then."""
        if self._wakes or self._postgres.closed:
            return
        self._wakes = True
        process, scheduler = self.process, self._scheduler

        def tell() -> None:
            self._wakes = False
            for other in self.others:
                if other.process.alive and not scheduler.chance(_WAKE_UP_LOST):
                    scheduler.after(scheduler.spread_ns(0.01, 0.5, 0.05), "", other.hear, other.process)

        scheduler.after(20_000_000, "", tell, process)

    def hear(self) -> None:
        """Another replica says that something has changed."""

        def ring() -> None:
            bells = self._bells
            for bell in (bells.waiting, bells.fleet, bells.planning, bells.events, bells.grants):
                bell.ring()

        self.loop.run(ring)

    # ── what comes from outside ──────────────────────────────────────────────

    def accept(self, stream: Stream) -> ServerEnd:
        """Takes a new stream; see :class:`tests.simulation.network.Door`."""
        handler = _Handler(self, stream)
        self._ends[handler] = None
        self.loop.run(handler.begin)
        return handler

    def submit(self, request_id: str, specs: Sequence[job_pb2.JobSpec],
               then: Callable[[list[int] | None], None]) -> None:  # fmt: skip
        """Has jobs submitted; ``then`` is told their numbers, or None: the outcome is unknown."""

        async def work() -> None:
            try:
                submitted = await self.jobs.submit("user", request_id, [_copy(spec) for spec in specs])
            except LessorServerError:
                then(None)
            else:
                then(submitted.job_numbers)

        self.loop.run(lambda: self.spawn("submit", work()))

    def cancel(self, job_numbers: Sequence[int], then: Callable[[list[int] | None], None]) -> None:
        """Has jobs cancelled; ``then`` is told what became of each, or None: the outcome is unknown."""

        async def work() -> None:
            try:
                results = await self.jobs.cancel(job_numbers)
            except LessorServerError:
                then(None)
            else:
                then(results)

        self.loop.run(lambda: self.spawn("cancel", work()))

    def ended(self, handler: _Handler) -> None:
        """A stream's handler has ended."""
        self._ends.pop(handler, None)


class _Handler:
    """The server's end of one stream: production's handler, its requests and its context."""

    def __init__(self, replica: Replica, stream: Stream) -> None:
        self._replica = replica
        self._life = replica.process.life
        self.stream = stream
        self._requests: deque[pb.ConnectRequest | None] = deque()
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Starts the handler."""
        work = self._replica.servicer.Connect(self._read(), cast("Any", self))
        self._task = self._replica.loop.create_task(work, name=f"connect-{self.stream.label}")
        self._task.add_done_callback(self._over)

    async def _read(self) -> Any:
        while True:
            while not self._requests:
                await self._news.wait()
                self._news.clear()
            request = self._requests.popleft()
            if request is None:
                return
            yield request

    # What production asks of a gRPC context.

    def peer(self) -> str:
        """Returns who is at the other end."""
        return self.stream.label

    async def write(self, message: pb.ConnectResponse) -> None:
        """Sends a message."""
        if self._replica.process.life == self._life:
            self.stream.say(message)

    def _over(self, task: asyncio.Task[None]) -> None:
        if self._replica.process.life != self._life:
            return
        self._replica.ended(self)
        loss = Loss("the server ended the stream")
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, LessorServerError):
                loss = Loss(error.message, error.reason)
            elif isinstance(error, TimeoutError):
                loss = Loss("no Hello came in time")
            else:
                raise Violation(f"{self.stream.label}: the handler has failed: {error!r}") from error
        self.stream.end(loss)

    # What the network says.

    def message(self, message: pb.ConnectRequest) -> None:
        """See :class:`tests.simulation.network.ServerEnd`."""
        self._put(message)

    def half_closed(self) -> None:
        """See :class:`tests.simulation.network.ServerEnd`."""
        self._put(None)

    def cut(self) -> None:
        """See :class:`tests.simulation.network.ServerEnd`: gRPC cancels the handler."""
        task = self._task
        if task is not None and self._replica.process.life == self._life:
            self._replica.loop.run(lambda: _cancel(task))

    def _put(self, request: pb.ConnectRequest | None) -> None:
        if self._replica.process.life == self._life:
            self._requests.append(request)
            self._replica.loop.run(self._news.set)


def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()


def _copy(spec: job_pb2.JobSpec) -> job_pb2.JobSpec:
    copy = job_pb2.JobSpec()
    copy.CopyFrom(spec)
    return copy
