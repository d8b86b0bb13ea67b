"""Carries out what the protocol core asks for, and tells it what happens on the host.

Everything runs on one event loop; what can block (the journal, the disk, NVML)
runs in threads, so that a heartbeat waits for none of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import job_pb2
from lessor_agent.adoption import Adopted, end_strays
from lessor_agent.boottime import boottime_ns
from lessor_agent.journal import Journal
from lessor_agent.logs import Look, OutputReader, OutputWatcher
from lessor_agent.protocol import actions as act
from lessor_agent.protocol.core import AgentCore, Loss
from lessor_agent.protocol.lease import duration
from lessor_agent.protocol.outcomes import Ending, job_error, timestamp
from lessor_agent.runtimes.base import (
    Execution,
    ExecutionVanished,
    Exit,
    OnLost,
    Runtime,
    StartRefused,
    StartRequest,
    StopCause,
)
from lessor_agent.stream import Streams
from lessor_agent.workload_events import EventReader, News

log = logging.getLogger(__name__)

COALESCE_S = 0.01
"""Output of one job is looked at this often at most."""

MAX_TIMER_S = 1.0
"""The loop's clock stands still while the host is suspended: look at the real one this often."""

EXIT_GRACE = timedelta(seconds=2)
"""From SIGTERM to SIGKILL for the jobs that a stopping agent takes along."""

MAX_LOG_MESSAGE_BYTES = 256 * 1024
"""Log bytes per message: what a heartbeat may have to wait behind."""

HEAR_OF_ENDS_S = 3.0
"""What jobs wrote that ended while no agent was here is read for so long, at most, before the first Hello."""

MAX_SHORT_LOOKS = 20
SHORT_LOOK_PAUSE_S = 0.5
"""What an ended job wrote is looked for this often, and with this pause, while the host lacks file descriptors."""

T = TypeVar("T")

ReadGpus = Callable[[], Sequence[pb.GpuReading]]
"""Reads all GPUs; may block."""


@dataclass(slots=True)
class Attempt:
    """One execution in the supervisor's hands."""

    execution: Execution
    output: OutputReader
    events: EventReader
    rebooted: bool
    unwatch: Callable[[], None]
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    follower: asyncio.Task[None] | None = None
    """Reports what it writes, and its end."""
    over: asyncio.Event = field(default_factory=asyncio.Event)
    exit: Exit | None = None
    """How it ended, once ``over`` is set; None then: nobody knows."""


class Supervisor:
    """Runs the agent: core, stream, journal, executions."""

    def __init__(
        self,
        core: AgentCore,
        *,
        streams: Streams,
        journal: Journal,
        runtimes: Mapping[str, Runtime],
        adopted: Adopted,
        read_gpus: ReadGpus,
        gpu_interval_s: float,
        keeps_jobs: bool = True,
        clock_ns: Callable[[], int] = boottime_ns,
    ) -> None:
        """Makes a supervisor over open parts; :meth:`run` closes none of them but ``streams``.

        Args:
            core: The protocol core, made from ``adopted.restored``.
            streams: The connection.
            journal: Open, or failed to open: then it refuses what it is given.
            runtimes: Name → open runtime.
            adopted: What was found on the host.
            read_gpus: Reads the GPUs, in a thread.
            gpu_interval_s: How often.
            keeps_jobs: Jobs go on when it is told to stop; False: they end with it.
            clock_ns: CLOCK_BOOTTIME.
        """
        self._core = core
        self._streams = streams
        self._journal = journal
        self._runtimes = runtimes
        self._adopted = adopted
        self._read_gpus = read_gpus
        self._gpu_interval_s = gpu_interval_s
        self._keeps_jobs = keeps_jobs
        self._clock_ns = clock_ns
        self._attempts: dict[int, Attempt] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ns = 0
        self._release_waits = False
        self._perform: dict[type[act.Action], Callable[[Any], object]] = {
            act.Send: self._send,
            act.SendLog: self._send_log,
            act.Journal: lambda action: journal.submit(action.ticket, action.entries, self._journal_done),
            act.Renew: self._renew,
            act.Prepare: lambda action: self._spawn(self._prepare(action), f"prepare-{action.lease_id}"),
            act.Begin: lambda action: self._spawn(self._begin(action.lease_id), f"begin-{action.lease_id}"),
            act.Stop: lambda action: self._spawn(self._stop_execution(action), f"stop-{action.lease_id}"),
            act.Forget: lambda action: self._spawn(self._forget(action.lease_id), f"forget-{action.lease_id}"),
            act.OpenStream: lambda action: streams.open(action.stream_id, self),
            act.CloseStream: lambda action: streams.close(action.stream_id),
            act.GiveUp: self._give_up,
        }
        self._stopping = asyncio.Event()
        self._exit_code = 0
        self._crash: BaseException | None = None
        self._logs: deque[act.SendLog] = deque()
        self._logs_waiting = asyncio.Event()

    async def run(self) -> int:
        """Serves until :meth:`stop` or a refusal that nothing can heal; returns the exit code.

        Executions go on under their keepers when it returns, or is cancelled.
        """
        self._loop = asyncio.get_running_loop()
        self._watcher = OutputWatcher()
        # One thread: an output file is never closed while it is being read.
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk")
        try:
            for lease_id, execution in self._adopted.stuck.items():
                self._spawn(self._await_stray(lease_id, execution), f"stray-{lease_id}")
            self._spawn(self._send_logs(), "log-sender")
            self._spawn(self._watch_gpus(), "gpus")
            self._core.hold()
            self._do(self._core.restore(self._clock_ns()))
            for lease_id, execution in self._adopted.executions.items():
                self._attend(lease_id, execution, rebooted=self._adopted.rebooted)
            if not self._stopping.is_set():
                self._do(self._core.start(self._clock_ns()))
            await self._stopping.wait()
            if self._crash is None and not self._keeps_jobs:
                await self._end_jobs()
        finally:
            await self._wind_up()
        if self._crash is not None:
            raise self._crash
        return self._exit_code

    def stop(self, reason: str) -> None:
        """Has :meth:`run` say Goodbye and return; jobs go on, unless the agent takes them along."""
        if not self._stopping.is_set():
            fields = {"event": "stopping", "reason": reason, "leases": len(self._core.leases)}
            if self._keeps_jobs:
                log.info("agent stops; its jobs go on under their keepers until their leases run out", extra=fields)
            else:
                log.info("agent stops and ends its jobs", extra=fields)
            self._do(self._core.shutdown(reason, self._clock_ns()))
            self._stopping.set()

    # ── the stream's listener ────────────────────────────────────────────────

    def stream_opened(self, stream_id: int) -> None:
        """See :class:`lessor_agent.stream.StreamListener`."""
        self._once_ends_are_heard(lambda: self._core.stream_opened(stream_id, self._clock_ns()))

    def stream_message(self, stream_id: int, message: pb.ConnectResponse) -> None:
        """See :class:`lessor_agent.stream.StreamListener`."""
        if message.HasField("hello_requested"):
            self._once_ends_are_heard(lambda: self._core.message(stream_id, message, self._clock_ns()))
        else:
            self._do(self._core.message(stream_id, message, self._clock_ns()))

    def _once_ends_are_heard(self, leads_to_hello: Callable[[], Sequence[act.Action]]) -> None:
        """Has what ended be known before a Hello.

        An agent that was not there, or stood still, has not read yet what ended
        meanwhile. Where a lease has expired and its job waits again, the Hello that says
        so keeps the job from being given to somebody else before its end is told.
        """
        followers = (attempt.follower for attempt in self._attempts.values() if attempt.execution.ended)
        over = [follower for follower in followers if follower is not None and not follower.done()]
        if not over:
            self._do(leads_to_hello())
            return

        async def later() -> None:
            await asyncio.wait(over, timeout=HEAR_OF_ENDS_S)
            self._do(leads_to_hello())

        self._spawn(later(), "hello")

    def stream_lost(self, stream_id: int, loss: Loss) -> None:
        """See :class:`lessor_agent.stream.StreamListener`."""
        self._do(self._core.stream_lost(stream_id, loss, self._clock_ns()))

    # ── actions ──────────────────────────────────────────────────────────────

    def _do(self, actions: Sequence[act.Action]) -> None:
        """Carries out what an input led to at once, a heartbeat say.

        The inputs of one turn of the event loop are one burst of the core: the
        rest comes with its release, at the beginning of the next turn.
        """
        for action in actions:
            self._perform[type(action)](action)
        if not self._release_waits:
            self._release_waits = True
            self._loop.call_soon(self._release)

    def _release(self) -> None:
        self._release_waits = False
        try:
            actions = self._core.release(self._clock_ns())
            self._core.hold()
            for action in actions:
                self._perform[type(action)](action)
            self._schedule()
        except Exception as failure:
            self._end_loudly(failure)

    def _send(self, action: act.Send) -> None:
        self._streams.send(action.stream_id, action.message, urgent=action.urgent)

    def _send_log(self, action: act.SendLog) -> None:
        self._logs.append(action)
        self._logs_waiting.set()

    def _renew(self, action: act.Renew) -> None:
        if (attempt := self._attempts.get(action.lease_id)) is not None:
            attempt.execution.renew(action.deadline_ns)

    def _give_up(self, action: act.GiveUp) -> None:
        log.error("the server refuses this agent", extra={"event": "refused", "error": action.message})
        self._exit_code = 1
        self._stopping.set()

    def _schedule(self) -> None:
        wakeup_ns = self._core.next_wakeup_ns()
        if wakeup_ns is None or self._stopping.is_set():
            return
        if self._timer is not None:
            if self._timer_ns <= wakeup_ns:
                # It rings early, finds nothing to do, and is set again: cheaper than one timer per input.
                return
            self._timer.cancel()
        self._timer_ns = wakeup_ns
        delay_s = (wakeup_ns - self._clock_ns()) / 1e9
        self._timer = self._loop.call_later(min(max(delay_s, 0.0), MAX_TIMER_S), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._do(self._core.tick(self._clock_ns()))

    def _journal_done(self, ticket: int, error: str | None) -> None:
        """Comes in the journal's thread."""
        try:
            self._loop.call_soon_threadsafe(self._journal_settled, ticket, error)
        except RuntimeError:
            # The loop is closed: the agent has left, and reads the journal when it comes back.
            log.debug("journal settled after the end", extra={"event": "journal_late", "ticket": ticket})

    def _journal_settled(self, ticket: int, error: str | None) -> None:
        if error is None:
            self._do(self._core.journal_committed(ticket, self._clock_ns()))
        else:
            self._do(self._core.journal_failed(ticket, error, self._clock_ns()))

    # ── executions ───────────────────────────────────────────────────────────

    async def _prepare(self, action: act.Prepare) -> None:
        runtime = self._runtimes[action.runtime]
        try:
            request = start_request(action.grant, action.deadline_ns, can_freeze=runtime.capabilities.can_freeze)
            execution = await runtime.prepare(request)
        except StartRefused as refusal:
            error = job_error(job_pb2.ERROR_CLASS_INFRASTRUCTURE, "START_REFUSED", str(refusal), retryable=True)
            self._do(self._core.prepare_refused(action.lease_id, error, self._clock_ns()))
        except Exception as failure:
            # Whatever went wrong, it must not cost the slot: end what may stand, then say that nothing does.
            log.exception(
                "the runtime failed to prepare a job", extra={"event": "prepare", "lease_id": action.lease_id}
            )
            for stuck in (await end_strays(runtime, set(), only=action.lease_id)).values():
                await self._outlast(stuck)
            message = f"{type(failure).__name__}: {failure}"
            error = job_error(job_pb2.ERROR_CLASS_INFRASTRUCTURE, "PREPARE_FAILED", message, retryable=True)
            self._do(self._core.prepare_refused(action.lease_id, error, self._clock_ns()))
        else:
            self._attend(action.lease_id, execution, rebooted=False)
            self._do(self._core.prepared(action.lease_id, execution.handle, self._clock_ns()))

    async def _begin(self, lease_id: int) -> None:
        attempt = self._attempts.get(lease_id)
        if attempt is None:
            return
        try:
            runs = await attempt.execution.begin()
        except Exception:
            log.exception("the runtime failed to begin a job", extra={"event": "begin", "lease_id": lease_id})
            await attempt.execution.stop(StopCause.KEEPER_DIED)
            return
        if runs:
            self._do(self._core.running(lease_id, datetime.now(UTC), self._clock_ns()))

    async def _stop_execution(self, action: act.Stop) -> None:
        attempt = self._attempts.get(action.lease_id)
        if attempt is not None:
            await attempt.execution.stop(action.cause, action.grace)

    async def _await_stray(self, lease_id: int, execution: Execution) -> None:
        await self._outlast(execution)
        log.info("execution without a lease has ended", extra={"event": "stray_ended", "lease_id": lease_id})
        self._do(self._core.decided(lease_id, self._clock_ns()))

    async def _outlast(self, execution: Execution) -> None:
        """Returns once nothing of ``execution`` runs, its files removed as far as that is possible."""
        with contextlib.suppress(ExecutionVanished):
            await execution.wait()
        try:
            await execution.forget()
        except Exception:
            log.exception("files of an ended job remain", extra={"event": "forget", "lease_id": execution.lease_id})

    async def _end_jobs(self) -> None:
        """Ends what runs. Its outcome is on disk: the next agent of this state directory reports it."""
        executions = [attempt.execution for attempt in self._attempts.values()]
        for execution in executions:
            await execution.stop(StopCause.AGENT_STOPPED, EXIT_GRACE)
        await asyncio.gather(*(execution.wait() for execution in executions), return_exceptions=True)

    async def _forget(self, lease_id: int) -> None:
        attempt = self._attempts.pop(lease_id, None)
        if attempt is None:
            return
        attempt.unwatch()
        await self._in_disk_thread(attempt.output.close)
        try:
            await attempt.execution.forget()
        except Exception:
            # Its lease is over and answered: what is left costs disk, nothing else.
            log.exception("files of an ended job remain", extra={"event": "forget", "lease_id": lease_id})

    def _attend(self, lease_id: int, execution: Execution, *, rebooted: bool) -> None:
        """Follows an execution: reports what it writes, and its end."""
        output = OutputReader(execution.output, lease_id)
        changed = asyncio.Event()
        files: tuple[Path, ...] = (execution.output.stdout, execution.output.stderr, execution.output.events)
        unwatch = self._watcher.watch(files, changed.set)
        attempt = Attempt(execution, output, EventReader(lease_id), rebooted, unwatch, changed)
        # What was written before the watch stood, and by an earlier agent.
        changed.set()
        self._attempts[lease_id] = attempt
        self._spawn(self._await_end(attempt), f"wait-{lease_id}")
        attempt.follower = self._spawn(self._follow(lease_id, attempt), f"follow-{lease_id}")

    async def _await_end(self, attempt: Attempt) -> None:
        try:
            attempt.exit = await attempt.execution.wait()
        except ExecutionVanished:
            attempt.exit = None
        attempt.over.set()
        attempt.changed.set()

    async def _follow(self, lease_id: int, attempt: Attempt) -> None:
        """Reports what the execution writes, and its end after the last byte."""
        seen = (0, 0)
        short_looks = 0
        while True:
            await attempt.changed.wait()
            attempt.changed.clear()
            was_over = attempt.over.is_set()
            look, news = await self._in_disk_thread(partial(_look, attempt, final=was_over))
            self._report(lease_id, news)
            if look.more_events:
                attempt.changed.set()
            elif look.short and short_looks < MAX_SHORT_LOOKS:
                short_looks += was_over
                attempt.changed.set()
                await asyncio.sleep(SHORT_LOOK_PAUSE_S)
            elif was_over:
                break
            written = (look.stdout_bytes, look.stderr_bytes)
            if written == seen and not look.events:
                # Nothing to coalesce: the next byte is to be seen at once.
                continue
            if written != seen:
                self._do(self._core.log_available(lease_id, *written, self._clock_ns()))
                seen = written
            try:
                await asyncio.wait_for(attempt.over.wait(), COALESCE_S)
            except TimeoutError:
                continue
        self._report(lease_id, attempt.events.finish())
        ending = Ending(
            attempt.exit,
            attempt.events.result_json,
            attempt.events.error,
            look.stdout_bytes,
            look.stderr_bytes,
            attempt.rebooted,
        )
        # For an end that was journalled by an earlier agent, only the log is news.
        self._do(self._core.log_available(lease_id, look.stdout_bytes, look.stderr_bytes, self._clock_ns()))
        self._do(self._core.ended(lease_id, ending, self._clock_ns()))

    def _report(self, lease_id: int, news: News) -> None:
        if news.progress is not None:
            self._do(self._core.progress(lease_id, news.progress, self._clock_ns()))
        if news.checkpoint is not None:
            self._do(self._core.checkpoint(lease_id, news.checkpoint, self._clock_ns()))

    # ── background ───────────────────────────────────────────────────────────

    async def _send_logs(self) -> None:
        while True:
            await self._logs_waiting.wait()
            batch, size = [], 0
            while self._logs and size < MAX_LOG_MESSAGE_BYTES:
                batch.append(self._logs.popleft())
                size += batch[-1].length
            if not batch:
                self._logs_waiting.clear()
                continue
            chunks = await self._in_disk_thread(partial(self._read_chunks, batch))
            for stream_id in {action.stream_id for action in batch}:
                own = [chunk for action, chunk in zip(batch, chunks, strict=True) if action.stream_id == stream_id]
                message = pb.ConnectRequest(log_chunks=pb.LogChunks(chunks=[chunk for chunk in own if chunk.data]))
                if message.log_chunks.chunks:
                    self._streams.send(stream_id, message)

    def _read_chunks(self, batch: Sequence[act.SendLog]) -> list[pb.LogChunk]:
        time = timestamp(datetime.now(UTC))
        chunks = []
        for action in batch:
            stream = job_pb2.LogStream.ValueType(action.stream)
            attempt = self._attempts.get(action.lease_id)
            data = attempt.output.read(stream, action.file_offset, action.length) if attempt is not None else b""
            chunks.append(
                pb.LogChunk(
                    job_id=action.job_id,
                    lease_id=action.lease_id,
                    offset=action.offset,
                    stream=stream,
                    data=data,
                    time=time,
                )
            )
        return chunks

    async def _watch_gpus(self) -> None:
        while True:
            try:
                self._core.gpu_readings(await asyncio.to_thread(self._read_gpus))
            except Exception as error:
                log.warning("GPUs cannot be read", extra={"event": "gpu_read", "error": str(error)})
                self._core.gpu_readings(())
            await asyncio.sleep(self._gpu_interval_s)

    async def _in_disk_thread(self, call: Callable[[], T]) -> T:
        return await self._loop.run_in_executor(self._disk, call)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (failure := task.exception()) is not None:
            self._end_loudly(failure)

    def _end_loudly(self, failure: BaseException) -> None:
        """An invariant is broken: ends the agent. The jobs are safe under their keepers."""
        if self._crash is None:
            self._crash = failure
            self._stopping.set()

    async def _wind_up(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._stopping.set()
        await self._streams.aclose()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for attempt in self._attempts.values():
            attempt.unwatch()
        self._watcher.close()
        await asyncio.to_thread(self._disk.shutdown)
        for attempt in self._attempts.values():
            attempt.output.close()


def _look(attempt: Attempt, *, final: bool) -> tuple[Look, News]:
    """Looks at what an attempt wrote and reads its events; blocks, and may take a while with events of a busy job."""
    look = attempt.output.look(final=final)
    if look.events_skipped:
        attempt.events.skip()
    return look, attempt.events.feed(look.events)


_ON_LOST = {
    job_pb2.ON_LEASE_LOST_FREEZE: OnLost.FREEZE,
    job_pb2.ON_LEASE_LOST_CONTINUE: OnLost.CONTINUE,
}
"""What is not here is stopped: also what an older or a newer server says."""


def start_request(grant: pb.Grant, deadline_ns: int, *, can_freeze: bool) -> StartRequest:
    """Returns what a runtime, which can freeze or cannot, must know to prepare ``grant``."""
    command = grant.spec.command
    timeouts = grant.spec.timeouts
    lease = grant.spec.lease
    on_lost = _ON_LOST.get(lease.on_lost, OnLost.STOP)
    if on_lost is OnLost.FREEZE and not can_freeze:
        on_lost = OnLost.STOP
    # Only what is stopped for the sake of its lease needs a grace that the lease has room for.
    grace = grant.grace if on_lost is OnLost.STOP or not lease.HasField("grace") else lease.grace
    return StartRequest(
        lease_id=grant.lease_id,
        job_id=grant.job_id,
        attempt=grant.attempt,
        argv=tuple(command.argv),
        env=dict(command.env),
        working_dir=Path(command.working_dir) if command.working_dir else None,
        user=command.user or None,
        gpu_uuids=tuple(grant.gpu_uuids),
        grace=duration(grace),
        on_lost=on_lost,
        run_timeout=duration(timeouts.run) if timeouts.HasField("run") else None,
        checkpoint=grant.checkpoint if grant.HasField("checkpoint") else None,
        deadline_ns=deadline_ns,
    )
