"""An agent's process: the production protocol core and adoption, on a simulated host, disk and network.

It carries out the core's actions as the shipped supervisor does: inputs that come
together are one burst, the journal answers later, executions are prepared and
begun by work of their own. The process can be killed between any two actions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import ClassVar

from lessor.v1 import agent_service_pb2 as pb
from lessor.v1 import job_pb2
from lessor_agent.adoption import adopt
from lessor_agent.protocol import actions as act
from lessor_agent.protocol.core import AgentCore, Loss, Profile
from lessor_agent.protocol.outcomes import Ending, job_error, timestamp
from lessor_agent.runtimes.base import (
    Capabilities,
    ExecutionVanished,
    Exit,
    Handle,
    OutputFiles,
    Runtime,
    StartRequest,
    StopCause,
)
from lessor_agent.runtimes.base import Execution as AdoptedExecution
from lessor_agent.supervisor import start_request
from tests.simulation.host import RUNTIME, Execution, Host
from tests.simulation.memory_journal import MemoryJournal
from tests.simulation.network import Door, Network, Stream
from tests.simulation.process_loop import ProcessLoop
from tests.simulation.scheduler import Process, Scheduler, Violation

HEARTBEAT = timedelta(seconds=2)


class Weather:
    """How the host is just now."""

    def __init__(self) -> None:
        self.disk_usual_s = 0.005
        self.disk_rare_s = 0.2
        self.disk_rarely = 0.03
        self.disk_fails = 0.0
        """Probability that a transaction of the journal is refused."""
        self.prepare_usual_s = 0.05
        self.prepare_rare_s = 2.0
        self.prepare_rarely = 0.05
        self.prepare_fails = 0.02


class Agent:
    """One agent over all its lives, with its host and its state directory."""

    def __init__(self, name: str, scheduler: Scheduler, network: Network, doors: Sequence[Door], gpus: int) -> None:
        self.process = Process(name, scheduler.a_clock())
        self.host = Host(name, self.process.clock, scheduler)
        self.weather = Weather()
        self._journal = MemoryJournal()
        self._scheduler = scheduler
        self._network = network
        self._doors = doors
        self._profile_gpus = [
            pb.Gpu(uuid=f"GPU-{name}-{n}", index=n, model="Sim", memory_bytes=1 << 34) for n in range(gpus)
        ]
        self.core: AgentCore | None = None
        self.loops: list[ProcessLoop] = []
        self._stream: Stream | None = None
        self.crash_in_burst = 0.0
        """Probability that it is killed between two actions of one burst."""
        self.on_crash: Callable[[], None] = lambda: None
        self.host.on_news = self._news

    # ── lives ────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Starts it on its state directory."""
        process = self.process
        process.begin_life()
        self._scheduler.note(f"{process.name} starts")
        self._stream = None
        self._wakeup_ns: int | None = None
        self._release_waits = False
        self._journal_free_ns = 0
        self._seen: dict[int, tuple[int, int]] = {}
        self._told: set[int] = set()
        loop = ProcessLoop(self._scheduler, process)
        self.loops.append(loop)
        contents = self._journal.open(self.host.boot_id)

        async def begin() -> None:
            adopted = await adopt(contents, {RUNTIME: _AdoptionRuntime(self.host)}, self.host.boot_id)
            core = AgentCore(self._profile(), adopted.restored, self._scheduler.random.random)
            self._begin(core, rebooted=adopted.rebooted)

        def over(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception() is not None and process.life == life:
                raise Violation(f"{process.name}: starting has failed: {task.exception()!r}") from task.exception()

        life = process.life
        loop.run(lambda: loop.create_task(begin()).add_done_callback(over))

    def crash(self) -> None:
        """Ends it with SIGKILL. Its keepers go on."""
        self._scheduler.note(f"{self.process.name} crashes")
        self.process.end_life()
        self.core = None
        if self._stream is not None:
            self._stream.agent_is_gone()
        self.on_crash()

    def _profile(self) -> Profile:
        name = self.process.name
        return Profile(
            agent_id=name,
            agent_name=name,
            version="0",
            host=pb.HostIdentity(boot_id=self.host.boot_id, hardware_id=f"hardware-{name}", hostname=name),
            inventory=pb.Inventory(
                cpu_millis=4000, memory_bytes=1 << 34, gpus=self._profile_gpus, labels={"agent": name}
            ),
            runtimes=(pb.RuntimeInfo(name=RUNTIME, can_set_user=True),),
            heartbeat_interval=HEARTBEAT,
        )

    def _begin(self, core: AgentCore, *, rebooted: bool) -> None:
        self.core = core
        self._rebooted = rebooted
        core.hold()
        life = self.process.life
        self._do(core.restore(self._now_ns()))
        executions = list(self.host.executions.values())
        # As the supervisor has it: what ended in its absence is known before the first Hello.
        for execution in executions:
            if execution.exit is not None and self.process.life == life:
                self._news(execution)
        if self.process.life == life:
            self._do(core.start(self._now_ns()))
        for execution in executions:
            if self.process.life == life:
                self._news(execution)

    def _now_ns(self) -> int:
        return self.host.local_ns()

    # ── inputs and actions ───────────────────────────────────────────────────

    def _do(self, actions: Iterable[act.Action]) -> None:
        """Carries out what is urgent; the rest of the burst follows soon."""
        if self._perform_all(actions) and not self._release_waits:
            self._release_waits = True
            self._later(self._scheduler.spread_ns(0.0005, 0.02, 0.1), "", self._release)

    def _release(self) -> None:
        assert self.core is not None
        self._release_waits = False
        actions = self.core.release(self._now_ns())
        self.core.hold()
        if self._perform_all(actions):
            self._set_timer()

    def _perform_all(self, actions: Iterable[act.Action]) -> bool:
        """Carries out actions in order; False: it was killed amid them."""
        life = self.process.life
        for action in actions:
            self._perform(action)
            if self.crash_in_burst and self._scheduler.chance(self.crash_in_burst):
                self.crash()
            if self.process.life != life:
                return False
        return True

    def _later(self, delay_ns: int, what: str, do: Callable[[], None]) -> None:
        self._scheduler.after(delay_ns, what, do, self.process)

    def _set_timer(self) -> None:
        if self.core is None:
            return
        wakeup_ns = self.core.next_wakeup_ns()
        if wakeup_ns is None or (self._wakeup_ns is not None and self._wakeup_ns <= wakeup_ns):
            return
        self._wakeup_ns = wakeup_ns
        at_ns = self.process.clock.real_ns(wakeup_ns) + self._scheduler.spread_ns(0.002, 0.2, 0.03)

        def ring() -> None:
            if self._wakeup_ns == wakeup_ns and self.core is not None:
                self._wakeup_ns = None
                self._do(self.core.tick(self._now_ns()))
                self._set_timer()

        self._scheduler.at(at_ns, "", ring, self.process)

    def _perform(self, action: act.Action) -> None:
        match action:
            case act.Send():
                self._send(action.stream_id, action.message)
            case act.SendLog():
                self._later(self._scheduler.spread_ns(0.005, 0.1, 0.1), "", lambda: self._send_log(action))
            case act.Journal():
                self._write_journal(action)
            case act.Renew():
                if (execution := self.host.executions.get(action.lease_id)) is not None:
                    self.host.renew(execution, action.deadline_ns)
            case act.Prepare():
                self._prepare(action)
            case act.Begin():
                self._later(self._scheduler.spread_ns(0.01, 1.0, 0.05), "", lambda: self._begin_job(action.lease_id))
            case act.Stop():
                self._later(self._scheduler.spread_ns(0.002, 0.1, 0.05), "", lambda: self._stop(action))
            case act.Forget():
                self._later(self._scheduler.spread_ns(0.01, 0.1, 0.05), "", lambda: self.host.forget(action.lease_id))
            case act.OpenStream():
                self._open(action.stream_id)
            case act.CloseStream():
                if self._stream is not None and self._stream.stream_id == action.stream_id:
                    self._stream.leave()
                    self._stream = None
            case act.GiveUp():
                raise Violation(f"{self.process.name} gives up: {action.message}")

    # ── the stream ───────────────────────────────────────────────────────────

    def _open(self, stream_id: int) -> None:
        if self._stream is not None:
            self._stream.leave()
        door = self._scheduler.random.choice(self._doors)
        self._stream = self._network.connect(self.process, self, stream_id, door)
        self._scheduler.note(f"{self._stream.label} is opened")

    def _send(self, stream_id: int, message: pb.ConnectRequest) -> None:
        if self._stream is not None and self._stream.stream_id == stream_id:
            self._stream.send(message)

    def _send_log(self, action: act.SendLog) -> None:
        execution = self.host.executions.get(action.lease_id)
        if execution is None:
            return
        chunk = pb.LogChunk(
            job_id=action.job_id,
            lease_id=action.lease_id,
            offset=action.offset,
            stream=job_pb2.LogStream.ValueType(action.stream),
            data=execution.output(action.stream, action.file_offset, action.length),
            time=timestamp(self.host.wall()),
        )
        self._send(action.stream_id, pb.ConnectRequest(log_chunks=pb.LogChunks(chunks=[chunk])))

    def stream_opened(self, stream: Stream) -> None:
        """See :class:`tests.simulation.network.AgentEnd`."""
        if self.core is not None:
            self._do(self.core.stream_opened(stream.stream_id, self._now_ns()))

    def stream_message(self, stream: Stream, message: pb.ConnectResponse) -> None:
        """See :class:`tests.simulation.network.AgentEnd`."""
        if self.core is not None:
            self._do(self.core.message(stream.stream_id, message, self._now_ns()))

    def stream_lost(self, stream: Stream, loss: Loss) -> None:
        """See :class:`tests.simulation.network.AgentEnd`."""
        if self.core is not None:
            if self._stream is stream:
                self._stream = None
            self._do(self.core.stream_lost(stream.stream_id, loss, self._now_ns()))

    # ── the journal ──────────────────────────────────────────────────────────

    def _write_journal(self, action: act.Journal) -> None:
        """Transactions commit in order, and are answered in order, each a little later."""
        scheduler, weather = self._scheduler, self.weather
        delay_ns = scheduler.spread_ns(weather.disk_usual_s, weather.disk_rare_s, weather.disk_rarely)
        at_ns = max(self._journal_free_ns, scheduler.now_ns + delay_ns) + 1
        fails = scheduler.chance(weather.disk_fails)

        def commit() -> None:
            if not fails:
                self._journal.commit(action.entries)

        def answer() -> None:
            if self.core is None:
                return
            if fails:
                scheduler.note(f"{self.process.name}: the journal refuses {action.ticket}")
                self._do(self.core.journal_failed(action.ticket, "no space left on device", self._now_ns()))
            else:
                self._do(self.core.journal_committed(action.ticket, self._now_ns()))

        scheduler.at(at_ns, "", commit, self.process)
        self._journal_free_ns = at_ns + scheduler.spread_ns(0.001, 0.02, 0.1)
        scheduler.at(self._journal_free_ns, "", answer, self.process)

    # ── executions ───────────────────────────────────────────────────────────

    def _prepare(self, action: act.Prepare) -> None:
        scheduler, weather, grant = self._scheduler, self.weather, action.grant
        delay_ns = scheduler.spread_ns(weather.prepare_usual_s, weather.prepare_rare_s, weather.prepare_rarely)

        def refuse() -> None:
            if self.core is not None:
                error = job_error(job_pb2.ERROR_CLASS_INFRASTRUCTURE, "START_REFUSED", "simulated", retryable=True)
                self._do(self.core.prepare_refused(action.lease_id, error, self._now_ns()))

        def make() -> None:
            request = start_request(grant, action.deadline_ns, can_freeze=True)
            made = Execution(
                lease_id=action.lease_id,
                job_id=grant.job_id,
                name=grant.spec.name,
                attempt=grant.attempt,
                gpu_uuids=tuple(grant.gpu_uuids),
                agent=self.process.name,
                grace=request.grace,
                on_lost=request.on_lost,
                deadline_ns=action.deadline_ns,
            )
            execution = self.host.prepare(made)
            scheduler.note(f"{self.process.name}: the keeper of lease {action.lease_id} stands")
            self._later(scheduler.spread_ns(0.005, 0.5, 0.05), "", lambda: self._prepared(execution))

        if scheduler.chance(weather.prepare_fails):
            self._later(delay_ns, f"{self.process.name} refuses lease {action.lease_id}", refuse)
        else:
            self._later(delay_ns, "", make)

    def _prepared(self, execution: Execution) -> None:
        if self.core is not None:
            self._do(self.core.prepared(execution.lease_id, execution.handle, self._now_ns()))
            self._attend(execution)

    def _begin_job(self, lease_id: int) -> None:
        execution = self.host.executions.get(lease_id)
        if execution is None or not self.host.begin(execution):
            return

        def tell() -> None:
            if self.core is not None:
                self._do(self.core.running(lease_id, execution.started_at or self.host.wall(), self._now_ns()))

        self._later(self._scheduler.spread_ns(0.002, 0.2, 0.05), "", tell)

    def _stop(self, action: act.Stop) -> None:
        if (execution := self.host.executions.get(action.lease_id)) is not None:
            self.host.stop(execution, action.cause, action.grace)

    def _news(self, execution: Execution) -> None:
        """An execution has written something or ended."""
        if self.process.alive and self.core is not None:
            self._later(self._scheduler.spread_ns(0.01, 0.5, 0.05), "", lambda: self._attend(execution))

    def _attend(self, execution: Execution) -> None:
        core, lease_id = self.core, execution.lease_id
        if core is None or lease_id not in self.host.executions:
            return
        written = (execution.stdout, execution.stderr)
        if written != self._seen.get(lease_id):
            self._seen[lease_id] = written
            self._do(core.log_available(lease_id, *written, self._now_ns()))
            if execution.workload is not None and execution.workload.checkpoints and self.core is not None:
                self._do(self.core.checkpoint(lease_id, f"{lease_id}:{written[0]}", self._now_ns()))
        if execution.exit is not None and lease_id not in self._told and self.core is not None:
            self._told.add(lease_id)
            ending = Ending(execution.exit, stdout_bytes=written[0], stderr_bytes=written[1], rebooted=self._rebooted)
            self._do(self.core.ended(lease_id, ending, self._now_ns()))


class _AdoptionRuntime(Runtime):
    """What adoption asks of a runtime: what stands on the host."""

    name: ClassVar[str] = RUNTIME

    def __init__(self, host: Host) -> None:
        self._host = host

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(can_set_user=True)

    async def open(self) -> None:
        return None

    async def close(self) -> None:
        return None

    async def prepare(self, request: StartRequest) -> AdoptedExecution:
        raise NotImplementedError("the agent prepares by itself")

    async def adopt(self, handle: Handle) -> AdoptedExecution:
        execution = self._host.executions.get(int(handle.data["lease_id"]))
        if execution is None:
            raise ExecutionVanished(f"lease {handle.data['lease_id']} has vanished")
        return _Adopted(self._host, execution)

    async def strays(self) -> list[Handle]:
        return [execution.handle for execution in self._host.executions.values()]


class _Adopted(AdoptedExecution):
    """An execution that adoption found."""

    output: OutputFiles

    def __init__(self, host: Host, execution: Execution) -> None:
        self._host = host
        self._execution = execution
        self.handle = execution.handle
        self.lease_id = execution.lease_id

    async def begin(self) -> bool:
        raise NotImplementedError("adoption begins nothing")

    @property
    def ended(self) -> bool:
        return self._execution.exit is not None

    async def wait(self) -> Exit:
        while self._execution.exit is None:  # noqa: ASYNC110 - looked at in virtual time, which costs nothing
            await asyncio.sleep(0.1)
        return self._execution.exit

    async def stop(self, cause: StopCause, grace: timedelta | None = None) -> None:
        self._host.stop(self._execution, cause, grace)

    def renew(self, deadline_ns: int) -> None:
        self._host.renew(self._execution, deadline_ns)

    async def forget(self) -> None:
        self._host.forget(self.lease_id)
