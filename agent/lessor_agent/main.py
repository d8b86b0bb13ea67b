"""``lessor agent``: puts the parts together and serves until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata

import uvloop

from lessor import __version__
from lessor.log import configure
from lessor.open_files import raise_open_files
from lessor.v1 import agent_service_pb2 as pb
from lessor_agent import drain
from lessor_agent.adoption import AdoptionImpossible, adopt
from lessor_agent.config import AgentConfig, ConfigError, parse_arguments
from lessor_agent.gpus import FakeGpus, Gpu, GpuInventory, NvmlGpus
from lessor_agent.host import HostFacts, read_host
from lessor_agent.journal import Contents, Journal, JournalUnavailable
from lessor_agent.protocol.core import AgentCore, Profile
from lessor_agent.runtimes.base import Runtime, RuntimeContext, RuntimeFault, RuntimeUnavailable
from lessor_agent.state_dir import StateDir, StateDirError
from lessor_agent.stream import GrpcStreams
from lessor_agent.supervisor import Supervisor

log = logging.getLogger(__name__)

RUNTIME_ENTRY_POINTS = "lessor.runtimes"
"""Entry-point group: runtime name → its class."""


class NoRuntime(Exception):
    """No runtime works on this host; the message says what each one misses."""


def main(argv: Sequence[str]) -> int:
    """Runs the agent with the arguments ``argv`` (without the program's name); returns the exit code.

    0: told to stop. 1: it cannot work here. 2: the arguments are wrong. With
    ``drain`` or ``undrain`` first: as :func:`lessor_agent.drain.main`.
    """
    if argv and argv[0] in drain.COMMANDS:
        return drain.main(argv)
    try:
        config = parse_arguments(argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as asked:
        return asked.code if isinstance(asked.code, int) else 2
    configure(config.log_format, config.log_level)
    # What jobs print and what the journal holds is the agent's user's alone.
    os.umask(0o077)
    open_files = raise_open_files()
    try:
        with StateDir(config.state_dir) as state, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(serve(config, state, open_files))
    except (StateDirError, AdoptionImpossible, NoRuntime, RuntimeFault) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


async def serve(config: AgentConfig, state: StateDir, open_files: int | None = None) -> int:
    """Runs the agent until SIGTERM or SIGINT; returns the exit code.

    Args:
        config: What was asked for.
        state: The state directory, locked.
        open_files: Soft limit of open files for jobs; None: the agent's own.

    Raises:
        NoRuntime: No runtime works on this host.
        AdoptionImpossible: Leases are held whose runtime does not work now.
    """
    stop = _StopSignals()
    host = await asyncio.to_thread(read_host)
    gpus: GpuInventory = NvmlGpus() if config.fake_gpus is None else FakeGpus(config.fake_gpus, agent_id=state.agent_id)
    inventory = inventory_of(config, host, await asyncio.to_thread(gpus.discover))
    runtimes = await open_runtimes(RuntimeContext(state.path, config.env_rules, open_files))
    journal = Journal(state.path / "journal.db")
    try:
        contents = _open_journal(journal, host.boot_id)
        adopted = await adopt(contents, runtimes, host.boot_id)
        profile = Profile(
            agent_id=state.agent_id,
            agent_name=config.name,
            version=__version__,
            host=pb.HostIdentity(boot_id=host.boot_id, hardware_id=host.hardware_id, hostname=host.hostname),
            inventory=inventory,
            runtimes=tuple(
                pb.RuntimeInfo(name=name, can_set_user=runtime.capabilities.can_set_user)
                for name, runtime in runtimes.items()
            ),
            heartbeat_interval=config.heartbeat,
        )
        supervisor = Supervisor(
            AgentCore(profile, adopted.restored, random.random),
            streams=GrpcStreams(str(config.address)),
            journal=journal,
            runtimes=runtimes,
            adopted=adopted,
            read_gpus=lambda: _readings(gpus),
            gpu_interval_s=config.heartbeat.total_seconds(),
            keeps_jobs=config.on_exit == "keep",
        )
        log.info(
            "agent starts",
            extra={
                "event": "starting",
                "agent_id": state.agent_id,
                "agent": config.name,
                "address": str(config.address),
                "gpus": len(inventory.gpus),
                "leases": len(adopted.restored.leases),
            },
        )
        stop.direct_to(supervisor)
        return await supervisor.run()
    finally:
        for runtime in runtimes.values():
            await runtime.close()
        await asyncio.to_thread(journal.close)
        await asyncio.to_thread(gpus.close)


async def open_runtimes(context: RuntimeContext) -> Mapping[str, Runtime]:
    """Returns name → runtime for every installed one that works here.

    Raises:
        NoRuntime: None does.
    """
    opened: dict[str, Runtime] = {}
    failures = []
    for point in metadata.entry_points(group=RUNTIME_ENTRY_POINTS):
        try:
            runtime: Runtime = point.load()(context)
            await runtime.open()
        except (ImportError, RuntimeUnavailable) as error:
            failures.append(f"{point.name}: {error}")
            log.warning(
                "runtime does not work on this host",
                extra={"event": "runtime_unavailable", "runtime": point.name, "error": str(error)},
            )
        else:
            opened[runtime.name] = runtime
    if not opened:
        raise NoRuntime(f"no runtime works on this host ({'; '.join(failures) or 'none is installed'})")
    return opened


def inventory_of(config: AgentConfig, host: HostFacts, gpus: Sequence[Gpu]) -> pb.Inventory:
    """Returns what the agent offers: the host's, but for what the configuration says."""
    return pb.Inventory(
        cpu_millis=host.cpu_millis if config.cpu is None else config.cpu,
        memory_bytes=host.memory_bytes if config.memory is None else config.memory,
        gpus=[pb.Gpu(uuid=gpu.uuid, index=gpu.index, model=gpu.model, memory_bytes=gpu.memory_bytes) for gpu in gpus],
        labels=config.labels,
    )


class _StopSignals:
    """SIGTERM and SIGINT end the agent in order, whenever they come; a second one does not hurry it."""

    def __init__(self) -> None:
        self._supervisor: Supervisor | None = None
        self._received = ""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            # Only a main thread may have handlers; elsewhere whoever runs the loop cancels it.
            with contextlib.suppress(ValueError, RuntimeError):
                loop.add_signal_handler(number, self._receive, number.name)

    def direct_to(self, supervisor: Supervisor) -> None:
        """Has signals, one that has already come included, stop ``supervisor`` once it runs."""
        self._supervisor = supervisor
        if self._received:
            asyncio.get_running_loop().call_soon(supervisor.stop, self._received)

    def _receive(self, name: str) -> None:
        self._received = name
        if self._supervisor is not None:
            self._supervisor.stop(name)


def _open_journal(journal: Journal, boot_id: str) -> Contents:
    try:
        return journal.open(boot_id)
    except JournalUnavailable as error:
        log.error(
            "no new work is taken: the journal is unavailable; mend or remove it and restart the agent",
            extra={"event": "journal_unavailable", "error": str(error)},
        )
        return Contents()


def _readings(gpus: GpuInventory) -> list[pb.GpuReading]:
    return [
        pb.GpuReading(
            uuid=reading.uuid,
            utilization_percent=reading.utilization_percent,
            memory_used_bytes=reading.memory_used_bytes,
        )
        for reading in gpus.read()
    ]
